"""Timing is the last step: it can be left out and interrupted; and nothing is loaded that nobody needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from filterfold import load
from filterfold.bench.trials import timing
from filterfold.cli import prune as pruning
from filterfold.cli.app import app
from filterfold.profiling.macs import measure
from filterfold.surgery.checkpoint import save
from filterfold.zoo import build

pytestmark = pytest.mark.usefixtures("no_plots")
runner = CliRunner()
SMALL = ["--model", "vgg_small", "--width", "0.125"]
TRAIN = ["train", *SMALL, "--data", "digits", "--train-limit", "100", "--epochs", "1"]


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def unwanted(*_: Any, **__: Any) -> None:
    raise AssertionError("not asked for")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save(build("vgg_small", width=0.125, channels=1, image_size=8), tmp_path / "dense.safetensors")
    return tmp_path / "dense.safetensors"


def test_training_without_timing_times_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(timing, "inference_seconds", unwanted)
    monkeypatch.setattr(timing, "wasted_widths", unwanted)
    result = runner.invoke(app, [*TRAIN, "--no-timing", "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert "not timed" in result.stdout
    [record] = (tmp_path / "run" / "records").glob("*.json")
    assert json.loads(record.read_text())["result"]["inference_seconds"] is None


def test_ctrl_c_in_the_timing_leaves_a_whole_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = [*TRAIN, "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr("filterfold.bench.trials.runner.measure_together", interrupted)
        result = runner.invoke(app, command)
    assert result.exit_code == 3
    assert "timing was interrupted" in result.stdout
    assert "top-1 (test)" in result.stdout
    network = (tmp_path / "run" / "model.safetensors").read_bytes()
    monkeypatch.setattr("filterfold.bench.trials.runner.run_trial", unwanted)
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == network


def test_training_times_the_test_set_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Batch sizes are for comparisons, and take longer than such a training."""
    monkeypatch.setattr(timing, "wasted_widths", unwanted)
    assert runner.invoke(app, [*TRAIN, "--out", str(tmp_path / "run")]).exit_code == 0
    [record] = (tmp_path / "run" / "records").glob("*.json")
    assert json.loads(record.read_text())["timing"]["batches"] == {}


def _prune(weights: Path, out: Path, *more: str) -> list[str]:
    return ["prune", *SMALL, "--weights", str(weights), "--keep", "0.5", "--out", str(out), *more]


def test_pruning_reads_no_images_where_none_are_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: Path
) -> None:
    monkeypatch.setattr("filterfold.data.load", unwanted)
    out = tmp_path / "cut.safetensors"
    command = _prune(weights, out, "--no-evaluate", "--input", "1x8x8", "--no-timing", "--json")
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    network = load(out, lambda: build("vgg_small", width=0.125, channels=1, image_size=8))
    assert document["after"]["macs"] == measure(network, torch.zeros(1, 1, 8, 8)).macs < document["before"]["macs"]
    assert document["latency"] == {}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--no-evaluate", "--criterion", "taylor"], "--criterion taylor needs images; give --data"),
        (["--no-evaluate", "--repair"], "--repair needs images"),
        (["--no-evaluate", "--epochs", "1"], "--epochs needs images"),
        ([], "evaluation needs images; add --no-evaluate"),
        (["--no-evaluate", "--data", "digits"], "options of the images have no effect with --input"),
    ],
)
def test_what_needs_images_is_named(tmp_path: Path, weights: Path, more: list[str], message: str) -> None:
    result = runner.invoke(app, _prune(weights, tmp_path / "cut.safetensors", "--input", "1x8x8", *more))
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "cut.safetensors").exists()


def test_a_number_of_classes_is_for_networks_without_images(tmp_path: Path, weights: Path) -> None:
    result = runner.invoke(app, _prune(weights, tmp_path / "cut.safetensors", "--data", "digits", "--classes", "7"))
    assert result.exit_code == 2
    assert "--classes has no effect without --input" in result.stderr


def test_ctrl_c_in_the_timing_leaves_the_pruned_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: Path
) -> None:
    monkeypatch.setattr("filterfold.profiling.measure_latency", interrupted)
    out = tmp_path / "cut.safetensors"
    result = runner.invoke(app, _prune(weights, out, "--no-evaluate", "--input", "1x8x8"))
    assert result.exit_code == 0, result.output
    assert "timing was interrupted; the network is written" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.safetensors", "dense.safetensors"]


def test_what_would_take_long_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: Path) -> None:
    monkeypatch.setattr(pruning, "AFFORDED", 0.0)
    command = _prune(weights, tmp_path / "cut.safetensors", "--no-evaluate", "--input", "1x8x8")
    result = runner.invoke(app, command)
    assert "latency, batch 1 " in result.stdout
    assert "batch 64 is not timed" in result.stdout
