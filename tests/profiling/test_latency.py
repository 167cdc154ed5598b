"""Timing against layers whose time is known because they sleep, or because a clock is wound by hand."""

from __future__ import annotations

import json
import time

import pytest
import torch
from torch import nn

from filterfold.errors import ConfigError
from filterfold.profiling import (
    CONTROL,
    Latency,
    LatencyComparison,
    inference_seconds,
    measure_latency,
    median_interval,
)


class Log(list):
    """A plain list would be given back empty."""


class Sleeper(nn.Module):
    """Takes a known time per example, and notes how it was called."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds
        self.calls = Log()

    def forward(self, x):
        self.calls.append((tuple(x.shape), x.dtype, self.training, torch.is_inference_mode_enabled()))
        CLOCK.now += self.seconds * len(x)
        return x


class Clock:
    now = 0.0


CLOCK = Clock()


def wound(run, times):
    """Time by the clock that the layers wind."""
    before = CLOCK.now
    for _ in range(times):
        run()
    return CLOCK.now - before


def test_medians_speedups_and_control():
    models = {"slow": Sleeper(0.004), "fast": Sleeper(0.001)}
    found = measure_latency(models, torch.zeros(3, 2), batch_sizes=[1, 4], repeats=5, timer=wound)
    for batch_size in (1, 4):
        assert found.row("slow", batch_size).median == pytest.approx(0.004 * batch_size)
        assert found.row("fast", batch_size).p90 == pytest.approx(0.001 * batch_size)
        assert found.speedup("fast", batch_size) == pytest.approx(4.0)
        assert found.speedup("A/A control", batch_size) == pytest.approx(1.0)
    assert found.conditions["device"] == "cpu"


def test_calls_are_in_eval_and_inference_mode_and_modes_come_back():
    models = {"a": Sleeper(0.01), "b": Sleeper(0.01).eval()}
    threads = torch.get_num_threads()
    options = {"repeats": 2, "threads": 1, "block_seconds": 0.04, "count_macs": False}
    found = measure_latency(models, (torch.zeros(3, 2),), batch_sizes=[2], timer=wound, **options)
    assert found.conditions["threads"] == 1
    assert set(models["a"].calls) == {((2, 2), torch.float32, False, True)}
    assert (models["a"].training, models["b"].training) == (True, False)
    assert torch.get_num_threads() == threads
    # 3 calls to warm up, 1 to see how long it takes, 2 blocks of .04 s at .02 s a call
    assert len(models["b"].calls) == 3 + 1 + 2 * 2


def test_networks_are_timed_in_turn():
    order = []

    class Named(Sleeper):
        def forward(self, x):
            order.append(self)
            return super().forward(x)

    a, b = Named(1.0), Named(1.0)
    options = {"repeats": 2, "warmup": 1, "count_macs": False}
    measure_latency({"a": a, "b": b}, torch.zeros(1, 1), batch_sizes=[1], timer=wound, **options)
    assert order == [a, a, b, b, a, a, *(a, b, a), *(a, b, a)]


def test_percentile():
    row = Latency("a", 1, tuple(float(value) for value in range(20, 0, -1)))
    assert (row.median, row.p90) == (10.5, 18.0)


def test_intervals_cover_the_median_as_often_as_they_say():
    # smallest k with P(Binomial(n, 1/2) < k) <= .025, from the tables of the sign test
    for n, k in ((6, 1), (8, 1), (9, 2), (20, 6), (30, 10), (50, 18)):
        assert median_interval(range(1, n + 1)) == (k, n + 1 - k)
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert median_interval([5.0]) == (5.0, 5.0)


def test_throughput_and_ratios_are_paired():
    a, b = Latency("a", 8, (2.0, 4.0, 8.0)), Latency("b", 8, (1.0, 2.0, 2.0))
    found = LatencyComparison((a, b), {}, {"a": 300, "b": 100})
    assert b.throughput == 4.0
    assert found.speedup("b", 8) == 2.0  # of 2, 2, 4; the ratio of the medians is 2 as well
    assert found.speedup_interval("b", 8) == (2.0, 4.0)
    assert found.macs_ratio("b") == 3.0
    assert LatencyComparison((a, b), {}, {"a": 300}).macs_ratio("b") is None


def test_more_speed_than_arithmetic_is_suspicious():
    rows = (Latency("a", 1, (8.0,) * 6), Latency("b", 1, (1.0,) * 6), Latency(CONTROL, 1, (8.0,) * 6))
    assert LatencyComparison(rows, {}, {"a": 400, "b": 50}).warnings == ()
    assert LatencyComparison(rows, {}, {"a": 400, "b": 100}).warnings == (
        "b, batch 1: 8.00x as fast with only 4.00x fewer MACs; look for the mistake first",
    )
    unsure = (rows[0], Latency("b", 1, (1.0, 1.0, 1.0, 1.0, 1.0, 8.0)))
    assert LatencyComparison(unsure, {}, {"a": 400, "b": 100}).warnings == ()


def test_a_control_that_is_off_is_said():
    rows = (Latency("a", 4, (1.0,) * 6), Latency(CONTROL, 4, (0.9,) * 6))
    (warning,) = LatencyComparison(rows, {}).warnings
    assert warning == ("batch 4: the A/A control gives 1.11x; the machine is too unsteady for differences below 11%")


def test_a_slow_network_is_not_timed_for_ever():
    options = {"repeats": 50, "max_seconds": 30.0, "timer": wound}
    found = measure_latency({"a": Sleeper(1.0)}, torch.zeros(1, 1), batch_sizes=[1], **options)
    assert len(found.row("a", 1).seconds) == 16  # rounds of two seconds until more than 30 are spent
    found = measure_latency({"a": Sleeper(100.0)}, torch.zeros(1, 1), batch_sizes=[1], **options)
    assert len(found.row("a", 1).seconds) == 7


def test_everything_as_json():
    models = {"wide": nn.Linear(8, 8), "small": nn.Linear(8, 2)}
    found = measure_latency(models, torch.zeros(1, 8), batch_sizes=[3], repeats=6, timer=lambda run, times: 0.5 * times)
    document = json.loads(json.dumps(found.to_dict()))
    assert document["reference"] == "wide"
    assert document["conditions"]["mode"] == "eager"
    assert document["warnings"] == []
    small = document["rows"][1]
    assert (small["macs"], small["macs_ratio"], small["speedup"]) == (16, 4.0, 1.0)
    assert (small["median"], small["throughput"], small["interval"]) == (0.5, 6.0, [0.5, 0.5])


def test_channels_last_is_for_both_and_leaves_the_model_alone():
    model, seen = nn.Sequential(nn.Conv2d(4, 4, 3)), []
    before = model[0].weight.stride()
    model[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].stride()[1]))
    x = torch.zeros(1, 4, 5, 5)
    measure_latency({"a": model}, x, batch_sizes=[2], repeats=1, mode="channels_last", count_macs=False)
    assert set(seen) == {1}
    assert model[0].weight.stride() == before


def test_the_table_can_be_read():
    models = {"slow": Sleeper(0.004), "fast": Sleeper(0.001)}
    text = str(measure_latency(models, torch.zeros(1, 1), batch_sizes=[1], repeats=1, timer=wound))
    assert text.splitlines()[:4] == [
        "model        batch  speed-up       95 %  MACs  median ms  95 % interval  p90 ms  examples/s",
        "slow             1     1.00x  1.00-1.00            4.000    4.000-4.000   4.000         250",
        "fast             1     4.00x  4.00-4.00            1.000    1.000-1.000   1.000       1,000",
        "A/A control      1     1.00x  1.00-1.00            4.000    4.000-4.000   4.000         250",
    ]


def test_real_time_is_seen():
    class Real(nn.Module):
        def forward(self, x):
            time.sleep(0.002)
            return x

    found = measure_latency({"real": Real()}, torch.zeros(1), batch_sizes=[1], repeats=3, block_seconds=0.002)
    assert 0.002 <= found.row("real", 1).median < 0.05


def test_seconds_for_a_whole_set():
    model = Sleeper(0.001)
    images = torch.full((300, 1, 2, 2), 255, dtype=torch.uint8)
    assert inference_seconds(model, images, repeats=3, timer=wound) == pytest.approx(0.3)
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


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # PyTorch's compiler
@pytest.mark.parametrize(
    "mode", ["eager", "channels_last", "onnxruntime", pytest.param("compile", marks=pytest.mark.slow)]
)
def test_every_mode_runs_the_same_network(mode):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    x, outputs = torch.randn(1, 3, 4, 4), []

    def watch(run, times):
        output = run()
        outputs.append(torch.as_tensor(output[0] if isinstance(output, list) else output))
        return 0.001 * times

    sizes = [2] if mode == "compile" else [1, 2]  # compiling takes seconds
    found = measure_latency({"net": model}, x, batch_sizes=sizes, mode=mode, repeats=2, timer=watch)
    assert found.conditions["mode"] == mode
    assert {tuple(output.shape) for output in outputs} == {(size, 2) for size in sizes}
    with torch.no_grad():
        expected = model.eval()(x)
    for output in outputs:
        torch.testing.assert_close(output.clone(), expected.expand_as(output), atol=1e-4, rtol=1e-4)


LINEAR, BLANK = nn.Linear(1, 1), torch.zeros(1, 1)
ELSEWHERE = {"a": LINEAR, "b": nn.Linear(1, 1, device="meta")}


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: measure_latency({}, BLANK), "give at least one network to time, by a name other than 'A/A control'"),
        (
            lambda: measure_latency({"a": LINEAR}, BLANK, repeats=0),
            "repeats=0, batch_sizes=[1, 8, 64, 512]: all must be at least 1",
        ),
        (
            lambda: measure_latency({"a": LINEAR}, BLANK, mode="fast"),
            "mode='fast': must be one of eager, channels_last, compile, onnxruntime",
        ),
        (
            lambda: measure_latency({"a": ELSEWHERE["b"]}, BLANK, mode="onnxruntime", count_macs=False),
            "mode='onnxruntime' is timed on the CPU; move the networks from meta to it",
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
