"""The plans of `benchmarks/`, whole, at a tiny size.

Their commands run in this process: a program that only passes its arguments on takes the command line's place.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from filterfold.bench.trials.records import read_all
from filterfold.cli.app import app

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_plots")]

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
STAND_IN = """
import json, socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as link:
    link.sendall(json.dumps(sys.argv[2:]).encode() + b"\\n")
    sys.exit(int(link.makefile().readline()))
"""


def plan(name: str, option: str, folder: Path, piece: str) -> int:
    """Run a plan; its exit code."""
    stand_in = folder.with_name("stand_in.py")
    stand_in.write_text(STAND_IN)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        filterfold = f"{sys.executable} -S {stand_in} {server.getsockname()[1]}"
        command = ["bash", str(BENCHMARKS / f"{name}_plan.sh"), "--tiny", option, "--out", str(folder)]
        with subprocess.Popen(command, env=os.environ | {"FILTERFOLD": filterfold, "PIECE": piece}) as process:
            while process.poll() is None:
                try:
                    link, _ = server.accept()
                except TimeoutError:
                    continue
                with link, link.makefile("rw") as file:
                    file.write(f"{CliRunner().invoke(app, json.loads(file.readline())).exit_code}\n")
    return process.returncode


def test_the_documents_experiment(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert plan("gpu", "--once", folder, piece="0.1s") == 3  # one piece, and something is left
    assert plan("gpu", "--tiny", folder, piece="9m") == 0
    labels = sorted(record["label"] for record in read_all(folder))
    assert labels == sorted(["dense", "l1", "online k=2", "online k=4"] * 2)
    assert (folder / "report.html").exists()
    assert json.loads((folder / "comparison.json").read_text())["setting"]["data"] == "digits"


def test_the_headline(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert plan("headline", "--tiny", folder, piece="9m") == 0
    labels = sorted(record["label"] for record in read_all(folder / "vgg16"))
    cut = [f"{name} keep=0.35" for name in ("online", "online-l1", "scratch", "scratch-long")]
    assert labels == sorted(["dense", "online keep=0.7", *cut])
    macs = {record["method"]: record["result"]["macs"] for record in read_all(folder / "resnet56")}
    assert set(macs) == {"dense", "online", "online-l1", "scratch", "scratch-long"}
    assert max(count for method, count in macs.items() if method != "dense") <= 0.4 * macs["dense"]


def test_table_1(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert plan("li2017", "--once", folder, piece="0.1s") == 3
    assert plan("li2017", "--tiny", folder, piece="9m") == 0
    records = read_all(folder / "resnet56-b")
    assert sorted(record["method"] for record in records) == ["dense", "l1", "scratch"]
    assert "ResNet-56-pruned-B scratch" in (folder / "resnet56-b" / "paper_table.md").read_text()
