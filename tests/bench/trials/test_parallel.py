"""Several trials at a time: the same figures as in sequence, nothing twice, nothing lost, whoever is killed."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from filterfold.bench.trials import records, runner
from filterfold.bench.trials.config import Comparison, Setting, Trial
from filterfold.bench.trials.context import RunContext, lock
from filterfold.bench.trials.methods import must_wait
from filterfold.bench.trials.parallel import Parallel
from filterfold.errors import ConfigError
from filterfold.utils.io import write_json

RECIPE = {"epochs": 1, "lr": 0.1}
SETTING = Setting("vgg_small", "digits", width=0.25, data_options={"train_limit": 256}, recipe=RECIPE, retrain_epochs=1)

DEADLY = """
import multiprocessing, os, signal
from pathlib import Path
from filterfold.zoo import build

def factory(num_classes=10):
    marker = Path(__file__).with_name("once")
    if multiprocessing.parent_process() is not None and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return build("vgg_small", channels=1, image_size=8, width=0.25)
"""


def figures(record: records.Record) -> dict[str, Any]:
    """What of a record must not depend on where it was made."""
    result = {key: value for key, value in (record["result"] or {}).items() if not key.endswith("seconds")}
    history = [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in record["history"]]
    return {"status": record["status"], "result": result, "history": history, "options": record["options"]}


@pytest.mark.slow
def test_the_same_records_as_in_sequence(tmp_path: Path) -> None:
    comparison = Comparison.of(SETTING, ["dense", "l1", "random", "online"], keep=[0.5], seeds=range(2))
    together = runner.compare(comparison, tmp_path / "two", engine=Parallel(2), timing_rounds=1, batch_sizes=[])
    alone = runner.compare(comparison, tmp_path / "one", timing_rounds=1, batch_sizes=[])
    assert together.complete
    assert alone.complete
    assert sorted(together.ran) == sorted(alone.ran)
    assert [figures(record) for record in together.records] == [figures(record) for record in alone.records]
    assert len(list((tmp_path / "two" / "bases").glob("*.json"))) == 2


@pytest.mark.slow
def test_a_worker_that_dies_fails_its_trial_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "deadly.py").write_text(DEADLY)
    setting = Setting(f"{tmp_path / 'deadly.py'}:factory", "digits", recipe=RECIPE)
    comparison = Comparison.of(setting, ["dense"], seeds=range(3))
    outcome = runner.compare(comparison, tmp_path / "run", engine=Parallel(2), timing_rounds=1, batch_sizes=[])
    assert len(outcome.records) == 3
    (failed,) = outcome.failed
    assert failed["reason"] == "its worker process died (killed by SIGKILL); out of memory? Run fewer trials at a time"
    again = runner.compare(comparison, tmp_path / "run", engine=Parallel(2), timing_rounds=1, batch_sizes=[])
    assert again.complete
    assert again.ran == (failed["id"],)


@pytest.mark.slow
def test_stopping_in_time(tmp_path: Path) -> None:
    comparison = Comparison.of(SETTING, ["dense"], seeds=range(2))
    before = children()
    outcome = runner.compare(comparison, tmp_path / "run", engine=Parallel(2), stop_after=0.5)
    assert (outcome.left, outcome.timed, outcome.records) == (2, False, ())
    assert children() <= before


@pytest.mark.slow
def test_a_killed_driver_takes_its_workers_along_and_nothing_is_lost_or_done_twice(tmp_path: Path) -> None:
    kill_the_driver_and_go_on(tmp_path / "run", "--parallel", "2", "--threads", "2")


def kill_the_driver_and_go_on(folder: Path, *options: str) -> None:
    """Kill a comparison of four trials when one has ended and another has begun; the same command does the rest."""
    command = [sys.executable, "-m", "filterfold", "compare", "--model", "vgg_small", "--data", "digits"]
    command += [
        "--width",
        "0.25",
        "--train-limit",
        "400",
        "--epochs",
        "8",
        "--methods",
        "dense,online",
        "--keep",
        "0.5",
    ]
    command += ["--trials", "2", "--latency-batches", "none", *options, "--out", str(folder)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: len(list(folder.glob("records/*.json"))) >= 1 and any(folder.glob("work/*/*.safetensors")))
        workers = children(driver.pid)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert len(workers) >= 2
    wait_until(lambda: not any(alive(pid) for pid in workers))
    before = {record["id"]: record for record in records.read_all(folder)}
    assert 1 <= len(before) < 4
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=400)
    assert f"[{4 - len(before)}/{4 - len(before)}]" in done.stdout
    after = {record["id"]: record for record in records.read_all(folder)}
    assert len(after) == 4
    assert {record["status"] for record in after.values()} == {"finished"}
    for name, record in before.items():
        assert (after[name]["started"], after[name]["finished"]) == (record["started"], record["finished"])


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_and_the_same_command_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "filterfold", "compare", "--model", "vgg_small", "--data", "digits"]
    command += ["--width", "0.25", "--train-limit", "400", "--epochs", "40", "--methods", "dense", "--trials", "6"]
    command += ["--parallel", "2", "--threads", "2", "--latency-batches", "none", "--out", str(folder)]
    driver = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0, preexec_fn=heed_ctrl_c
    )
    try:
        # one of six trials has a checkpoint: the end of the run is far off, however fast the machine
        wait_until(lambda: len(list(folder.glob("work/*/*.safetensors"))) > 0, 300)
        workers = children(driver.pid)
        os.killpg(driver.pid, signal.SIGINT)  # what a terminal does: to the driver and its workers alike
        said, _ = driver.communicate(timeout=300)
    finally:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
            driver.communicate()
    assert driver.returncode == 130
    assert said.endswith("filterfold: interrupted; the same command goes on from here\n")
    assert "Traceback" not in said
    wait_until(lambda: not any(alive(pid) for pid in workers), 300)
    left = [json.loads(path.read_text()) for path in folder.glob("records/*.json")]
    assert all(record["status"] == "finished" for record in left)  # stopped is not failed
    assert subprocess.run(command, capture_output=True, check=False, timeout=400).returncode == 0
    assert len(records.read_all(folder)) == 6


@pytest.mark.slow
def test_two_processes_with_one_trial_do_it_once(tmp_path: Path) -> None:
    """An orphan of a killed run may still be at it: the second waits, and takes over its record."""
    trial = Trial("dense", 0, SETTING)
    code = (
        "import sys, pickle; run, trial = pickle.loads(bytes.fromhex(sys.argv[1]));"
        "print(run(trial)['started'], run.context.__dict__.get('data') is not None)"
    )
    trials = runner.Runner(RunContext(SETTING, tmp_path, "cpu"))
    packed = pickle.dumps((trials, trial)).hex()
    both = [subprocess.Popen([sys.executable, "-c", code, packed], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=400)[0].split() for process in both]
    assert said[0][0] == said[1][0]
    assert sorted(loaded for _, loaded in said) == ["False", "True"]  # one of them never needed the images


def test_a_trial_waits_while_another_process_trains_its_dense_network(tmp_path: Path) -> None:
    context = RunContext(SETTING, tmp_path, "cpu")
    trials = Comparison.of(SETTING, ["dense", "l1", "online", "scratch"], keep=[0.5], seeds=range(2)).trials
    base = trials[0].base
    with context.locked(f"base-{base.id}"):
        assert [(trial.method, trial.seed) for trial in trials if must_wait(trial, context)] == [
            ("dense", 0),
            ("l1", 0),
        ]
        write_json(context.base_file(base.id, ".json"), {"history": []})
        assert not any(must_wait(trial, context) for trial in trials)
    assert not any(must_wait(trial, context) for trial in trials)


def test_workers_pass_over_trials_that_others_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    context = RunContext(SETTING, tmp_path, "cpu")
    worker = runner.Runner(context)
    trials = Comparison.of(SETTING, ["dense", "online"], keep=[0.5], seeds=range(2)).trials
    monkeypatch.setattr(runner.Runner, "_run", lambda self, trial: ran.append(trial.id) or {"id": trial.id})
    taken = [0, 0, 0, 0]
    with lock(tmp_path, trials[0].id):
        work = worker.work(trials, taken)
        assert next(work)["id"] == trials[1].id  # the first is locked
        taken[2] = -1  # another process took it
        assert next(work)["id"] == trials[3].id
    assert next(work)["id"] == trials[0].id
    assert list(work) == []
    assert ran == [trials[place].id for place in (1, 3, 0)]
    assert taken == [os.getpid(), os.getpid(), -1, os.getpid()]


def test_no_trials_at_a_time_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        Parallel(0)


def children(pid: int | None = None) -> set[int]:
    """Processes that a process has started and that are still there, but for multiprocessing's resource tracker.

    The first worker of a process starts the tracker, and it stays until that process ends.
    """
    tasks = Path(f"/proc/{pid or os.getpid()}/task")
    if not tasks.is_dir():
        pytest.skip("needs /proc")
    found = {int(child) for path in tasks.glob("*/children") for child in path.read_text().split()}
    return {child for child in found if not is_resource_tracker(child)}


def is_resource_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def heed_ctrl_c() -> None:
    """A shell starts background jobs, and so perhaps this very test, with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until(true: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)
