"""What the command line says when something is not there: advice that is right, suggestions that exist."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from filterfold import prune, trace, zoo
from filterfold.bench.recipes import names
from filterfold.cli.app import app
from filterfold.errors import FilterfoldError, ModelError, SelectionError

runner = CliRunner()


def test_torchvision_of_another_pytorch_is_not_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def broken(name: str, *rest: Any) -> Any:
        if name in ("timm", "torchvision.models"):
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *rest)

    monkeypatch.setattr("filterfold.zoo.hub.importlib.import_module", broken)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"torchvision": "0.1", "torch": "9.9"}[name])
    for name in ("timm:resnet18", "torchvision:resnet18"):
        with pytest.raises(ModelError) as error:
            zoo.build(name)
        assert "torchvision 0.1 is of another PyTorch than 9.9" in str(error.value)
        assert "filterfold[zoo]" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnett18", "no model 'resnett18'; did you mean resnet18"),
        ("resnett18.a1_in1k", "no model 'resnett18.a1_in1k'; did you mean resnet18"),
        ("resnet18.a1_in2k", "no weights 'resnet18.a1_in2k'; did you mean resnet18.a1_in1k"),
        ("resnet18.zzz", "no weights 'resnet18.zzz'"),
    ],
)
def test_a_misspelt_name_of_timm(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    known, tagged = ["resnet18", "resnet34", "convnext_tiny"], ["resnet18.a1_in1k", "resnet18.tv_in1k"]
    timm: Any = SimpleNamespace(is_model=lambda wanted: wanted in known)
    timm.list_models = lambda *_, pretrained=False: tagged if pretrained else known
    monkeypatch.setitem(sys.modules, "timm", timm)
    with pytest.raises(ModelError) as error:
        zoo.build(f"timm:{name}")
    assert message in str(error.value)


def test_suggested_groups_are_groups() -> None:
    network, example = zoo.build("resnet20"), torch.zeros(1, 3, 32, 32)
    groups = {group.name for group in trace(network, example) if group.frozen is None}
    for wrong in ("layer1.0.bn9", "layer2.1.conv3", "lineer", "zzz"):
        with pytest.raises(SelectionError) as error:
            prune(network, example, keep={wrong: 0.5})
        suggested = str(error.value).partition("did you mean ")[2].split("'")[1::2]
        assert suggested
        assert set(suggested) <= groups


def test_all_recipes_are_named() -> None:
    result = runner.invoke(app, ["recipe", "show", "resnet56"])
    assert result.exit_code == 2
    assert all(name in result.stderr for name in names())


def test_colours_of_a_foreign_error_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "red.py").write_text('def net():\n    raise ValueError("\\x1b[31mred\\x1b[0m\\x07")\n')
    result = runner.invoke(app, ["inspect", f"{tmp_path}/red.py:net"])
    assert result.exit_code == 2
    assert result.stderr.endswith("ValueError: red\n")
    assert str(FilterfoldError("\x1b[1mbold\x1b[0m")) == "bold"


def test_what_a_factory_is_given_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "def net(num_classes, in_chans, depth=3):\n"
        "    return nn.Sequential(nn.Conv2d(in_chans, 4, 3), nn.Flatten(), nn.Linear(4 * 36, num_classes))\n"
    )
    name = f"{tmp_path}/own.py:net"
    command = ["latency", name, name, "--input", "1x8x8", "--classes", "7", "--batch", "1", "--images", "0"]
    result = runner.invoke(app, [*command, "--repeats", "1", "--no-widths"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "".join(result.stdout.split()).count("own.py:netwasgivennum_classes=7,in_chans=1") == 1


def test_code_that_is_executed_is_said_to_be() -> None:
    said = runner.invoke(app, ["inspect", "--help"], env={"COLUMNS": "200"}).stdout
    assert "which is executed" in said
    assert "executed" in runner.invoke(app, ["inspect", "nonsense"]).stderr


def test_exit_codes_are_documented() -> None:
    said = " ".join(runner.invoke(app, ["--help"], env={"COLUMNS": "200"}).stdout.split())
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    for text in (said, readme.partition("Exit codes:")[2]):
        assert all(code in text for code in ("0", "1", "2", "3", "130"))
        assert "refused" in text
