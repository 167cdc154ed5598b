"""Bad input: one clear line, exit code 2, and nothing overwritten. One table."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from filterfold.cli.app import app
from filterfold.cli.options import RunOptions
from filterfold.zoo import build

runner = CliRunner()

TINY = ["--model", "vgg_small", "--data", "digits", "--width", "0.25", "--epochs", "1", "--train-limit", "100"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of everything that is wrong."""
    folder = tmp_path_factory.mktemp("place")
    _weights(folder)
    _parquet(folder / "parquet")
    _images(folder / "images")
    (folder / "seven.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))\n"
    )
    (folder / "thesis").mkdir()
    (folder / "thesis" / "thesis.txt").write_text("do not touch")
    result = runner.invoke(app, ["train", *TINY, "--out", str(folder / "run")])
    assert result.exit_code == 0, result.output
    return folder


def _weights(folder: Path) -> None:
    save_file(build("vgg_small", channels=1, image_size=8).state_dict(), folder / "whole.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "whole.safetensors").read_bytes()[:5000])
    save_file({"a": torch.zeros(1)}, folder / "foreign.safetensors")
    (folder / "pickle.pt").write_bytes(
        b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02id\x94\x85\x94R\x94."
    )


def _parquet(folder: Path) -> None:
    import datasets

    folder.mkdir()
    rows = {"picture": [_png(shade) for shade in range(0, 200, 10)], "kind": [0, 1] * 10}
    for split in ("train", "test"):
        made = datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())
        made.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def _images(folder: Path) -> None:
    for split in ("train", "test"):
        for kind in ("cat", "dog"):
            (folder / split / kind).mkdir(parents=True)
            for number in range(6):
                (folder / split / kind / f"{number}.png").write_bytes(_png(20 * number)["bytes"])
    (folder / "train" / "dog" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")


def _png(shade: int) -> dict[str, bytes]:
    from PIL import Image

    held = io.BytesIO()
    Image.new("L", (8, 8), shade).save(held, "PNG")
    return {"bytes": held.getvalue()}


TABLE = {
    "no such data set": ("train --data no-such-data --out {}/new", "no-such-data"),
    "wrong column": ("train --data {}/parquet --image-column picture --label-column colour --out {}/new", "'colour'"),
    "unreadable image": ("train --data {}/images --model vgg_small --out {}/new", "3.png"),
    "wrong number of classes": ("train --data digits --model {}/seven.py:net --out {}/new", "7 outputs"),
    "unknown model": ("train --data digits --model vgg17 --out {}/new", "no model 'vgg17'; did you mean vgg16?"),
    "too small images": ("train --data digits --model vgg16 --out {}/new", "32 pixels"),
    "another run": (
        "train tiny --lr 0.5 --out {}/run", "holds another run (recipe.lr is 0.02 there, 0.5 here); give another --out"
    ),
    "another run, other seed": ("train tiny --seed 1 --out {}/run", "holds another run (dense, seed 0); give another"),
    "foreign folder": ("compare tiny --methods dense --out {}/thesis", "is not empty and holds no comparison"),
    "different comparison": (
        "compare tiny --methods dense --lr 0.5 --out {}/run", "different comparison (recipe.lr is 0.02 there, 0.5 here)"
    ),
    "ratio above one": ("prune -m vgg_small -d digits -w {}/whole.safetensors --keep 1.5 --out {}/new", "1.5"),
    "ratio above one, compare": ("compare tiny --keep 1.5 --out {}/new", "keep = 1.5"),
    "no budget": ("prune -m vgg_small -d digits -w {}/whole.safetensors --out {}/new", "one of --keep, --macs"),
    "unknown group": (
        "prune -m vgg_small -d digits -w {}/whole.safetensors --keep conv9=0.5 --out {}/new", "conv9"
    ),
    "unknown criterion": (
        "prune -m vgg_small -d digits -w {}/whole.safetensors --keep 0.5 --criterion l3 --out {}/new", "l3"
    ),
    "file in the way": (
        "prune -m vgg_small -d digits -w {}/whole.safetensors --keep 0.5 --out {}/foreign.safetensors", "exists; give"
    ),
    "truncated checkpoint": ("evaluate -m vgg_small -d digits -w {}/cut.safetensors", "cut.safetensors"),
    "foreign checkpoint": ("evaluate -m vgg_small -d digits -w {}/foreign.safetensors", "does not fit VGG"),
    "a pickle that runs code": ("evaluate -m vgg_small -d digits -w {}/pickle.pt", "not a plain state dict"),
    "missing checkpoint": ("evaluate -m vgg_small -d digits -w {}/none.safetensors", "no such file"),
    "unknown method": ("compare tiny --methods dense,onlin --out {}/new", "no method 'onlin'; did you mean online"),
    "clusters that are none": ("compare tiny --clusters five --out {}/new", "--clusters five"),
    "no trials": ("compare tiny --methods dense --trials 0 --out {}/new", "nothing to compare"),
    "no duration": ("compare tiny --keep 0.5 --stop-after soon --out {}/new", "'soon' is no duration"),
    "no such device": ("train tiny --device tpu --out {}/new", "tpu"),
    "no such precision": ("train tiny --precision 8-bit --out {}/new", "8-bit"),
    "no such pull": ("train tiny --method online --keep 0.5 --pull hard --out {}/new", "--pull hard: must be cosine"),
    "a strength of nothing": (
        "train tiny --method online --keep 0.5 --pull none --strength 1 --out {}/new",
        "--pull none has none",
    ),
    "no such milestones": ("train tiny --method online --keep 0.5 --milestones late --out {}/new", "late"),
    "fractions of training that fall": (
        "train tiny --method online --keep 0.5 --milestones 0.3,0.1 --out {}/new", "must rise"
    ),
    "no such optimizer": ("train tiny --optimizer adam --out {}/new", "optimizer='adam'"),
    "no such retraining": ("compare tiny --methods l1 --retrain-schedule never --out {}/new", "schedule='never'"),
    "a teacher of nothing": ("train tiny --distill --out {}/new", "dense cuts no network"),
    "a teacher that nobody asked for": (
        "compare tiny --teacher {}/whole.safetensors --out {}/new", "--teacher has no effect without --distill"
    ),
    "no such teacher": (
        "train tiny --method l1 --distill --teacher {}/none.safetensors --out {}/new", "none.safetensors: no such file"
    ),
    "a teacher without training": (
        "prune -m vgg_small -d digits -w {}/whole.safetensors --keep 0.5 --distill --out {}/new",
        "--distill has no effect without --epochs",
    ),
    "retraining without epochs": (
        "prune -m vgg_small -d digits -w {}/whole.safetensors --keep 0.5 --lr 0.1 --out {}/new",
        "--lr has no effect without --epochs",
    ),
    "no epochs": ("train -m vgg_small -d digits --epochs 0 --out {}/new", "epochs=0"),
    "no validation share": ("train tiny --validation some --out {}/new", "--validation some"),
}  # fmt: skip


NAMES = "it names none of classes, channels, width, image_size"


@pytest.mark.parametrize("case", TABLE)
def test_bad_input(place: Path, case: str) -> None:
    line, message = TABLE[case]
    command = line.replace("{}", str(place)).split()
    at = command.index("tiny") if "tiny" in command else None
    if at is not None:
        command[at : at + 1] = TINY
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    result = runner.invoke(app, command)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ("" if "seven" not in line else f"{place}/seven.py:net was given nothing: {NAMES}\n")
    assert result.stderr.startswith("filterfold: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


WRITES = {
    "train": "train tiny --out OUT", "compare": "compare tiny --out OUT", "demo": "demo --out OUT",
    "recipe": "recipe run resnet56-b --data digits --out OUT", "report": "report --table TABLE --out OUT",
    "prune": "prune -m vgg_small -d digits -w {}/whole.safetensors --keep 0.5 --out OUT",
    "sensitivity": "sensitivity vgg_small -d digits -w {}/whole.safetensors --out OUT",
    "shrink": "shrink vgg_small -d digits -w {}/whole.safetensors --macs 0.5 --out OUT",
}  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
def test_where_nothing_can_be_written(place: Path, tmp_path: Path, reference: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("in the way")
    before = sorted(tmp_path.iterdir())
    for out in ("file/run", "loop/run", "loop", "x" * 300):
        line = WRITES[name].replace("OUT", str(tmp_path / out)).replace("{}", str(place))
        command = line.replace("TABLE", str(reference / "figures_4_5.csv")).replace("tiny", " ".join(TINY)).split()
        result = runner.invoke(app, command)
        assert result.exit_code == 2, (out, result.output, result.exception)
        assert result.stderr.startswith(f"filterfold: {tmp_path / out}")
        assert result.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(RunOptions, "run", broken)
    result = runner.invoke(app, ["compare", *TINY, "--methods", "dense", "--out", str(tmp_path / "run")])
    assert isinstance(result.exception, ZeroDivisionError)


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunOptions, "run", interrupted)
    result = runner.invoke(app, ["compare", *TINY, "--methods", "dense", "--out", str(tmp_path / "run")])
    assert result.exit_code == 130
    assert result.stderr == "filterfold: interrupted; the same command goes on from here\n"
