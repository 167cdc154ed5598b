"""Data are known by their content: other pixels or labels under the same name are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from filterfold import data
from filterfold.bench.trials import records, runner
from filterfold.bench.trials.config import Comparison
from filterfold.bench.trials.context import RunContext
from filterfold.bench.trials.setting import Setting
from filterfold.cli.app import app
from filterfold.errors import ConfigError, RecordError
from filterfold.surgery.checkpoint import save
from filterfold.training import Recipe, train
from filterfold.utils.io import load_tree, save_tree
from filterfold.zoo import build


def draw(folder: Path, shade: int = 0) -> Path:
    """Forty images of two classes; `shade` changes one pixel of one image."""
    for split, count in (("train", 15), ("test", 5)):
        for kind in ("a", "b"):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                image = Image.new("L", (8, 8), 100 * (kind == "b") + number)
                if (split, kind, number) == ("train", "a", 3):
                    image.putpixel((2, 2), shade)
                image.save(folder / split / kind / f"{number}.png")
    return folder


def load(folder: Path, **options: object) -> data.ImageData:
    return data.load(str(folder), cache_dir=folder.with_name("cache"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("memory", [1 << 30, 0], ids=["in memory", "streamed"])
def test_one_pixel_or_label_changes_it_and_nothing_else_does(tmp_path: Path, memory: int) -> None:
    how = {"memory_limit": memory, "workers": 0, "validation": 0}
    first, again = load(draw(tmp_path / "one"), **how), load(draw(tmp_path / "same"), **how)
    other = load(draw(tmp_path / "other", shade=9), **how)
    assert first.fingerprint == again.fingerprint
    assert len(first.fingerprint) == 16
    assert first.train.fingerprint != other.train.fingerprint
    assert first.test.fingerprint == other.test.fingerprint
    assert first.fingerprint != other.fingerprint
    assert replace(first.train, labels=1 - first.train.labels).fingerprint != first.train.fingerprint  # type: ignore[type-var]
    assert first.train.take(torch.tensor([1, 0])).fingerprint != first.train.take(torch.tensor([0, 1])).fingerprint
    assert replace(first.train, normalization=((0.0,), (1.0,))).fingerprint == first.train.fingerprint  # type: ignore[type-var]


def network() -> nn.Module:
    torch.manual_seed(0)
    return build("vgg_small", classes=2, channels=1, image_size=8, width=0.125)


def test_a_training_goes_on_with_the_same_images_only(tmp_path: Path) -> None:
    images, path = load(draw(tmp_path / "set")), tmp_path / "checkpoint"
    recipe = Recipe(epochs=1, batch_size=10)
    train(network(), images, recipe, checkpoint=path, device="cpu")
    other = load(draw(tmp_path / "other", shade=9))
    with pytest.raises(ConfigError, match=r"another run: data.images is \['\w+', '\w+'\] there"):
        train(network(), replace(other, name=images.name), recipe, checkpoint=path, device="cpu")
    tree = load_tree(path)
    del tree["identity"]["data"]["images"]  # as versions wrote it that did not look at them
    save_tree(path, tree)
    train(network(), images, recipe, checkpoint=path, device="cpu")


def test_a_comparison_takes_no_trials_of_other_images(tmp_path: Path) -> None:
    draw(tmp_path / "set")
    setting = Setting("vgg_small", str(tmp_path / "set"), width=0.125, recipe={"epochs": 1, "batch_size": 10})
    options = {"cache_dir": tmp_path / "cache", "timing_rounds": 1, "batch_sizes": []}
    first = runner.compare(Comparison.of(setting, ["dense"], seeds=[0]), tmp_path / "run", **options)  # type: ignore[arg-type]
    [record] = first.records
    known = record["images"]
    assert known == load(tmp_path / "set").fingerprint
    draw(tmp_path / "set", shade=9)
    more = Comparison.of(setting, ["dense"], seeds=[0, 1])
    with pytest.raises(RecordError, match=rf"not those that this was begun with: fingerprint \w+, {known} then"):
        runner.compare(more, tmp_path / "run", **options)  # type: ignore[arg-type]
    with pytest.raises(RecordError, match="not those that this was begun with"):
        more.claim(tmp_path / "run", images="0123456789abcdef")  # another process has begun meanwhile
    with pytest.raises(RecordError, match="not those that this was begun with"):
        RunContext(setting, tmp_path / "run", "cpu", cache_dir=tmp_path / "cache", images=known).data  # noqa: B018  # a worker's
    assert [one["id"] for one in records.read_all(tmp_path / "run")] == [record["id"]]
    path = tmp_path / "run" / "comparison.json"
    document = json.loads(path.read_text())
    del document["images"]  # as the first versions wrote it
    path.write_text(json.dumps(document))
    assert len(runner.compare(more, tmp_path / "run", **options).records) == 2  # type: ignore[arg-type]


def test_a_sweep_of_other_images_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("filterfold.bench.report.sensitivity.sensitivity_plots", lambda _: [])
    draw(tmp_path / "set")
    save(network(), tmp_path / "dense.safetensors")
    command = ["sensitivity", "vgg_small", "--width", "0.125", "-d", str(tmp_path / "set"), "--ratios", "0.5"]
    command += ["--weights", str(tmp_path / "dense.safetensors"), "--out", str(tmp_path / "run"), "--threads", "1"]
    command += ["--cache-dir", str(tmp_path / "cache")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    draw(tmp_path / "set", shade=9)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "holds another sweep (data_fingerprint is " in " ".join(result.output.split())
