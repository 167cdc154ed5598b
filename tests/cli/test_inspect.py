"""`filterfold inspect`, and what every command has: help, version, refusals in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from filterfold import __version__
from filterfold.cli.app import app

runner = CliRunner()


def test_version() -> None:
    result = runner.invoke(app, ["--version"])
    assert (result.exit_code, result.stdout.strip()) == (0, f"filterfold {__version__}")


@pytest.mark.slow
def test_help_shows_the_commands_and_loads_nothing_heavy() -> None:
    code = "import sys; from filterfold.cli.app import app; sys.stdout.write(' '.join(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "typer" in modules
    assert not {"matplotlib", "sklearn", "datasets", "scipy", "lightning_fabric", "torchvision"} & set(modules)
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "inspect" in result.stdout
    assert "report" in result.stdout


@pytest.mark.parametrize("name", [command.callback.__name__ for command in app.registered_commands if command.callback])
def test_every_command_has_help_with_examples(name: str) -> None:
    result = runner.invoke(app, [name.replace("_", "-"), "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert f"filterfold {name}" in result.stdout.split("Examples:")[1]


def test_inspect_a_network_whose_figures_are_known() -> None:
    result = runner.invoke(app, ["inspect", "resnet20", "--layers"])
    assert result.exit_code == 0
    assert "268,336 of them convolution and linear weights" in result.stdout
    assert "linear is frozen: reaches the model's output" in result.stdout
    assert "layer1.0.conv1" in result.stdout


def test_inspect_as_json() -> None:
    result = runner.invoke(app, ["inspect", "vgg16", "--json"])
    document = json.loads(result.stdout)
    assert (document["macs"], document["weights"]) == (313463808, 14977728)  # Li et al. 2017, Table 1
    sizes = {group["name"]: group["size"] for group in document["groups"] if not group["frozen"]}
    assert sizes["features.0"] == 64
    assert sizes["features.40"] == 512


def test_a_users_own_model(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net(classes):\n"
        "    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.Flatten(), nn.Linear(6 * 36, classes))\n"
    )
    result = runner.invoke(app, ["inspect", f"{tmp_path}/mine.py:net", "--input", "1x8x8", "--classes", "4"])
    assert result.exit_code == 0
    macs, parameters = 6 * 9 * 6 * 6 + 6 * 36 * 4, 6 * 9 + 6 + 6 * 36 * 4 + 4
    assert f"({macs:,})" in result.stdout
    assert f"({parameters:,})" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "vgg17"], "no model 'vgg17'; did you mean vgg16?"),
        (["inspect", "vgg16", "--input", "3x32"], "--input 3x32: give channels x height x width"),
        (["inspect", "nowhere.py:net"], "nowhere.py: no such file"),
        (["report"], "give a run folder or --table FILE"),
        (["report", "nowhere"], "nowhere: no such run folder"),
        (["report", "nowhere", "--column", "top1=x"], "--column says how to read a --table"),
    ],
)
def test_refusals_are_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("filterfold: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
