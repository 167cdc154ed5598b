"""`--json`: every command that reports figures prints a document, and nothing else, to standard output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from filterfold.cli.app import app
from filterfold.cli.figures import as_text
from filterfold.surgery.checkpoint import save
from filterfold.zoo import build

pytestmark = [pytest.mark.usefixtures("no_plots")]
runner = CliRunner()
DATA = ["--data", "digits", "--width", "0.125", "--train-limit", "100", "--threads", "1"]
TRAINED = ["--model", "vgg_small", "--epochs", "1", *DATA]
COMMANDS = {
    "train": [*TRAINED, "--out", "OUT"],
    "compare": [*TRAINED, "--methods", "dense", "--trials", "2", "--latency-batches", "none", "--out", "OUT"],
    "evaluate": ["--model", "vgg_small", "--weights", "WEIGHTS", "--data", "digits", "--width", "0.125"],
    "prune": ["--model", "vgg_small", "--weights", "WEIGHTS", *DATA, "--keep", "0.5", "--out", "OUT"],
    "shrink": ["vgg_small", "--weights", "WEIGHTS", *DATA, "--macs", "0.5", "--images", "64", "--out", "OUT"],
    "sensitivity": ["vgg_small", "--weights", "WEIGHTS", *DATA, "--ratios", "0.5", "--images", "40", "--out", "OUT"],
    "latency": ["vgg_small", "--batch", "1", "--images", "0", "--repeats", "1", "--no-widths"],
    "inspect": ["vgg_small"],
    "report": ["--table", "TABLE", "--out", "OUT"],
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "dense.safetensors"
    torch.manual_seed(0)
    save(build("vgg_small", width=0.125, channels=1, image_size=8), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_document_and_nothing_else(command: str, tmp_path: Path, weights: Path, reference: Path) -> None:
    names = {"OUT": tmp_path / "out", "WEIGHTS": weights, "TABLE": reference / "figures_4_5.csv"}
    arguments = [str(names.get(word, word)) for word in COMMANDS[command]]
    result = runner.invoke(app, [command, *arguments, "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout, parse_constant=pytest.fail)
    assert "command" in document
    assert len(set(_figures(document))) > 3


def _figures(value: Any) -> list[float]:
    """All numbers in a document."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [figure for entry in value for figure in _figures(entry)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_every_command_that_shows_figures_has_it() -> None:
    """All but `watch`, which looks at a run that goes on."""
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.callback.__name__.rstrip("_")
        said = runner.invoke(app, [name, "--help"], env={"COLUMNS": "200"}).stdout
        assert ("--json" in said) == (name != "watch"), name


def test_what_json_does_not_know() -> None:
    document = json.loads(
        as_text({"a": float("inf"), "b": Path("c"), "d": (1, {"e": None})}), parse_constant=pytest.fail
    )
    assert {name: document[name] for name in "abd"} == {"a": None, "b": "c", "d": [1, {"e": None}]}
