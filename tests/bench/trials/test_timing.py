"""The timing pass: interleaved, with a control, once for a set of trials, and kept when interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from filterfold.bench.trials import records, runner, timing
from filterfold.bench.trials.config import Trial
from filterfold.bench.trials.context import Deadline, RunContext, Stopped
from filterfold.bench.trials.setting import Setting
from filterfold.surgery.checkpoint import save

SETTING = Setting("vgg_small", "digits", width=0.125)


class Clock:
    """Stands in for `inference_seconds`: a network's time is its first weight, and one call takes that long."""

    def __init__(self) -> None:
        self.order: list[float] = []
        self.calls: list[tuple[float, int, int]] = []
        self.now = 0.0

    def __call__(self, model: nn.Module, images: Any, *, repeats: int) -> float:
        seconds = round(float(next(model.parameters()).detach().flatten()[0]), 3)
        if len(images) != 3:  # 359 images in batches of 128; anything else are calls at a batch size
            self.calls.append((seconds, len(images), len(images[0])))
            return seconds * len(images)
        self.order.append(seconds)
        self.now += seconds
        return seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "inference_seconds", clock)
    return clock


@pytest.fixture
def bench(tmp_path: Path) -> RunContext:
    return RunContext(SETTING, tmp_path, "cpu")


def finish(bench: RunContext, seed: int, seconds: float) -> records.Record:
    trial = Trial("dense", seed, SETTING)
    model = bench.build(seed)
    with torch.no_grad():
        next(model.parameters()).fill_(seconds)
    save(model, bench.model_file(trial.id))
    empty = runner.failure(trial, RuntimeError(), "cpu", None, "2024-01-01T00:00:00+00:00")
    result: Any = {"top1": 90.0, "inference_seconds": 100.0, "train_seconds": 1000.0}
    record: records.Record = {**empty, "status": "finished", "result": result}
    records.write(bench.folder, record)
    return record


def test_rounds_are_interleaved_and_turn_round(bench: RunContext, clock: Clock) -> None:
    timed = timing.measure_together([finish(bench, 0, 0.5), finish(bench, 1, 0.25)], bench, 3)
    assert clock.order == [0.5, 0.25, 0.5, 0.5, 0.25, 0.5, 0.5, 0.25, 0.5]  # the first network once more each round
    assert [record["result"]["inference_seconds"] for record in timed if record["result"]] == [0.5, 0.25]
    own = timed[1]["timing"]
    assert own is not None
    assert (own["mode"], own["rounds"], own["control"], own["batch_size"]) == ("together", [0.25] * 3, 1.0, 128)
    assert sorted(record["id"] for record in timed) == sorted(record["id"] for record in records.read_all(bench.folder))
    assert all(record["timing"] for record in records.read_all(bench.folder))


def test_a_set_of_trials_is_timed_once_and_a_larger_set_anew(bench: RunContext, clock: Clock) -> None:
    first = [finish(bench, 0, 0.5), finish(bench, 1, 0.25)]
    timed = timing.measure_together(first, bench, 1)
    clock.order.clear()
    assert timing.measure_together(timed, bench, 1) == []
    assert clock.order == []
    again = timing.measure_together([*timed, finish(bench, 2, 0.125)], bench, 1)
    assert clock.order == [0.5, 0.25, 0.125, 0.5]
    assert len({record["timing"]["together_with"] for record in again if record["timing"]}) == 1


def test_records_without_their_networks_keep_their_times(
    bench: RunContext, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    there, gone = finish(bench, 0, 1.0), finish(bench, 1, 2.0)
    bench.model_file(gone["id"]).unlink()
    with caplog.at_level("INFO", "filterfold.bench.trials"):
        timed = timing.measure_together([there, gone], bench, rounds=1)
    assert [record["id"] for record in timed] == [there["id"]]
    assert "1 of 2 networks are not in the run folder" in caplog.text


def test_interrupted_timing_goes_on(bench: RunContext, clock: Clock) -> None:
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
    bench: RunContext, clock: Clock, monkeypatch: pytest.MonkeyPatch
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


def test_every_round_also_takes_each_batch_size(bench: RunContext, clock: Clock) -> None:
    timed = timing.measure_together([finish(bench, 0, 0.5), finish(bench, 1, 0.25)], bench, 2, [1, 8, 512])
    there, back = [0.5, 0.25, 0.5], [0.5, 0.25, 0.5]
    assert [(calls, size) for _, calls, size in clock.calls[::3]] == [(256, 1), (32, 8), (1, 512)] * 2
    assert [seconds for seconds, _, _ in clock.calls] == (there * 3 + back * 3)
    own = timed[1]["timing"]
    assert own is not None
    assert own["batches"] == {"1": [0.25] * 2, "8": [0.25] * 2, "512": [0.25] * 2}  # seconds a call
    assert own["controls"] == {"1": 1.0, "8": 1.0, "512": 1.0}
    assert timing.measure_together(timed, bench, 2, [1, 8, 512]) == []
    assert timing.measure_together(timed, bench, 2, [1]) != []


def test_records_of_older_versions_are_not_timed_again(bench: RunContext, clock: Clock) -> None:
    [timed] = timing.measure_together([finish(bench, 0, 0.5)], bench, 1)
    assert timed["timing"] is not None
    old: Any = {key: value for key, value in timed["timing"].items() if key not in ("asked", "batches", "controls")}
    assert timing.measure_together([{**timed, "timing": old}], bench, 1) == []


def test_batches_of_large_images_are_left_out(
    bench: RunContext, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(timing, "BATCH_BYTES", 64 * 8 * 8 * 4)
    with caplog.at_level("INFO", "filterfold"):
        [timed] = timing.measure_together([finish(bench, 0, 0.5)], bench, 1)
    assert timed["timing"] is not None
    assert list(timed["timing"]["batches"]) == ["1", "8", "64"]
    assert "timing: batch 512 is left out" in caplog.text


def test_short_timing_goes_round_more_often(bench: RunContext, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SHORT_SECONDS", 5.0)  # a round takes 1 s: the network, and once more as the control
    timing.measure_together([finish(bench, 0, 0.5)], bench, batch_sizes=[])
    assert len(clock.order) == 2 * 5
    clock.order.clear()
    timing.measure_together([finish(bench, 1, 0.01)], bench, batch_sizes=[])
    assert len(clock.order) == 2 * timing.MOST_ROUNDS
    clock.order.clear()
    timing.measure_together([finish(bench, 2, 4.0)], bench, batch_sizes=[])
    assert len(clock.order) == 2 * timing.ROUNDS


def test_widths_that_save_nothing_are_looked_for_once_a_label(
    bench: RunContext, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def wasted(model: nn.Module, example: Any) -> tuple[str, ...]:
        seen.append(round(float(next(model.parameters()).detach().flatten()[0]), 3))
        return ("features.0: 3 -> 17 channels take 2 ms, 3 -> 32 would take 2 ms",)

    monkeypatch.setattr(timing, "wasted_widths", wasted)
    whole, cut, same = finish(bench, 0, 0.5), finish(bench, 1, 0.25), finish(bench, 2, 0.125)
    for record in (cut, same):
        record["label"] = "cut"
        record["result"]["widths"] = {"features.0": [32, 17]}  # type: ignore[index]
    timed = timing.measure_together([whole, cut, same], bench, 1)
    assert seen == [0.25]
    assert ["wasted" in (record["timing"] or {}) for record in timed] == [False, True, True]


def test_a_part_of_a_large_test_set_stands_for_the_whole(bench: RunContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "IMAGE_BYTES", 1)
    seen: list[int] = []
    monkeypatch.setattr(timing, "inference_seconds", lambda model, images, repeats: seen.append(len(images)) or 1.0)
    alone = timing.measure_alone(nn.Identity(), bench)
    assert seen == [1]
    assert alone["rounds"] == [pytest.approx(359 / 128)]
    assert (alone["mode"], alone["control"]) == ("alone", None)


def test_real_times_are_positive(bench: RunContext) -> None:
    timed = timing.measure_together([finish(bench, 0, 0.5)], bench, 2)
    [record] = timed
    assert record["timing"] is not None
    assert len(record["timing"]["rounds"]) == 2
    assert min(record["timing"]["rounds"]) > 0
    assert list(record["timing"]["batches"]) == ["1", "8", "64", "512"]  # more images than the test set has
    assert all(len(own) == 2 and min(own) > 0 for own in record["timing"]["batches"].values())
