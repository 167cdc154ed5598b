"""Help: the main options first, two screens at most where it was seven; `--help-all` has every option."""

from __future__ import annotations

import re

import pytest
import typer
from typer.testing import CliRunner

from filterfold.cli.app import app

runner = CliRunner()
NAMES = [command.name for command in app.registered_commands if command.name]


def shown(name: str, option: str, columns: int) -> str:
    result = runner.invoke(app, [name, option], env={"COLUMNS": str(columns)})
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("name", ["train", "compare"])
def test_help_fits_two_screens(name: str) -> None:
    lines = shown(name, "--help", 80).splitlines()
    assert len(lines) <= 2 * 50
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("name", ["train", "compare", "prune"])
def test_the_main_options_come_first(name: str) -> None:
    first = shown(name, "--help", 200).partition("─ Options ─")[2].partition("╰")[0]
    assert {"--model", "--data", "--weights", "--out", "--macs", "--json"} <= set(re.findall(r"--[a-z-]+", first))


@pytest.mark.parametrize("name", NAMES)
def test_help_all_leaves_nothing_out(name: str) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    options = {text for one in command.params for text in (*one.opts, *one.secondary_opts) if text.startswith("--")}
    long = "--help-all" if "--help-all" in options else "--help"
    assert options <= set(re.findall(r"--[a-z0-9-]+", shown(name, long, 200)))


def test_help_all_says_more_and_help_stays_short_after_it() -> None:
    short = shown("compare", "--help", 80)
    long = shown("compare", "--help-all", 200)
    assert "online-centroid (nothing removed)" in " ".join(re.sub("[│\n]", " ", long).split())
    assert shown("compare", "--help", 80) == short
