"""Single layers at any widths: what they compute, how they are timed, what the table keeps."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

from filterfold.errors import ConfigError
from filterfold.profiling import LayerCall, LayerTimes, friendly_step, layer_calls, wasted_widths

from .machines import Machine

CPU, FLOAT = torch.device("cpu"), torch.float32


@pytest.fixture
def machine():
    return Machine()


class Everything(nn.Module):
    """Every kind of layer that is timed alone, and uses that are not."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding="same", groups=2, bias=False)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, dilation=1, groups=8)
        self.up = nn.ConvTranspose2d(16, 6, 2, stride=2, groups=2)
        self.line = nn.Conv1d(6, 4, 3)
        self.head = nn.Linear(4, 5)
        self.raw = nn.Parameter(torch.randn(5, 5))

    def forward(self, x):
        x = self.up(self.depthwise(self.grouped(self.plain(x))))
        x = self.head(self.line(x.flatten(2)).mean(2))
        return nn.functional.linear(x, self.raw[:4])  # a part of a weight


def test_calls_of_every_kind():
    torch.manual_seed(0)
    model, x = Everything().train(), torch.randn(2, 3, 8, 8)
    calls = layer_calls(model, x)
    assert [(call.tensor, call.op, call.data, call.weight, call.bias) for call in calls] == [
        ("plain.weight", "conv2d", (1, 3, 8, 8), (8, 3, 3, 3), True),
        ("grouped.weight", "conv2d", (1, 8, 4, 4), (8, 4, 3, 3), False),
        ("depthwise.weight", "conv2d", (1, 8, 4, 4), (16, 1, 3, 3), True),
        ("up.weight", "conv_transpose2d", (1, 16, 4, 4), (16, 3, 2, 2), True),
        ("line.weight", "conv1d", (1, 6, 64), (4, 6, 3), True),
        ("head.weight", "linear", (1, 4), (5, 4), True),
    ]
    assert dict(calls[0].options)["stride"] == (2, 2)
    assert dict(calls[1].options)["padding"] == "same"
    assert model.training


@pytest.mark.parametrize(
    ("layer", "narrow", "shape"),
    [
        (nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(2, 5, 3, stride=2), (1, 2, 9, 9)),
        (nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(4, 6, 3, groups=2), (1, 4, 9, 9)),
        (nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(5, 10, 3, groups=5), (1, 5, 9, 9)),
        (nn.ConvTranspose2d(8, 6, 2, groups=2), nn.ConvTranspose2d(4, 2, 2, groups=2), (1, 4, 9, 9)),
        (nn.Linear(8, 4), nn.Linear(3, 2), (1, 3)),
    ],
)
def test_a_call_at_other_widths_is_that_of_a_narrower_layer(layer, narrow, shape):
    wide = torch.zeros(1, layer.weight.shape[1] * getattr(layer, "groups", 1), *shape[2:])
    if isinstance(layer, nn.ConvTranspose2d):
        wide = torch.zeros(1, layer.in_channels, *shape[2:])
    (call,) = layer_calls(layer, wide)
    (expected,) = layer_calls(narrow, torch.zeros(shape))
    assert call.at(tuple(narrow.weight.shape)) == expected
    outputs = []
    times = LayerTimes(CPU, FLOAT, 4, timer=lambda run, count: outputs.append(run()) or 1.0, folder=False)
    times.seconds(call.at(tuple(narrow.weight.shape)))
    assert outputs[0].shape == (4, *narrow(torch.zeros(shape)).shape[1:])


def test_a_layer_is_measured_once_and_kept_on_disk(tmp_path, machine):
    call = LayerCall("a.weight", "linear", (1, 16), (32, 16), True, ())
    times = LayerTimes(CPU, FLOAT, 4, timer=machine, folder=tmp_path)
    assert times.seconds(call) == pytest.approx(1e-9 * 4 * 16 * 32)
    runs = machine.runs
    assert times.seconds(dataclasses.replace(call, tensor="b.weight")) == times.seconds(call)
    assert (machine.runs, times.measured) == (runs, 1)
    times.save()
    again = LayerTimes(CPU, FLOAT, 4, timer=machine, folder=tmp_path)
    assert again.seconds(call) == times.seconds(call)
    assert (machine.runs, again.measured) == (runs, 0)
    other = LayerTimes(CPU, FLOAT, 8, timer=machine, folder=tmp_path)
    assert other.seconds(call) == pytest.approx(2 * times.seconds(call))


def test_times_belong_to_threads_and_data_type(tmp_path, machine):
    call = LayerCall("a.weight", "linear", (1, 16), (32, 16), True, ())
    threads = torch.get_num_threads()
    for dtype, count in ((FLOAT, threads), (torch.float64, threads), (FLOAT, threads + 1)):
        torch.set_num_threads(count)
        try:
            times = LayerTimes(CPU, dtype, 4, timer=machine, folder=tmp_path)
            times.seconds(call)
            assert times.measured == 1
            times.save()
        finally:
            torch.set_num_threads(threads)
    assert len(list(tmp_path.glob("*.json"))) == 3


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 1}', '{"format": 99, "seconds": {}}'])
def test_a_damaged_table_is_measured_anew(tmp_path, machine, damage):
    call = LayerCall("a.weight", "linear", (1, 16), (32, 16), True, ())
    times = LayerTimes(CPU, FLOAT, 4, timer=machine, folder=tmp_path)
    times.seconds(call)
    times.save()
    (file,) = tmp_path.iterdir()
    whole = file.read_text()
    file.write_text(damage)
    again = LayerTimes(CPU, FLOAT, 4, timer=machine, folder=tmp_path)
    again.seconds(call)
    assert again.measured == 1
    again.save()
    assert json.loads(file.read_text()) == json.loads(whole)


def test_the_fastest_of_five_blocks_counts():
    taken = iter([9.0, 9.0, 5.0, 3.0, 4.0, 7.0, 6.0])  # to warm up, to see how long it takes, five blocks
    times = LayerTimes(CPU, FLOAT, 1, timer=lambda run, count: next(taken), folder=False)
    assert times.seconds(LayerCall("a", "linear", (1, 2), (2, 2), False, ())) == 3.0


def test_channels_last_layers():
    seen = []
    times = LayerTimes(CPU, FLOAT, 2, channels_last=True, timer=lambda r, n: seen.append(r()) or 1.0, folder=False)
    times.seconds(LayerCall("a", "conv2d", (1, 4, 5, 5), (4, 4, 3, 3), False, ()))
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in seen)
    with pytest.raises(ConfigError, match="batch_size=0: must be at least 1"):
        LayerTimes(CPU, FLOAT, 0)


def test_what_the_hardware_likes():
    assert [friendly_step(size, CPU) for size in (2048, 64, 63, 32, 16, 8, 4, 3, 1)] == [16, 16, 8, 8, 4, 2, 1, 1, 1]
    assert [friendly_step(size, torch.device("cuda")) for size in (2048, 32, 16)] == [8, 8, 4]


def odd() -> nn.Sequential:
    """Widths 3 → 30 → 32 → 17 → 10."""
    layers = [nn.Conv2d(3, 30, 3), nn.ReLU(), nn.Conv2d(30, 32, 1), nn.Conv2d(32, 17, 1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(17, 10))


def test_odd_widths_waste_what_they_saved_on_a_machine_with_blocks():
    found = wasted_widths(odd(), torch.zeros(1, 3, 3, 3), batch_size=2, timer=Machine(block=16))
    assert [line.split(" channels")[0] for line in found] == ["0: 3 -> 30", "2: 30 -> 32", "3: 32 -> 17", "5: 17 -> 10"]
    # one position, two examples, 32·32 weights in blocks
    assert found[1] == "2: 30 -> 32 channels take 0.002048 ms, 32 -> 32 would take 0.002048 ms"


def test_no_width_is_wasted_where_time_is_arithmetic():
    assert wasted_widths(odd(), torch.zeros(1, 3, 3, 3), batch_size=2, timer=Machine(block=1)) == ()
