"""`filterfold latency` and the latency budget on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from filterfold.cli.app import app
from filterfold.profiling.macs import measure
from filterfold.pruning.prune import prune
from filterfold.surgery.checkpoint import inspect, save
from filterfold.zoo import build

runner = CliRunner()
TINY = ("--width", "0.125", "--batch", "2", "--images", "0", "--repeats", "3", "--threads", "1")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A pruned VGG-16 on disk."""
    torch.manual_seed(0)
    model = build("vgg16", width=0.125)
    result = prune(model, torch.zeros(1, 3, 32, 32), keep=0.5, verify=False)
    save(model, tmp_path / "small.safetensors", plan=result.plan)
    return tmp_path / "small.safetensors"


def test_a_name_against_a_pruned_file(small: Path) -> None:
    result = runner.invoke(app, ["latency", "vgg16", str(small), "vgg16", *TINY, "--json"])
    assert result.exit_code == 0, result.output
    (comparison,) = json.loads(result.stdout)["comparisons"]
    rows = {row["model"]: row for row in comparison["rows"]}
    assert list(rows) == ["vgg16", "small.safetensors", "vgg16 #2", "A/A control"]
    dense = measure(build("vgg16", width=0.125), torch.zeros(1, 3, 32, 32)).macs
    assert rows["vgg16"]["macs"] == dense
    assert rows["small.safetensors"]["macs_ratio"] == pytest.approx(3.8, abs=0.3)  # both widths of most layers halved
    assert all(row["median"] > 0 and row["repeats"] == 3 for row in rows.values())


def test_the_table_has_the_pass_over_the_test_set(small: Path) -> None:
    command = ["latency", str(small), "--model", "vgg16", "--width", "0.125", "--batch", "1", "--images", "256"]
    result = runner.invoke(app, [*command, "--repeats", "1", "--no-widths", "--threads", "1"])
    assert result.exit_code == 0, result.output
    assert "256 images, s" in result.stdout
    assert "A/A control" in result.stdout
    assert "mode eager" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.safetensors"], "say which network the file holds with --model"),
        (["vgg16", "gone.safetensors"], "gone.safetensors: no such file"),
        (["vgg16", "--mode", "fast", "--no-widths"], "must be one of eager, channels_last, compile, onnxruntime"),
        (["vgg61"], "vgg61"),
        (["vgg16", "--input", "32"], "give channels x height x width"),
    ],
)
def test_refusals(arguments: list[str], message: str) -> None:
    result = runner.invoke(app, ["latency", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_prune_to_a_share_of_the_time_killed_and_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in retraining, the second run must not measure anew: it would cut another network."""
    monkeypatch.setenv("FILTERFOLD_CACHE", str(tmp_path / "cache"))
    weights, out = tmp_path / "dense.safetensors", tmp_path / "fast.safetensors"
    save(_digits(), weights)
    command = [*_prune(weights, out), "--latency", "0.8", "--epochs", "1"]
    trained: list[Any] = []

    def interrupted(model: Any, *_: Any, **__: Any) -> None:
        trained.append([tuple(p.shape) for p in model.parameters()])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("filterfold.training.train", interrupted)
        assert runner.invoke(app, command).exit_code == 130
        note = tmp_path / ".fast.safetensors.unfinished"
        first = json.loads(note.read_text())["plan"]
        assert list((tmp_path / "cache" / "latency").glob("*.json"))
        patch.setattr("filterfold.pruning.budgets.latency.measure_latency", None)
        assert runner.invoke(app, command).exit_code == 130
        assert json.loads(note.read_text())["plan"] == first
    assert trained[0] == trained[1]
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    plan = inspect(out).plans[0]
    assert json.loads(plan.to_json()) == first
    assert not note.exists()
    found = plan.notes["latency"]
    assert (found["asked"], found["batch_size"]) == (0.8, 16)
    assert found["measured"] <= 0.8
    assert f"asked 80.0%, predicted {found['predicted']:.1%}, measured {found['measured']:.1%}" in result.stdout


def _digits() -> torch.nn.Module:
    torch.manual_seed(0)
    return build("vgg_small", classes=10, channels=1, width=0.5, image_size=8)


def _prune(weights: Path, out: Path) -> list[str]:
    model = ["prune", "-m", "vgg_small", "-d", "digits", "--width", "0.5", "-w", str(weights), "--out", str(out)]
    return [*model, "--latency-batch", "16", "--threads", "1", "--no-evaluate"]
