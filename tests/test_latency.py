"""Timing against layers whose time is known because they sleep, or because a clock is wound by hand."""

from __future__ import annotations

import time
from collections import deque

import pytest
import torch
from torch import nn

from filterfold import latency
from filterfold.errors import ConfigError
from filterfold.latency import inference_seconds, measure_latency


class Sleeper(nn.Module):
    """Takes a known time per example, and notes how it was called."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds
        self.calls = deque()  # a list would be given back empty

    def forward(self, x):
        self.calls.append((tuple(x.shape), x.dtype, self.training, torch.is_inference_mode_enabled()))
        CLOCK.now += self.seconds * len(x)
        return x


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


CLOCK = Clock()


@pytest.fixture
def wound(monkeypatch):
    monkeypatch.setattr(latency, "time", CLOCK)


def test_medians_speedups_and_control(wound):
    models = {"slow": Sleeper(0.004), "fast": Sleeper(0.001)}
    found = measure_latency(models, torch.zeros(3, 2), batch_sizes=[1, 4], repeats=5)
    for batch_size in (1, 4):
        assert found.row("slow", batch_size).median == pytest.approx(0.004 * batch_size)
        assert found.row("fast", batch_size).p90 == pytest.approx(0.001 * batch_size)
        assert found.speedup("fast", batch_size) == pytest.approx(4.0)
        assert found.speedup("A/A control", batch_size) == pytest.approx(1.0)
    assert found.conditions["device"] == "cpu"


def test_calls_are_in_eval_and_inference_mode_and_modes_come_back(wound):
    models = {"a": Sleeper(0.01), "b": Sleeper(0.01).eval()}
    threads = torch.get_num_threads()
    measure_latency(models, (torch.zeros(3, 2),), batch_sizes=[2], repeats=2, threads=1, block_seconds=0.04)
    assert set(models["a"].calls) == {((2, 2), torch.float32, False, True)}
    assert (models["a"].training, models["b"].training) == (True, False)
    assert torch.get_num_threads() == threads
    # 3 calls to warm up, 1 to see how long it takes, 2 blocks of .04 s at .02 s a call
    assert len(models["b"].calls) == 3 + 1 + 2 * 2


def test_networks_are_timed_in_turn(wound):
    order = []

    class Named(Sleeper):
        def forward(self, x):
            order.append(self)
            return super().forward(x)

    a, b = Named(1.0), Named(1.0)
    measure_latency({"a": a, "b": b}, torch.zeros(1, 1), batch_sizes=[1], repeats=2, warmup=1)
    assert order == [a, a, b, b, a, a, *(a, b, a), *(a, b, a)]


def test_percentile():
    row = latency.Latency("a", 1, tuple(float(value) for value in range(20, 0, -1)))
    assert (row.median, row.p90) == (10.5, 18.0)


def test_the_table_can_be_read(wound):
    models = {"slow": Sleeper(0.004), "fast": Sleeper(0.001)}
    text = str(measure_latency(models, torch.zeros(1, 1), batch_sizes=[1], repeats=1))
    assert text.splitlines()[:4] == [
        "model        batch  median ms  p90 ms  speed-up",
        "slow             1      4.000   4.000      1.00",
        "fast             1      1.000   1.000      4.00",
        "A/A control      1      4.000   4.000      1.00",
    ]


def test_real_time_is_seen():
    class Real(nn.Module):
        def forward(self, x):
            time.sleep(0.002)
            return x

    found = measure_latency({"real": Real()}, torch.zeros(1), batch_sizes=[1], repeats=3, block_seconds=0.002)
    assert 0.002 <= found.row("real", 1).median < 0.05


def test_seconds_for_a_whole_set(wound):
    model = Sleeper(0.001)
    images = torch.full((300, 1, 2, 2), 255, dtype=torch.uint8)
    assert inference_seconds(model, images, repeats=3) == pytest.approx(0.3)
    shapes = [shape[0] for shape, *_ in model.calls]
    assert shapes == [128] + 3 * [128, 128, 44]
    assert {call[1:] for call in model.calls} == {(torch.float32, False, True)}
    assert model.training


def test_integers_are_scaled_and_batches_may_be_ready():
    seen = []

    class Watch(nn.Conv2d):
        def forward(self, x):
            seen.append((float(x.max()), x.dtype))
            return super().forward(x)

    model = Watch(1, 1, 1).to(torch.bfloat16)
    inference_seconds(model, [torch.full((2, 1, 2, 2), 51, dtype=torch.uint8)], repeats=1)
    inference_seconds(model, [torch.full((2, 1, 2, 2), 3.0)], repeats=1)
    assert seen == 2 * [(pytest.approx(0.2, rel=1e-2), torch.bfloat16)] + 2 * [(3.0, torch.bfloat16)]


LINEAR, BLANK = nn.Linear(1, 1), torch.zeros(1, 1)
ELSEWHERE = {"a": LINEAR, "b": nn.Linear(1, 1, device="meta")}


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: measure_latency({}, BLANK), "give at least one network to time, by a name other than 'A/A control'"),
        (
            lambda: measure_latency({"a": LINEAR}, BLANK, repeats=0),
            "repeats=0, batch_sizes=[1, 8, 64]: all must be at least 1",
        ),
        (lambda: measure_latency(ELSEWHERE, BLANK), "the networks lie on cpu and meta; move them to one device"),
        (lambda: inference_seconds(LINEAR, BLANK[:0]), "there are no images to time the network on"),
        (lambda: inference_seconds(LINEAR, BLANK, batch_size=0), "batch_size=0, repeats=3: must be at least 1"),
    ],
)
def test_refusals(run, message):
    with pytest.raises(ConfigError) as caught:
        run()
    assert str(caught.value) == message
