"""The timing pass: interleaved, with a control, once for a set of trials, and kept when interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from filterfold.checkpoint import save
from filterfold.experiment import launch, records, timing
from filterfold.experiment.bench import Bench
from filterfold.experiment.config import Setting, Trial
from filterfold.experiment.deadline import Deadline, Stopped

SETTING = Setting("vgg_small", "digits", width=0.125)


class Clock:
    """Stands in for `inference_seconds`: a network's time is its first weight, and one call takes that long."""

    def __init__(self) -> None:
        self.order: list[float] = []
        self.now = 0.0

    def __call__(self, model: nn.Module, images: Any, *, repeats: int) -> float:
        assert len(images) == 3  # 359 images in batches of 128
        seconds = round(float(next(model.parameters()).detach().flatten()[0]), 3)
        self.order.append(seconds)
        self.now += seconds
        return seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "inference_seconds", clock)
    return clock


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(SETTING, tmp_path, "cpu")


def finish(bench: Bench, seed: int, seconds: float) -> records.Record:
    trial = Trial("dense", seed, SETTING)
    model = bench.build(seed)
    with torch.no_grad():
        next(model.parameters()).fill_(seconds)
    save(model, bench.model_file(trial.id))
    empty = launch.failure(trial, RuntimeError(), "cpu", None, "2024-01-01T00:00:00+00:00")
    result: Any = {"top1": 90.0, "inference_seconds": 100.0}
    record: records.Record = {**empty, "status": "finished", "result": result}
    records.write(bench.folder, record)
    return record


def test_rounds_are_interleaved_and_turn_round(bench: Bench, clock: Clock) -> None:
    timed = timing.measure_together([finish(bench, 0, 0.5), finish(bench, 1, 0.25)], bench, 3)
    assert clock.order == [0.5, 0.25, 0.5, 0.5, 0.25, 0.5, 0.5, 0.25, 0.5]  # the first network once more each round
    assert [record["result"]["inference_seconds"] for record in timed if record["result"]] == [0.5, 0.25]
    own = timed[1]["timing"]
    assert own is not None
    assert (own["mode"], own["rounds"], own["control"], own["batch_size"]) == ("together", [0.25] * 3, 1.0, 128)
    assert sorted(record["id"] for record in timed) == sorted(record["id"] for record in records.read_all(bench.folder))
    assert all(record["timing"] for record in records.read_all(bench.folder))


def test_a_set_of_trials_is_timed_once_and_a_larger_set_anew(bench: Bench, clock: Clock) -> None:
    first = [finish(bench, 0, 0.5), finish(bench, 1, 0.25)]
    timed = timing.measure_together(first, bench, 1)
    clock.order.clear()
    assert timing.measure_together(timed, bench, 1) == []
    assert clock.order == []
    again = timing.measure_together([*timed, finish(bench, 2, 0.125)], bench, 1)
    assert clock.order == [0.5, 0.25, 0.125, 0.5]
    assert len({record["timing"]["together_with"] for record in again if record["timing"]}) == 1


def test_interrupted_timing_goes_on(bench: Bench, clock: Clock) -> None:
    finished = [finish(bench, 0, 0.5), finish(bench, 1, 0.25)]
    bench.deadline = Deadline(1.0, clock=lambda: clock.now)
    with pytest.raises(Stopped):
        timing.measure_together(finished, bench, 2)
    assert clock.order == [0.5]  # another half a second would be too long
    assert all(record["timing"] is None for record in records.read_all(bench.folder))
    bench.deadline = Deadline(None)
    timed = timing.measure_together(finished, bench, 2)
    assert clock.order == [0.5, 0.25, 0.5, 0.5, 0.25, 0.5]
    assert len(timed) == 2
    assert not any(bench.folder.joinpath("work").iterdir())


def test_what_another_machine_measured_is_not_mixed_in(
    bench: Bench, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = [finish(bench, 0, 0.5), finish(bench, 1, 0.25)]
    bench.deadline = Deadline(1.0, clock=lambda: clock.now)
    with pytest.raises(Stopped):
        timing.measure_together(finished, bench, 1)
    clock.order.clear()
    bench.deadline = Deadline(None)
    monkeypatch.setattr(timing, "processor", lambda: "another one")
    timing.measure_together(finished, bench, 1)
    assert clock.order == [0.5, 0.25, 0.5]


def test_a_part_of_a_large_test_set_stands_for_the_whole(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "IMAGE_BYTES", 1)
    seen: list[int] = []
    monkeypatch.setattr(timing, "inference_seconds", lambda model, images, repeats: seen.append(len(images)) or 1.0)
    alone = timing.measure_alone(nn.Identity(), bench)
    assert seen == [1]
    assert alone["rounds"] == [pytest.approx(359 / 128)]
    assert (alone["mode"], alone["control"]) == ("alone", None)


def test_real_times_are_positive(bench: Bench) -> None:
    timed = timing.measure_together([finish(bench, 0, 0.5)], bench, 2)
    [record] = timed
    assert record["timing"] is not None
    assert len(record["timing"]["rounds"]) == 2
    assert min(record["timing"]["rounds"]) > 0
