"""Trials on a Ray cluster of this machine: as many records as trials, the same figures as here, whoever is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Sequence
from pathlib import Path

import pytest

from filterfold.bench.trials import ray, records, runner
from filterfold.bench.trials.config import Comparison, Trial
from filterfold.bench.trials.context import RunContext
from filterfold.bench.trials.ray import RayCluster
from filterfold.bench.trials.setting import Setting
from filterfold.errors import ConfigError

from .test_parallel import figures, kill_the_driver_and_go_on

pytest.importorskip("ray")

SETTING = Setting(
    "vgg_small", "digits", width=0.25, data_options={"train_limit": 256},
    recipe={"epochs": 2, "lr": 0.1}, retrain_epochs=1,
)  # fmt: skip


@pytest.mark.slow
def test_twelve_trials_two_workers_one_killed(tmp_path: Path) -> None:
    comparison = Comparison.of(SETTING, ["dense", "l1", "online"], keep=[0.5], seeds=range(4))
    killed: list[int] = []

    def deadly(pending: Sequence[Trial], run: runner.Runner) -> Generator[records.Record, None, None]:
        for count, record in enumerate(RayCluster(parallel=2)(pending, run), 1):
            if count >= 4 and not killed and (busy := workers("ray::_run")):
                killed.append(busy[0])
                os.kill(busy[0], signal.SIGKILL)
            yield record

    outcome = runner.compare(comparison, tmp_path / "ray", engine=deadly, timing_rounds=1, batch_sizes=[])
    assert len(killed) == 1
    assert outcome.complete
    assert len(outcome.ran) == len(set(outcome.ran)) == 12
    assert len(list((tmp_path / "ray" / "records").glob("*.json"))) == 12
    here = runner.compare(comparison, tmp_path / "here", timing_rounds=1, batch_sizes=[])
    assert [figures(record) for record in outcome.records] == [figures(record) for record in here.records]
    assert not workers("ray::")


@pytest.mark.slow
@pytest.mark.usefixtures("no_plots")
def test_a_killed_driver_takes_its_cluster_along_and_nothing_is_lost_or_done_twice(tmp_path: Path) -> None:
    kill_the_driver_and_go_on(tmp_path / "run", ["--engine", "ray", "--parallel", "1"])


def test_a_node_that_does_not_see_the_run_folder_sends_what_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray.tempfile, "gettempdir", lambda: str(tmp_path / "node"))
    bench = RunContext(SETTING, tmp_path / "run", "cpu")
    run = runner.Runner(bench)
    dense, l1 = Comparison.of(SETTING, ["dense", "l1"], seeds=[0]).trials
    record, files = ray._run(run, dense, "not in that folder", 1, {})
    assert record is not None
    assert not bench.folder.exists()
    base = [f"bases/{dense.id}.safetensors", f"bases/{dense.id}.json"]
    assert list(files) == [*base, f"models/{dense.id}.safetensors", f"records/{dense.id}.json"]
    ray._place(bench.folder, files)
    trained = bench.base_file(dense.id, ".json").read_bytes()
    # on yet another node, which is given the dense network
    later, more = ray._run(run, l1, "nor is this", 1, ray._base(bench.folder, l1))
    assert later is not None
    assert later["history"][:2] == record["history"]  # seconds and all: it was not trained again
    assert more[base[1]] == trained
    alone = runner.compare(
        Comparison.of(SETTING, ["dense", "l1"], seeds=[0]), tmp_path / "alone", timing_rounds=1, batch_sizes=[]
    )
    assert [figures(one) for one in (record, later)] == [figures(one) for one in alone.records]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="makes no sense"):
        RayCluster(share=0)
    with pytest.raises(ConfigError, match="no Ray cluster there"):
        next(
            iter(
                RayCluster("nonsense://here")(
                    [Trial("dense", 0, SETTING)], runner.Runner(RunContext(SETTING, tmp_path, "cpu"))
                )
            )
        )


def workers(title: str) -> list[int]:
    """Processes with such a title that descend from this one."""
    parents, titled = {}, []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if (path / "cmdline").read_text().startswith(title):
                titled.append(int(path.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [pid for pid in titled if _descends(pid, parents)]


def _descends(pid: int, parents: dict[int, int]) -> bool:
    while pid in parents:
        if pid == os.getpid():
            return True
        pid = parents[pid]
    return False
