"""`filterfold shrink`: each child is there as a whole or not at all, what its record says holds, a rerun goes on."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import filterfold as ff
from filterfold.cli.app import app
from filterfold.data import load as load_data
from filterfold.surgery.checkpoint import inspect
from filterfold.training import evaluate
from filterfold.training import loop as training_loop
from filterfold.zoo import build

pytestmark = pytest.mark.slow

runner = CliRunner()
SHARES = ["0.8", "0.4"]


def dense() -> Any:
    return build("vgg_small", channels=1, image_size=8, width=0.5)


def run(*command: str, code: int = 0) -> str:
    result = runner.invoke(app, list(command))
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def shrink(weights: Path, out: Path, *options: str, macs: str = "0.8,0.4", code: int = 0) -> str:
    command = ["shrink", "vgg_small", "--width", "0.5", "-w", str(weights), "-d", "digits", "--train-limit", "400"]
    command += ["--images", "200", "--batch", "2", "--threads", "1", "--macs", macs, "--out", str(out), *options]
    return run(*command, code=code)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    options = ["--width", "0.5", "-d", "digits", "--epochs", "5", "--lr", "0.1", "--schedule", "onecycle"]
    run("train", "--model", "vgg_small", *options, "--threads", "1", "--out", str(folder / "run"))
    return folder / "run" / "model.safetensors"


@pytest.fixture(scope="module")
def family(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("family") / "out"
    shrink(weights, out)
    return out


def macs(model: torch.nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 1, 8, 8))
    return counter.get_total_flops() // 2


def test_each_child_is_as_its_record_says(weights: Path, family: Path) -> None:
    test, uncut = load_data("digits").test, ff.load(weights, dense)
    images = (test.images.float() / 255 - test.normalization[0][0]) / test.normalization[1][0]
    with torch.no_grad():
        expected = uncut.eval()(images).argmax(1)
    for share in SHARES:
        record = json.loads((family / f"macs-{share}.json").read_text())
        child = ff.load(family / f"macs-{share}.safetensors", dense)
        assert evaluate(child, test).top1 == pytest.approx(record["top1"])
        with torch.no_grad():
            same = child.eval()(images).argmax(1) == expected
        assert 100 * same.double().mean().item() == pytest.approx(record["agreement"])
        assert record["images"] == 359
        assert macs(child) == record["macs"] <= float(share) * macs(uncut) == float(share) * record["uncut"]["macs"]
        assert sum(parameter.numel() for parameter in child.parameters()) == record["parameters"]
        about = inspect(family / f"macs-{share}.safetensors")
        assert {name: list(width) for name, width in about.plans[0].widths.items()} == record["widths"]
        assert "the cut network equals the masked one" in record["verified"]
    assert not list(family.glob(".*"))


def test_the_page_says_how_to_load_each_child(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = [unescape(text) for text in re.findall(r"<code>(.*?)</code>", (family / "report.html").read_text(), re.S)]
    for share, lines, command in zip(SHARES, code[0:4:2], code[1:4:2], strict=True):
        found: dict[str, Any] = {}
        exec(lines, found)
        saved = load_file(family / f"macs-{share}.safetensors")
        assert all(value.equal(saved[name]) for name, value in found["network"].state_dict().items() if name in saved)
        top1 = json.loads((family / f"macs-{share}.json").read_text())["top1"]
        assert f"{top1:.2f} %" in run(*command.split()[1:])


def test_timing_is_interleaved_with_a_control(family: Path) -> None:
    timing = json.loads((family / "family.json").read_text())["timing"]
    assert [row["model"] for row in timing["rows"]] == ["uncut", *SHARES, "A/A control"]
    assert {row["batch_size"] for row in timing["rows"]} == {2}
    assert timing["environment"]["torch"] == torch.__version__


def test_more_shares_add_children_and_leave_the_others(weights: Path, family: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shrink(weights, out, macs="0.4")
    before = (out / "macs-0.4.safetensors").stat().st_mtime_ns
    text = shrink(weights, out, macs="0.8")
    assert (out / "macs-0.4.safetensors").stat().st_mtime_ns == before
    for share in SHARES:
        one, other = (load_file(folder / f"macs-{share}.safetensors") for folder in (out, family))
        assert all(value.equal(other[name]) for name, value in one.items())
        assert f" {share} " in text


def test_interrupted_between_and_within_children_it_goes_on(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation runs once an epoch; the fifth is in the middle of the second child's training."""
    options = ["--epochs", "3", "--lr", "0.02", "--distill", "--batch-size", "64", "--onnx"]
    shrink(weights, tmp_path / "whole", *options)
    honest, calls = training_loop.evaluate, []

    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return honest(*arguments, **keywords)

    monkeypatch.setattr(training_loop, "evaluate", interrupted)
    out = tmp_path / "out"
    text = shrink(weights, out, *options, code=130)
    assert "the same command goes on from here" in text
    assert {path.name for path in out.iterdir()} == {
        "family.json", "macs-0.8.json", "macs-0.8.safetensors", ".macs-0.4.training.safetensors",
    }  # fmt: skip
    shrink(weights, out, *options)
    assert len(calls) == 5 + 2  # the first epoch of the second child was not done again
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in out.iterdir()} == names >= {"macs-0.8.onnx", "macs-0.4.onnx", "report.html"}
    for share in SHARES:
        one, other = (load_file(folder / f"macs-{share}.safetensors") for folder in (out, tmp_path / "whole"))
        assert one.keys() == other.keys()
        assert all(value.equal(other[name]) for name, value in one.items())
        first, second = (json.loads((f / f"macs-{share}.json").read_text()) for f in (out, tmp_path / "whole"))
        for record in (first, second):
            del record["training"]["seconds"], record["environment"]
        assert first == second
        images = 400 // 64 * 64
        assert first["training"] == {"epochs": 3, "macs": 3 * images * (3 * first["macs"] + first["uncut"]["macs"])}


def test_what_cannot_be_done_leaves_nothing(weights: Path, family: Path, tmp_path: Path) -> None:
    text = shrink(weights, tmp_path / "out", macs="0.8,0.00001", code=2)
    assert text.startswith("filterfold: macs")
    assert not (tmp_path / "out").exists()
    before = {path: path.stat().st_mtime_ns for path in family.iterdir()}
    text = shrink(weights, family, "--criterion", "l1", code=2)
    assert "holds another family (criterion is 'reconstruction' there, 'l1' here)" in text
    assert before == {path: path.stat().st_mtime_ns for path in family.iterdir()}
    (tmp_path / "notes.txt").write_text("mine")
    assert "is not empty and holds no family" in shrink(weights, tmp_path, code=2)
    for options, words in (
        (("--remedy", "prayer"), "unknown remedy 'prayer'"),
        (("--distill",), "--distill has no effect without --epochs"),
        (("--lr", "0.1"), "--lr has no effect without --epochs"),
        (("--temperature", "3", "--epochs", "1"), "--temperature has no effect without --distill"),
    ):
        assert words in shrink(weights, tmp_path / "out", *options, code=2)
    assert not (tmp_path / "out").exists()
