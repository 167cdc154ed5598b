"""A command that is killed at any file operation: the same command then ends with the same files."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import ENOSPC
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from filterfold.cli.app import app
from filterfold.surgery.checkpoint import save
from filterfold.utils.io import read_safetensors, write_text
from filterfold.zoo import build

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_plots", "quick")]

NETWORK = ["--data", "digits", "--width", "0.125", "--train-limit", "100", "--threads", "1"]
TRAINED = ["--model", "vgg_small", "--epochs", "1", *NETWORK]
BEGUN = ["--model", "vgg_small", "--weights", "DENSE"]
UNTIMED = ["--latency-batches", "none", "--out", "RUN"]
COMMANDS = {
    "train": ["train", *TRAINED, "--method", "l1", "--keep", "0.5", "--retrain-epochs", "1", "--out", "RUN"],
    "train online": ["train", *TRAINED, "--method", "online", "--keep", "0.5", "--epochs", "2", "--out", "RUN"],
    "compare": ["compare", *TRAINED, "--methods", "dense,scratch", "--keep", "0.5", "--trials", "1", *UNTIMED],
    "demo": ["demo", "--epochs", "1", "--trials", "1", *UNTIMED],
    "recipe run": ["recipe", "run", "MINI", "--train-limit", "100", "--threads", "1", *UNTIMED],
    "prune": ["prune", *BEGUN, *NETWORK, "--keep", "0.5", "--epochs", "1", "--out", "RUN/a.st", "--onnx", "RUN/a.onnx"],
    "sensitivity": [
        *("sensitivity", "vgg_small", "--weights", "DENSE", *NETWORK, "--ratios", "0.5", "--images", "40"),
        *("--suggest", "loss=50", "--out", "RUN"),
    ],
}
STEPS = {"demo": 8, "recipe run": 5, "compare": 3, "train online": 3}
"""Of the states that these leave when they are killed, every how many-th is gone on from. They share their storage with
the others, and take longer."""

MINI = """
name = "mini"
title = "Mini-pruned-A"
model = "vgg_small"
data = "digits"
[[prune]]
layers = ["features.*"]
ratio = 0.5
[base]
epochs = 1
lr = 0.05
schedule = "constant"
[retrain.paper]
epochs = 1
lr = 0.001
schedule = "constant"
[scratch]
[paper]
dense = { error = 6.75, macs = "1.51e6", weights = "8.18e4" }
pruned = { error = 6.60, macs = "5.43e5", weights = "2.76e4", macs_removed = 64.0, weights_removed = 66.3 }
scratch = { error = 6.88 }
"""

Files = dict[str, bytes]
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod"}
Tell = Callable[[str], None]
_listening: list[Tell] = []


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    """Tell of what changes files, just before it does. An audit hook stays for good, so there is only this one."""
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if _listening and (event in CHANGES or writes):
        _listening[-1](str(arguments[0]))


sys.addaudithook(_heard)


@contextmanager
def before_every_operation(tell: Tell) -> Iterator[None]:
    """`tell` is given the path."""
    _listening.append(tell)
    try:
        yield
    finally:
        _listening.pop()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time for what only measures, draws or exports: it writes its files all the same."""
    monkeypatch.setattr("filterfold.bench.trials.timing.inference_seconds", lambda *_, **__: 0.01)
    monkeypatch.setattr("filterfold.bench.trials.timing.wasted_widths", lambda *_: [])
    monkeypatch.setattr("filterfold.bench.report.sensitivity.sensitivity_plots", lambda _: [])
    monkeypatch.setattr("filterfold.export.program.to_onnx", lambda *arguments: write_text(arguments[2], "onnx"))
    profiling, found = import_module("filterfold.profiling"), {}
    measure = profiling.measure_latency

    def once(*arguments: Any, **options: Any) -> Any:
        sizes = tuple(options.get("batch_sizes", ()))
        found[sizes] = found.get(sizes) or measure(*arguments, **options)
        return found[sizes]

    monkeypatch.setattr(profiling, "measure_latency", once)


def contents(folder: Path) -> Files:
    """All files of a folder; directories end with a slash."""
    paths = sorted(folder.rglob("*"))
    return {f"{path.relative_to(folder)}{'/' * path.is_dir()}": b"" if path.is_dir() else _read(path) for path in paths}


def _read(path: Path) -> bytes:
    _listening.append(lambda _: None)
    try:
        return path.read_bytes()
    finally:
        _listening.pop()


def restore(folder: Path, files: Files) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).mkdir(parents=True) if name.endswith("/") else (folder / name).write_bytes(content)


def essence(folder: Path) -> dict[str, Any]:
    """What of a finished run must not depend on when and how often it was interrupted."""
    found: dict[str, Any] = {}
    for name, content in contents(folder).items():
        if name.endswith("/") or ".lock" in name:
            continue
        found[name] = None
        if name.endswith(".json"):
            found[name] = _timeless(json.loads(content))
        elif name.endswith((".safetensors", ".st")):
            tensors = read_safetensors(folder / name)[1]
            found[name] = {key: tensor.flatten().tolist() for key, tensor in tensors.items()}
    return found


TIMES = {"seconds", "cpu_seconds", "train_seconds", "inference_seconds", "started", "finished", "timing", "environment"}


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in TIMES}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(params=COMMANDS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[list[str], int]:
    """A command, and which of its states to go on from."""
    return prepared(request.param, tmp_path), STEPS.get(request.param, 1)


def prepared(name: str, folder: Path) -> list[str]:
    places = {"RUN": folder / "run", "DENSE": folder / "dense.safetensors", "MINI": folder / "mini.toml"}
    torch.manual_seed(0)
    save(build("vgg_small", channels=1, image_size=8, width=0.125), places["DENSE"])
    places["MINI"].write_text(MINI)
    return [str(places.get(part, part)).replace("RUN", str(folder / "run")) for part in COMMANDS[name]]


def run(command: list[str], code: int = 0) -> None:
    result = CliRunner().invoke(app, command)
    assert result.exit_code == code, (result.output, result.exception)


def test_another_seed_does_not_block_a_killed_run(tmp_path: Path) -> None:
    command, folder = prepared("train online", tmp_path), tmp_path / "run"
    states: list[Files] = []
    with before_every_operation(lambda _: states.append(contents(folder) if folder.exists() else {})):
        run(command)
    whole = essence(folder)
    begun = [files for files in states if "comparison.json" in files]
    for files in (begun[0], begun[len(begun) // 2], begun[-1]):
        restore(folder, files)
        result = CliRunner().invoke(app, [*command, "--seed", "1"])
        assert result.exit_code == 2
        assert "holds another run (online, seed 0); give another --out" in " ".join(result.output.split())
        assert contents(folder) == files
        run(command)
        assert essence(folder) == whole
    run([*command, "--seed", "1", "--overwrite"])
    assert [json.loads(path.read_text())["seed"] for path in folder.glob("records/*.json")] == [1]


def test_killed_at_any_file_operation(case: tuple[list[str], int], tmp_path: Path) -> None:
    command, step = case
    folder, states = tmp_path / "run", dict[int, Files]()

    def keep(_: str) -> None:
        here = contents(folder) if folder.exists() else {}
        told = {name: content for name, content in here.items() if "tables/" not in name and "report" not in name}
        states.setdefault(hash(tuple(told.items())), here)

    with before_every_operation(keep):
        run(command)
    whole, count = essence(folder), len(states)
    assert count > 5
    wrong = {}
    for number, files in list(enumerate(states.values()))[::step]:
        restore(folder, files)
        result = CliRunner().invoke(app, command)
        if result.exit_code or essence(folder) != whole:
            wrong[number] = (sorted(files), result.output, sorted(essence(folder)))
    assert not wrong, f"{len(wrong)} of {count}: {next(iter(wrong.items()))}"


FULL = OSError(ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(FULL, 2, "can't be written (No space left"), (KeyboardInterrupt(), 130, "interrupted; ")],
    ids=["full disk", "Ctrl-C"],
)
@pytest.mark.parametrize("name", ["train online", "prune", "sensitivity"])
def test_an_error_at_any_write_is_one_line(
    name: str, error: BaseException, code: int, said: str, tmp_path: Path
) -> None:
    command, folder = prepared(name, tmp_path), tmp_path / "run"
    writes: list[str] = []

    def write(path: str) -> None:
        if Path(path).name.startswith(".") and path.endswith(".part"):  # all files are written under such names
            writes.append(path)
            if len(writes) == last:
                raise error

    last = 0
    with before_every_operation(write):
        run(command)
    whole, count = essence(folder), len(writes)
    assert count > 5
    for last in range(1, count + 1, 5):
        shutil.rmtree(folder)
        writes.clear()
        with before_every_operation(write):
            result = CliRunner().invoke(app, command)
        printed = " ".join(result.output.split())
        if "timing was interrupted" in printed:  # the last step, which alone is left out
            assert result.exit_code == 3
            assert code == 130
        else:
            assert result.exit_code == code, (last, result.output, result.exception)
            assert said in printed
        assert "Traceback" not in result.output
        run(command)
        assert essence(folder) == whole, last
