"""Costs against integers derived by hand."""

from __future__ import annotations

import csv

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from filterfold import zoo
from filterfold.errors import ModelError
from filterfold.graph import trace_and_measure
from filterfold.profiling.macs import Counting, measure

# (layer, example, kind, weights, uses); uses derived by hand: output positions of a convolution,
# input positions of a transposed one, rows of a linear layer, per example
LAYERS = [
    (nn.Conv2d(4, 6, 3), (5, 4, 8, 8), "conv2d", 6 * 4 * 9, 6 * 6),
    (nn.Conv2d(4, 6, 3, padding=1, stride=2), (5, 4, 9, 9), "conv2d", 6 * 4 * 9, 5 * 5),
    (nn.Conv2d(4, 6, (3, 1), padding="same"), (1, 4, 8, 8), "conv2d", 6 * 4 * 3, 8 * 8),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (1, 4, 8, 8), "conv2d", 6 * 4 * 9, 8 * 8),
    (nn.Conv2d(4, 6, 3, dilation=2, bias=False), (1, 4, 8, 8), "conv2d", 6 * 4 * 9, 4 * 4),
    (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 8, 8), "conv2d", 6 * 2 * 9, 6 * 6),
    (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 8, 8), "conv2d", 8 * 1 * 9, 6 * 6),
    (nn.Conv1d(4, 6, 3), (2, 4, 8), "conv1d", 6 * 4 * 3, 6),
    (nn.Conv3d(4, 6, 3), (2, 4, 5, 6, 7), "conv3d", 6 * 4 * 27, 3 * 4 * 5),
    (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 8, 8), "conv_transpose2d", 4 * 6 * 9, 8 * 8),
    (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 8, 8), "conv_transpose2d", 4 * 3 * 9, 8 * 8),
    (nn.ConvTranspose1d(4, 6, 3), (2, 4, 8), "conv_transpose1d", 4 * 6 * 3, 8),
    (nn.ConvTranspose3d(4, 6, 3), (2, 4, 3, 4, 5), "conv_transpose3d", 4 * 6 * 27, 3 * 4 * 5),
    (nn.Linear(4, 6), (3, 4), "linear", 24, 1),
    (nn.Linear(4, 6), (3, 5, 4), "linear", 24, 5),
]


@pytest.mark.parametrize(("layer", "shape", "kind", "weights", "uses"), LAYERS, ids=lambda value: str(value))
def test_single_layers(layer, shape, kind, weights, uses):
    cost = measure(layer, torch.randn(shape))
    (row,) = cost.layers
    assert (row.kind, row.tensor, row.weights, row.uses) == (kind, "weight", weights, uses)
    assert row.shape == tuple(layer.weight.shape)
    assert row.macs == weights * uses == cost.macs
    bias = 0 if layer.bias is None else layer.bias.numel()
    assert (cost.weights, cost.parameters) == (weights, weights + bias)
    assert cost.uncounted == ()


class Functional(nn.Module):
    """Raw parameters, standardised weights, plain products, a weight on the left, a shared layer."""

    def __init__(self):
        super().__init__()
        self.raw = nn.Parameter(torch.randn(5, 3, 3, 3))
        self.standard = nn.Conv2d(5, 7, 1, bias=False)
        self.matrix = nn.Parameter(torch.randn(7, 4))
        self.mixer = nn.Parameter(torch.randn(2, 4))
        self.shared = nn.Conv2d(3, 3, 1, bias=False)
        self.register_buffer("blur", torch.ones(3, 1, 3, 3))

    def forward(self, x):
        x = self.shared(self.shared(x))  # 9 weights, 2 x 64 uses
        x = F.conv2d(x, self.blur, padding=1, groups=3)  # 27 elements, 64 uses; no parameter
        x = F.conv2d(x, self.raw)  # 135 weights, 36 uses
        weight = self.standard.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
        x = F.conv2d(x, weight).flatten(2)  # 35 weights, 36 uses
        x = x.transpose(1, 2) @ self.matrix  # 28 weights, 36 uses
        return self.mixer @ x.transpose(1, 2)  # 8 weights, 36 uses


@pytest.mark.parametrize("batch", [1, 3])
def test_functional_layers(batch):
    cost = measure(Functional(), torch.randn(batch, 3, 8, 8))
    uses = {layer.tensor: (layer.weights, layer.uses) for layer in cost.layers}
    assert uses == {
        "shared.weight": (9, 128),
        "blur": (27, 64),
        "raw": (135, 36),
        "standard.weight": (35, 36),
        "matrix": (28, 36),
        "mixer": (8, 36),
    }
    assert cost.macs == 9 * 128 + 27 * 64 + (135 + 35 + 28 + 8) * 36
    assert cost.weights == cost.parameters == 9 + 135 + 35 + 28 + 8
    assert cost.activation_macs == 0


# Li et al. (2017), section 4: layer ids count from 1, blocks' first convolutions are the even ones
RESNETS = {
    "resnet56": (56, (0, 0, 0), ()),
    "resnet56-pruned-A": (56, (1, 1, 1), (16, 20, 38, 54)),
    "resnet56-pruned-B": (56, (6, 3, 1), (16, 18, 20, 34, 38, 54)),
    "resnet110": (110, (0, 0, 0), ()),
    "resnet110-pruned-A": (110, (5, 0, 0), (36,)),
    "resnet110-pruned-B": (110, (5, 4, 3), (36, 38, 74)),
}
VGGS = {
    "vgg16": [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512, 512],
    "vgg16-pruned-A": [32, 64, 128, 128, 256, 256, 256, 256, 256, 256, 256, 256, 256, 512],
}


@pytest.mark.parametrize("name", [*VGGS, *RESNETS])
def test_counts_of_li_et_al_to_the_unit(reference, name):
    with (reference / "li2017_table1.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["model"] == name)
    if name in VGGS:
        model = zoo.build_vgg(widths=VGGS[name])
    else:
        depth, tenths, skipped = RESNETS[name]
        blocks = (depth - 2) // 2
        stages = [(16, 32, 64)[3 * block // blocks] for block in range(blocks)]
        pruned = [0 if 2 * block + 2 in skipped else tenths[3 * block // blocks] for block in range(blocks)]
        model = zoo.build_resnet(depth, inner=[c * (10 - p) // 10 for c, p in zip(stages, pruned, strict=True)])
    cost = measure(model, torch.zeros(1, 3, 32, 32))
    assert (cost.macs, cost.weights) == (int(row["macs_exact"]), int(row["weights_exact"]))
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (cost.activation_macs, cost.uncounted) == (0, ())


def test_attention_is_told_apart():
    cost = measure(nn.MultiheadAttention(8, 2, batch_first=True), tuple([torch.randn(3, 4, 8)] * 3))
    uses = {layer.tensor: (layer.weights, layer.uses) for layer in cost.layers}
    assert uses == {"in_proj_weight": (24 * 8, 4), "out_proj.weight": (8 * 8, 4)}
    assert cost.activation_macs == 2 * (4 * 4 * 8)  # scores and values: 4 queries x 4 keys x 8 channels


def test_weight_normalisation_belongs_to_the_direction():
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3))
    (row,) = measure(layer, torch.randn(1, 4, 8, 8)).layers
    assert (row.tensor, row.uses) == ("parametrizations.weight.original1", 36)


def test_what_has_no_formula_is_reported():
    cost = measure(nn.LSTM(4, 6, batch_first=True), torch.randn(2, 5, 4))
    assert cost.macs > 0 or cost.uncounted


def test_inputs_may_be_mappings():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(5, 2)

        def forward(self, left, right):
            return self.a(left) + self.b(right)

    cost = measure(Two(), {"right": torch.randn(4, 5), "left": torch.randn(4, 3)})
    assert cost.macs == 6 + 10


def test_nothing_is_left_behind():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    net[1].eval()
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    grad, rng = net[0].weight.grad.clone(), torch.get_rng_state()
    fast = torch.backends.mha.get_fastpath_enabled()
    measure(net, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert [module.training for module in net.modules()] == [True, True, False, True]
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(net[0].weight.grad, grad)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    net(torch.randn(2, 3, 8, 8)).sum().backward()  # parameters still take part in training


class Caching(nn.Module):
    """Keeps what it computed from its weights for the next call in eval mode, as LeViT does."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        self.cached = {}
        self.register_buffer("table", None)

    def forward(self, x):
        self.cached.setdefault("weight", self.conv.weight * 2)
        self.table = self.cached["weight"] + 1
        self.last = x
        return nn.functional.conv2d(x, self.cached["weight"])


def test_caches_are_not_left_behind():
    net = Caching()
    assert measure(net, torch.zeros(1, 3, 4, 4)).macs == 3 * 2 * 16
    assert (net.cached, net.table, hasattr(net, "last")) == ({}, None, False)


def test_a_failing_model_is_named_in_one_line():
    with pytest.raises(ModelError, match=r"^Conv2d can't be run on the example inputs: [^\n]+$"):
        measure(nn.Conv2d(3, 4, 3), torch.randn(1, 5, 8, 8))


def test_the_table_can_be_read():
    text = str(measure(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2)), torch.zeros(1, 3, 3, 3)))
    assert text.splitlines() == [
        "layer  kind    shape    MACs  weights",
        "0      conv2d  8x3x3x3   216      216",
        "2      linear  2x8        16       16",
        "total                    232      232",
        "242 parameters in all",
    ]


def test_pytorch_s_fast_attention_is_as_before_however_often_the_count_is_entered():
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        for wanted in (True, False):
            torch.backends.mha.set_fastpath_enabled(wanted)
            measure(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()), torch.zeros(1, 3, 4, 4))
            measure(nn.Bilinear(2, 3, 4), (torch.zeros(1, 2), torch.zeros(1, 3)))
            measure(Square(), torch.zeros(1, 4))
            assert torch.backends.mha.get_fastpath_enabled() == wanted
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class Square(nn.Module):
    """A product that arrives as an operation of its own, to be taken apart."""

    def forward(self, x):
        return torch.einsum("bi,bj->bij", x, x)


def test_a_count_that_rides_along_equals_a_measurement():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 2)
    )
    inputs = torch.randn(1, 3, 4, 4)
    with torch.inference_mode(), Counting(net.eval()) as counting:
        net(inputs)
    assert counting.cost() == measure(net, inputs)
    assert counting.cost().macs == 4 * 27 * 4 + 32
    assert (
        trace_and_measure(net, inputs)[1]
        == trace_and_measure(net, inputs.repeat(3, 1, 1, 1))[1]
        == measure(net, inputs)
    )
