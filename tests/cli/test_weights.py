"""Weights and the images that suit them, from the command line: trained from, evaluated, and told about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from typer.testing import CliRunner

from filterfold.bench.trials.context import RunContext
from filterfold.bench.trials.records import read_all
from filterfold.bench.trials.setting import Setting
from filterfold.cli.app import app
from filterfold.cli.options import DataOptions
from filterfold.cli.weights import StartOptions
from filterfold.surgery.checkpoint import inspect
from filterfold.zoo import build

runner = CliRunner()

DIGITS = ["--model", "vgg_small", "--data", "digits", "--width", "0.25", "--threads", "1"]

TRAINED = [*DIGITS, "--epochs", "1", "--train-limit", "100"]


def run(*command: str, code: int = 0) -> str:
    result = runner.invoke(app, list(command))
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout if code == 0 else result.stderr


def written(path: Path, classes: int = 10) -> str:
    torch.manual_seed(0)
    model = build("vgg_small", classes=classes, channels=1, width=0.25, image_size=8)
    torch.save({"model": {f"module.{name}": value for name, value in model.state_dict().items()}}, path)
    return str(path)


def test_training_says_what_it_begins_with_and_refuses_another_classifier(tmp_path: Path) -> None:
    weights, out = written(tmp_path / "w.pt", 7), str(tmp_path / "run")
    error = run("train", *TRAINED, "--weights", weights, "--out", out, code=2)
    assert error.startswith("filterfold: ")
    assert error.count("\n") == 1
    assert "classifier.3 has 7 outputs there, 10 here" in error
    assert "--new-head" in error
    assert not (tmp_path / "run").exists()
    text = run("train", *TRAINED, "--weights", weights, "--new-head", "--out", out)
    told = "taken from 'model'; 'module.' taken off the names; classifier.3 is new: 10 outputs instead of 7)"
    assert told in text
    [record] = read_all(tmp_path / "run")
    assert record["options"]["weights"] == weights
    assert record["options"]["start"]["new_head"]


@pytest.mark.slow
def test_training_from_weights_cuts_at_once_and_for_as_many_epochs_as_the_cut_pays_for(tmp_path: Path) -> None:
    weights, out = written(tmp_path / "w.pt", 7), tmp_path / "run"
    method = ["--method", "online-l1+longer", "--macs", "0.25", "--epochs", "2", "--train-limit", "400"]
    run("train", *TRAINED, *method, "--weights", weights, "--new-head", "--out", str(out))
    [record] = read_all(out)
    assert record["options"]["online"]["schedule"] == "0"
    images, dense = record["result"]["train_images"] / len(record["history"]), record["dense"]["macs"]
    cost, one_more = record["result"]["train_macs"] / (3 * images * dense), record["result"]["macs"] / dense
    assert len(record["history"]) >= 6
    assert one_more <= 0.25
    assert 2 - one_more < cost <= 2


def test_another_normalization_is_noted_and_taken_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run("train", *TRAINED, "--mean", "0.1", "--std", "0.9", "--out", str(out))
    [record] = read_all(out)
    assert record["result"] is not None
    assert record["options"]["data_options"]["normalization"] == [[0.1], [0.9]]
    top1, model = f"{record['result']['top1']:.2f} %", str(out / "model.safetensors")
    assert inspect(model).metadata["input"] == {"mean": [0.1], "std": [0.9]}
    assert top1 in run("evaluate", *DIGITS, "-w", model)
    assert top1 not in run("evaluate", *DIGITS, "-w", model, "--normalization", "dataset")
    small = str(tmp_path / "small.safetensors")
    run("prune", *DIGITS, "-w", model, "--keep", "0.5", "--no-evaluate", "--out", small)
    assert inspect(small).metadata["input"] == {"mean": [0.1], "std": [0.9]}
    assert len(inspect(small).metadata["weights"]) == 16


def test_a_sweep_of_other_weights_is_not_taken_for_one_of_these(tmp_path: Path) -> None:
    weights = tmp_path / "w.pt"
    written(weights)
    command = ["sensitivity", "vgg_small", *DIGITS[2:], "-w", str(weights), "--ratios", "0.5", "--images", "20"]
    run(*command, "--out", str(tmp_path / "sweep"))
    state = torch.load(weights, weights_only=True)
    state["model"]["module.features.0.weight"] += 1
    torch.save(state, weights)
    error = run(*command, "--out", str(tmp_path / "sweep"), code=2)
    assert "holds another sweep (fingerprint is" in error


@pytest.mark.slow
def test_a_comparison_begins_with_a_file(tmp_path: Path) -> None:
    weights, out = written(tmp_path / "w.pt"), tmp_path / "run"
    methods = ["--methods", "dense,online,scratch", "--keep", "0.5", "--trials", "1", "--latency-batches", "none"]
    text = run("compare", *TRAINED, *methods, "--weights", weights, "--out", str(out))
    assert text.count("begins with") == 1
    setting = json.loads((out / "comparison.json").read_text())["setting"]
    assert (setting["weights"], setting["start"]["tune"]) == (weights, True)


class Tiny(nn.Module):
    """What a faked hub has: a classifier of 1,000 classes."""

    def __init__(self, num_classes: int = 1000, in_chans: int = 3, **_: Any) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(in_chans, 8, 3), nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv(images).relu()
        out: Tensor = self.fc(features.mean((2, 3)))
        return out


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")

    def create_model(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        assert name == "resnet10t"
        torch.manual_seed(1 if pretrained else int(torch.initial_seed()))
        return Tiny(**options)

    config = timm.get_pretrained_cfg("resnet10t")
    config.input_size = (3, 24, 24)
    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda _: config)


@pytest.fixture
def photos(tmp_path: Path) -> str:
    from PIL import Image

    for split in ("train", "test"):
        for shade, kind in ((60, "cat"), (200, "dog")):
            (tmp_path / "photos" / split / kind).mkdir(parents=True)
            for number in range(6):
                Image.new("L", (40 + number, 40), shade + number).save(
                    tmp_path / "photos" / split / kind / f"{number}.png"
                )
    return str(tmp_path / "photos")


@pytest.mark.slow
@pytest.mark.usefixtures("hub")
def test_pretrained_networks_get_the_images_that_they_expect(photos: str, tmp_path: Path) -> None:
    common = ["--model", "timm:resnet10t", "--data", photos, "--threads", "1", "--cache-dir", str(tmp_path / "cache")]
    train = ["train", *common, "--pretrained", "--epochs", "1", "--batch-size", "4", "--validation", "0"]
    error = run(*train, "--out", str(tmp_path / "run"), code=2)
    assert "timm:resnet10t, pretrained fits but for the classifier: fc has 1000 outputs there, 2 here" in error
    text = run(*train, "--new-head", "--out", str(tmp_path / "run"))
    assert "begins with timm:resnet10t, pretrained (fingerprint " in text
    assert "images: 3x24x24, mean 0.485 0.456 0.406, deviation 0.229 0.224 0.225" in text
    [record] = read_all(tmp_path / "run")
    assert record["options"]["data_options"]["image_size"] == 24  # grey pictures of other sizes
    assert record["result"] is not None
    evaluated = run("evaluate", *common, "-w", str(tmp_path / "run" / "model.safetensors"))
    assert f"{record['result']['top1']:.2f} %" in evaluated
    macs = next(line for line in evaluated.splitlines() if "MACs" in line)
    assert f"{record['result']['macs'] / 1e3:.4g} k" in macs
    run(*train, "--new-head", "--image-size", "32", "--normalization", "dataset", "--out", str(tmp_path / "own"))
    [record] = read_all(tmp_path / "own")
    assert record["options"]["data_options"]["image_size"] == 32
    assert record["options"]["data_options"]["normalization"] == "dataset"


def test_weights_of_a_hub_s_network_from_a_file(shared: Path, photos: str, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    name, weights = "timm:tf_efficientnet_lite0", shared / "weights" / "tf_efficientnet_lite0-imagenet.safetensors"
    asked = DataOptions(photos, image_size=32, channels=3, validation="0")
    start, images = StartOptions(weights, new_head=True).settle(name, asked)
    setting = Setting(name, photos, data_options=images.keywords(), weights=start.weights, start=start.entries)
    context = RunContext(setting, tmp_path, "cpu", cache_dir=tmp_path)
    told = context.told() or ""
    assert "classifier is new: 2 outputs instead of 1000" in told
    assert "images: 3x32x32, mean 0.5 0.5 0.5, deviation 0.5 0.5 0.5" in told
    with safe_open(weights, framework="pt") as file:
        assert torch.equal(context.build().state_dict()["conv_stem.weight"], file.get_tensor("conv_stem.weight"))
