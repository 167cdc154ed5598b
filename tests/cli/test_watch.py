"""`filterfold watch` says what the files of a run say, and leaves them alone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from filterfold.bench.trials.records import read_all
from filterfold.cli.app import app

COMMAND = ["compare", "--model", "vgg_small", "--data", "digits", "--width", "0.25", "--train-limit", "400"]
COMMAND += ["--epochs", "12", "--methods", "dense,online", "--keep", "0.5", "--trials", "1", "--threads", "1"]
COMMAND += ["--latency-batches", "none"]


def look(folder: Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["watch", str(folder), "--once"])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.usefixtures("no_plots")
def test_a_run_from_waiting_to_finished(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "filterfold", *COMMAND, "--out", str(folder)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while not list(folder.glob("work/dense*/*.safetensors")):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)  # so that it stands still while it is looked at
        text = look(folder)
        assert "0 of 2 trials finished, 1 running" in text
        assert re.search(
            r"^ *dense\s+0\s+running\s+train \d+/12\s+\d\.\d{3}\s+\d+\.\d\d\s+[\d.]+ k\s+[\d.]+", text, re.M
        )
        assert re.search(r"^ *online keep=0.5\s+0\s+waiting", text, re.M)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert "0 of 2 trials finished, 1 interrupted" in look(folder)
    done = CliRunner().invoke(app, [*COMMAND, "--out", str(folder)])
    assert done.exit_code == 0, done.output
    before = contents(folder)
    text = look(folder)
    assert "2 of 2 trials finished" in text
    for record in read_all(folder):
        assert record["result"] is not None
        assert re.search(rf"^ *{record['label']}\s+0\s+finished\s+train 12.*{record['result']['top1']:.2f}", text, re.M)
    assert contents(folder) == before


def test_refusals(tmp_path: Path) -> None:
    assert "no comparison there" in look(tmp_path, code=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
@pytest.mark.slow
@pytest.mark.usefixtures("no_plots")
def test_live_on_a_terminal_until_all_is_done(tmp_path: Path) -> None:
    short = [part if part != "12" else "1" for part in COMMAND]
    done = CliRunner().invoke(app, [*short, "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    ours, theirs = os.openpty()
    process = subprocess.run(
        [sys.executable, "-m", "filterfold", "watch", str(tmp_path / "run"), "--every", "0.1"],
        stdout=theirs, stderr=theirs, stdin=theirs, timeout=100, check=False, env=os.environ | {"TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    said = os.read(ours, 100_000).decode()
    os.close(ours)
    assert process.returncode == 0
    assert "2 of 2 trials finished" in said
