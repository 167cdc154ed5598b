"""`filterfold inspect`, and what every command has: help, version, refusals in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from filterfold import __version__, prune
from filterfold.cli.app import app
from filterfold.cli.display import console
from filterfold.profiling.macs import measure
from filterfold.zoo import build

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
    assert "268,336 of them weights" in result.stdout
    lines = " ".join(result.stdout.split())
    assert "group 11 can’t be cut: reaches the model's output. Remedy: none is needed" in lines
    assert "group 1 can’t be cut: tied to constant padding by pad in layer2.0.shortcut. Remedy: pad with" in lines
    assert lines.count("layer1.0.conv1") == 2  # once among the groups, once among the layers


@pytest.mark.parametrize("model", ["resnet20", "vgg_small"])
def test_what_half_of_a_group_saves_is_what_cutting_it_saves(model: str) -> None:
    document = json.loads(runner.invoke(app, ["inspect", model, "--json"]).stdout)
    example = torch.zeros(1, 3, 32, 32)
    before = measure(build(model), example)
    for group in [group for group in document["groups"] if not group["frozen"]][:3]:
        network = build(model)
        prune(network, example, keep={group["name"]: 0.5}, verify=False)
        after = measure(network, example)
        saved = {"macs": 1 - after.macs / before.macs, "parameters": 1 - after.parameters / before.parameters}
        assert group["saved_at_half"] == pytest.approx(saved)
    assert sum(layer["macs_share"] for layer in document["layers"]) == pytest.approx(1)
    assert sum(group["macs_share"] for group in document["groups"]) == pytest.approx(1)


def test_eighty_columns_fold_no_name() -> None:
    console.width, before = 80, console.width
    try:
        lines = runner.invoke(app, ["inspect", "resnet56", "--layers"]).stdout.splitlines()
    finally:
        console.width = before
    assert max(map(len, lines)) <= 80
    words = {word for line in lines for word in line.split()}
    names = {name for name, module in build("resnet56").named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert names <= words


def test_the_drawing_shows_who_makes_and_who_reads(tmp_path: Path) -> None:
    path = tmp_path / "coupling.svg"
    document = json.loads(runner.invoke(app, ["inspect", "resnet20", "--svg", str(path), "--json"]).stdout)
    found = ElementTree.parse(path).getroot()
    shapes = {kind: list(found.iter(f"{{http://www.w3.org/2000/svg}}{kind}")) for kind in ("circle", "path", "text")}
    weights = {layer["tensor"] for layer in document["layers"]}
    places = [
        {part["tensor"] for part in (*group["producers"], *group["consumers"])} & weights
        for group in document["groups"]
    ]
    assert len(shapes["path"]) == len(document["groups"])
    assert len(shapes["circle"]) == sum(map(len, places))
    assert {layer["name"] for layer in document["layers"]} <= {text.text for text in shapes["text"]}
    assert sum("stroke-dasharray" in lane.attrib for lane in shapes["path"]) == 2  # the shortcut's group, the classes


def test_a_reason_and_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(
        "from torch import nn\n"
        "class Odd(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 2, 3)\n"
        "    def forward(self, x):\n"
        "        return self.b(self.a(x)[:, [0, 2, 4, 6]])\n"
    )
    document = json.loads(runner.invoke(app, ["inspect", f"{tmp_path}/odd.py:Odd", "--json"]).stdout)
    frozen = {group["name"]: group for group in document["groups"]}
    assert "picked by position" in frozen["a"]["frozen"]
    assert frozen["a"]["remedy"].startswith("index by names or whole axes")
    assert frozen["a"]["saved_at_half"] is None


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
    assert f"in full: {macs:,} MACs, {parameters:,} parameters" in result.stdout


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
