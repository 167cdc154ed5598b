"""Launching: what has a record is not run again, failures stop nobody, time ends a run, folders are respected."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from filterfold.bench.trials import records, runner
from filterfold.bench.trials.config import Comparison, Trial
from filterfold.bench.trials.context import RunContext, Stopped, resolve
from filterfold.bench.trials.setting import Setting
from filterfold.errors import DataError, ModelError, RecordError

SETTING = Setting("vgg_small", "digits", recipe={"epochs": 1})
COMPARISON = Comparison.of(SETTING, ["dense", "l1"], seeds=range(2))


class Lab:
    """Stands in for training: notes which trials run, and fails or stops where told."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.timed: list[list[str]] = []
        self.fails: dict[str, Exception] = {}

    def run_trial(self, trial: Trial, bench: RunContext, *, command: str | None) -> records.Record:
        name = f"{trial.label}/{trial.seed}"
        if name in self.fails:
            raise self.fails[name]
        self.ran.append(name)
        empty = runner.failure(trial, Exception(), "cpu", command, "2024-01-01T00:00:00+00:00")
        result: records.Result = {
            "top1": 90.0, "top5": 99.0, "inference_seconds": 1.0, "macs": 1, "parameters": 1, "weights": 1,
            "train_seconds": 1.0, "best_top1": None, "widths": {},
        }  # fmt: skip
        return {**empty, "status": "finished", "reason": None, "result": result}

    def measure_together(self, finished: list[records.Record], bench: RunContext, *_: Any) -> None:
        self.timed.append([record["id"] for record in finished])


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    lab = Lab()
    monkeypatch.setattr(runner, "run_trial", lab.run_trial)
    monkeypatch.setattr(runner, "measure_together", lab.measure_together)
    return lab


def test_each_trial_runs_once(tmp_path: Path, lab: Lab) -> None:
    first = runner.compare(COMPARISON, tmp_path / "run")
    assert lab.ran == ["dense/0", "l1/0", "dense/1", "l1/1"]
    assert first.complete
    assert len(lab.timed[0]) == 4
    again = runner.compare(COMPARISON, tmp_path / "run")
    assert lab.ran == ["dense/0", "l1/0", "dense/1", "l1/1"]
    assert again.records == first.records
    assert again.ran == ()
    more = runner.compare(Comparison.of(SETTING, ["dense", "l1"], seeds=range(3)), tmp_path / "run")
    assert lab.ran[4:] == ["dense/2", "l1/2"]
    assert len(more.records) == 6
    fresh = runner.compare(COMPARISON, tmp_path / "run", fresh=True)
    assert len(fresh.ran) == 4
    assert len(records.read_all(tmp_path / "run")) == 4


def test_a_failed_trial_says_why_stops_nobody_and_is_tried_again(tmp_path: Path, lab: Lab) -> None:
    lab.fails = {"l1/0": ModelError("no such layer"), "dense/1": ZeroDivisionError("division by zero")}
    outcome = runner.compare(COMPARISON, tmp_path / "run", command="filterfold compare …")
    assert lab.ran == ["dense/0", "l1/1"]
    assert (outcome.left, outcome.complete) == (2, False)
    reasons = {record["label"]: record for record in outcome.failed}
    assert reasons["l1"]["reason"] == "no such layer"
    assert "traceback" not in reasons["l1"]["environment"]
    assert reasons["dense"]["reason"] == "ZeroDivisionError: division by zero"
    assert "ZeroDivisionError" in reasons["dense"]["environment"]["traceback"]
    assert {record["command"] for record in outcome.records} == {"filterfold compare …"}
    lab.fails = {}
    assert runner.compare(COMPARISON, tmp_path / "run").complete
    assert lab.ran == ["dense/0", "l1/1", "l1/0", "dense/1"]


def test_stopping_in_time_keeps_what_is_finished(tmp_path: Path, lab: Lab) -> None:
    lab.fails = {"dense/1": Stopped()}
    outcome = runner.compare(COMPARISON, tmp_path / "run")
    assert (lab.ran, outcome.left, outcome.timed) == (["dense/0", "l1/0"], 2, False)
    assert outcome.failed == ()
    lab.fails = {}
    assert runner.compare(COMPARISON, tmp_path / "run").complete
    assert lab.ran == ["dense/0", "l1/0", "dense/1", "l1/1"]


def test_no_time_means_no_trial(tmp_path: Path, lab: Lab) -> None:
    outcome = runner.compare(COMPARISON, tmp_path / "run", stop_after=1e-9)
    assert (lab.ran, outcome.left) == ([], 4)


def test_ctrl_c_passes(tmp_path: Path, lab: Lab) -> None:
    lab.fails = {"l1/0": KeyboardInterrupt()}  # type: ignore[dict-item]
    with pytest.raises(KeyboardInterrupt):
        runner.compare(COMPARISON, tmp_path / "run")
    lab.fails = {}
    assert runner.compare(COMPARISON, tmp_path / "run").complete
    assert lab.ran == ["dense/0", "l1/0", "dense/1", "l1/1"]


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        (replace(SETTING, model="vgg17"), ModelError),
        (replace(SETTING, data="no-such-data"), DataError),
        (replace(SETTING, data_options={"image_size": 9}), DataError),
    ],
)
def test_what_no_trial_could_run_with_is_refused_before_the_folder_is_touched(
    tmp_path: Path, lab: Lab, setting: Setting, error: Any
) -> None:
    with pytest.raises(error):
        runner.compare(Comparison.of(setting, ["dense"], seeds=[0]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_different_comparison_is_refused(tmp_path: Path, lab: Lab) -> None:
    runner.compare(COMPARISON, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.json")}
    with pytest.raises(RecordError, match="different comparison"):
        runner.compare(Comparison.of(replace(SETTING, width=0.5), ["dense"], seeds=[0]), tmp_path / "run")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.json")} == before


def test_two_processes_in_one_folder(tmp_path: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"

    def second(trial: Trial, bench: RunContext, *, command: str | None) -> records.Record:
        with pytest.raises(RecordError, match="another process is working there"):
            runner.compare(COMPARISON, folder)
        return lab.run_trial(trial, bench, command=command)

    monkeypatch.setattr(runner, "run_trial", second)
    assert runner.compare(COMPARISON, folder).complete


def test_a_run_is_not_removed_while_another_process_works_there(
    tmp_path: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    runner.compare(COMPARISON, folder)
    before = contents(folder)
    with (
        FileLock(folder / ".lock"),
        pytest.raises(RecordError, match="another process is working there"),
    ):
        runner.compare(COMPARISON, folder, fresh=True)
    assert contents(folder) == before


def test_a_folder_of_other_things_is_not_even_locked(tmp_path: Path, lab: Lab) -> None:
    (tmp_path / "thesis.txt").write_text("do not touch")
    for fresh in (False, True):
        with pytest.raises(RecordError, match="not empty and holds no comparison"):
            runner.compare(COMPARISON, tmp_path, fresh=fresh)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_engine_decides_the_order(tmp_path: Path, lab: Lab) -> None:
    def backwards(trials: Sequence[Trial], run: runner.Runner) -> Generator[records.Record, None, None]:
        yield from map(run, reversed(trials))

    outcome = runner.compare(COMPARISON, tmp_path / "run", engine=backwards)
    assert lab.ran == ["l1/1", "dense/1", "l1/0", "dense/0"]
    assert outcome.complete


def test_clearing_removes_a_run_and_nothing_else(tmp_path: Path, lab: Lab) -> None:
    folder = tmp_path / "run"
    runner.compare(COMPARISON, folder)
    (folder / "notes.txt").write_text("mine")
    runner.clear(folder)
    left = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    assert left == ["comparison.json", "notes.txt"]  # killed now, it is a run folder still
    (folder / "comparison.json").unlink()
    (folder / "records").mkdir()
    (folder / "records" / "x.json").write_text(json.dumps({}))
    runner.clear(folder)  # holds no comparison: not ours
    assert (folder / "records" / "x.json").exists()


def test_devices() -> None:
    assert resolve("cpu") == "cpu"
    for name in ("gpu", "meta", "cuda:99x"):
        with pytest.raises(Exception, match="device"):
            resolve(name)
