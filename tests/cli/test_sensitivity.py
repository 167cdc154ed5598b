"""`filterfold sensitivity`: curves, table, JSON; read again; and a recipe that can be run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from filterfold.bench import recipes
from filterfold.bench.report.sensitivity import sensitivity_plots
from filterfold.bench.sensitivity import Sensitivity
from filterfold.cli.app import app
from filterfold.data import load
from filterfold.surgery.checkpoint import save
from filterfold.surgery.weights import load_weights
from filterfold.training import Recipe, evaluate, train
from filterfold.zoo import build

runner = CliRunner()


def run(*command: str, code: int = 0) -> str:
    result = runner.invoke(app, list(command))
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "dense.safetensors"
    torch.manual_seed(0)
    model = build("vgg_small", channels=1, image_size=8, width=0.5)
    train(model, load("digits"), Recipe(epochs=3, lr=0.05, schedule="constant"), validate_every=0)
    save(model, path)
    return path


@pytest.mark.slow
def test_a_sweep_is_drawn_written_read_again_and_becomes_a_recipe(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    command = ["sensitivity", "vgg_small", "-w", str(weights), "-d", "digits", "--width", "0.5", "--threads", "1"]
    command += ["--layers", "features.*", "--criteria", "l1,largest", "--ratios", "0.25,0.5", "--out", str(folder)]
    text = run(*command)
    assert "features.10" in text
    found = Sensitivity.read(folder / "sensitivity.json")
    assert found.criteria == ("l1", "largest")
    model = build("vgg_small", channels=1, image_size=8, width=0.5)
    load_weights(model, weights)
    assert found.base["top1"] == pytest.approx(evaluate(model, load("digits").validation).top1)
    for name in ("sensitivity_l1", "sensitivity_largest", "sensitivity_means"):
        assert (folder / f"{name}.svg").read_text().startswith("<?xml")
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "features.3" in (folder / "sensitivity.csv").read_text()
    before = (folder / "sensitivity.json").read_bytes()
    text = run(*command, "--suggest", "loss=30")
    assert (folder / "sensitivity.json").read_bytes() == before
    recipe = recipes.load(folder / "suggested.toml")
    assert recipe.model == "vgg_small"
    assert recipe.prune
    out = tmp_path / "run"
    more = ["--epochs-scale", "0.01", "--train-limit", "100", "--width", "0.5", "--weights", str(weights)]
    run("recipe", "run", str(folder / "suggested.toml"), *more, "--no-scratch", "--threads", "1", "--out", str(out))
    records = [json.loads(path.read_text()) for path in (out / "records").glob("l1-*.json")]
    assert records[0]["options"]["shares"] == recipe.keep
    assert "holds another sweep (ratios" in run(*command, "--ratios", "0.5", code=2)


def test_plots_name_the_most_sensitive_layers(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    command = ["sensitivity", "vgg_small", "-w", str(weights), "-d", "digits", "--width", "0.5", "--threads", "1"]
    run(*command, "--ratios", "0.5", "--images", "30", "--out", str(folder))
    found = Sensitivity.read(folder / "sensitivity.json")
    [plot] = sensitivity_plots(found)
    assert found.ranked("l1", 0.5)[0][0] in plot.svg


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suggest", "speed=2"], "--suggest speed=2"),
        (["--ratios", "half"], "--ratios half"),
        (["--split", "train"], "--split train"),
        (["--criteria", "l7"], "criterion 'l7' is unknown"),
    ],
)
def test_what_makes_no_sense_is_refused(weights: Path, tmp_path: Path, options: list[str], message: str) -> None:
    command = ["sensitivity", "vgg_small", "-w", str(weights), "-d", "digits", "--width", "0.5", "--threads", "1"]
    assert message in run(*command, *options, "--out", str(tmp_path / "out"), code=2)
    assert not (tmp_path / "out").exists()
