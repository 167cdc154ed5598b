"""Several trials at a time: the same figures as in sequence, nothing twice, nothing lost, whoever is killed."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from filterfold.bench.trials import records, runner
from filterfold.bench.trials.config import Comparison, Trial
from filterfold.bench.trials.context import RunContext, lock
from filterfold.bench.trials.methods import must_wait
from filterfold.bench.trials.parallel import Parallel
from filterfold.bench.trials.setting import Setting
from filterfold.cli.app import app
from filterfold.errors import ConfigError
from filterfold.utils.io import write_json

RECIPE = {"epochs": 1, "lr": 0.1}
SETTING = Setting("vgg_small", "digits", width=0.25, data_options={"train_limit": 256}, recipe=RECIPE, retrain_epochs=1)

COMMAND = ["compare", "--model", "vgg_small", "--data", "digits", "--width", "0.25", "--train-limit", "400"]
COMMAND += ["--epochs", "8", "--methods", "dense,online", "--keep", "0.5", "--trials", "2", "--latency-batches", "none"]
COMMAND += ["--threads", "1"]

DEADLY = """
import multiprocessing, os, signal
from pathlib import Path
from filterfold.zoo import build

def factory(num_classes=10):
    if multiprocessing.parent_process() is not None:
        try:
            Path(__file__).with_name("once").touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    return build("vgg_small", channels=1, image_size=8, width=0.25)
"""


def figures(record: records.Record) -> dict[str, Any]:
    """What of a record must not depend on where it was made."""
    result = {key: value for key, value in (record["result"] or {}).items() if not key.endswith("seconds")}
    history = [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in record["history"]]
    return {"status": record["status"], "result": result, "history": history, "options": record["options"]}


@pytest.mark.slow
def test_the_same_records_as_in_sequence_though_a_worker_dies(tmp_path: Path) -> None:
    (tmp_path / "deadly.py").write_text(DEADLY)
    setting = replace(SETTING, model=f"{tmp_path / 'deadly.py'}:factory", width=1.0)
    comparison = Comparison.of(setting, ["dense", "l1", "random", "online"], keep=[0.5], seeds=range(2))

    def run(name: str, engine: runner.Engine) -> runner.Outcome:
        return runner.compare(comparison, tmp_path / name, engine=engine, timing_rounds=1, batch_sizes=[])

    first = run("together", Parallel(2))
    assert sorted(first.ran) == sorted(trial.id for trial in comparison.trials)
    (failed,) = first.failed
    assert failed["reason"] == "its worker process died (killed by SIGKILL); out of memory? Run fewer trials at a time"
    again = run("together", runner.local)
    assert again.complete
    assert again.ran == (failed["id"],)
    assert len(list((tmp_path / "together" / "bases").glob("*.json"))) == 2
    alone = run("alone", runner.local)
    assert alone.complete
    assert [figures(record) for record in again.records] == [figures(record) for record in alone.records]


@pytest.mark.slow
def test_stopping_in_time(tmp_path: Path) -> None:
    comparison = Comparison.of(SETTING, ["dense"], seeds=[0])
    before = children()
    outcome = runner.compare(comparison, tmp_path / "run", engine=Parallel(2), stop_after=0.5)
    assert (outcome.left, outcome.timed, outcome.records) == (1, False, ())
    assert children() <= before


@pytest.mark.slow
@pytest.mark.usefixtures("no_plots")
def test_ctrl_c_ends_the_workers_and_a_killed_driver_takes_them_along(tmp_path: Path) -> None:
    folder, options = tmp_path / "run", ["--parallel", "2"]
    with start(folder, options, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as driver:
        # one of four trials has a checkpoint: the end of the run is far off, however fast the machine
        wait_until(lambda: any(folder.glob("work/*/*.safetensors")), driver)
        workers = children(driver.pid)
        os.killpg(driver.pid, signal.SIGINT)  # what a terminal does: to the driver and its workers alike
        said, _ = driver.communicate(timeout=300)
    assert driver.returncode == 130
    assert said.endswith("filterfold: interrupted; the same command goes on from here\n")
    assert "Traceback" not in said
    wait_until(lambda: not any(map(alive, workers)))
    for path in folder.glob("records/*.json"):
        assert records.read(path)["status"] == "finished"  # stopped is not failed
    kill_the_driver_and_go_on(folder, options)


def kill_the_driver_and_go_on(folder: Path, options: list[str]) -> None:
    """Kill a comparison of four trials when one has ended and another has begun; then do the rest in this process."""
    with start(folder, options, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        wait_until(lambda: any(folder.glob("records/*.json")) and any(folder.glob("work/*/*.safetensors")), driver)
        workers = children(driver.pid)
        driver.send_signal(signal.SIGKILL)
    assert len(workers) >= 2
    wait_until(lambda: not any(map(alive, workers)))
    before = {record["id"]: record for record in records.read_all(folder)}
    assert 1 <= len(before) < 4
    done = CliRunner().invoke(app, [*COMMAND, "--out", str(folder)])
    assert done.exit_code == 0, done.output
    assert f"[{4 - len(before)}/{4 - len(before)}]" in done.output
    after = {record["id"]: record for record in records.read_all(folder)}
    assert len(after) == 4
    assert {record["status"] for record in after.values()} == {"finished"}
    for name, record in before.items():
        assert (after[name]["started"], after[name]["finished"]) == (record["started"], record["finished"])


@contextmanager
def start(folder: Path, options: list[str], **how: Any) -> Iterator[subprocess.Popen[str]]:
    """The command in a process group of its own, all of which is killed if anything fails meanwhile."""
    command = [sys.executable, "-m", "filterfold", *COMMAND, *options, "--out", str(folder)]
    with subprocess.Popen(command, process_group=0, preexec_fn=heed_ctrl_c, **how) as driver:
        try:
            yield driver
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGKILL)
            raise


@pytest.mark.slow
def test_two_processes_with_one_trial_do_it_once(tmp_path: Path) -> None:
    """An orphan of a killed run may still be at it: the second waits, and takes over its record."""
    trial = Trial("dense", 0, SETTING)
    code = (
        "import sys, pickle; run, trial = pickle.loads(bytes.fromhex(sys.argv[1])); print('here', flush=True);"
        "print(run(trial)['started'], 'data' in run.context.__dict__)"
    )
    trials = runner.Runner(RunContext(SETTING, tmp_path, "cpu"))
    second = [sys.executable, "-c", code, pickle.dumps((trials, trial)).hex()]
    with subprocess.Popen(second, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        with lock(tmp_path, trial.id):
            assert process.stdout.readline() == "here\n"
            record = trials._run(trial)
        assert process.stdout.read().split() == [record["started"], "False"]  # it never needed the images


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


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str] | None = None, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never happened"
        assert process is None or process.poll() is None, "it ended too early"
        time.sleep(0.01)
