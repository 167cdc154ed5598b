"""Numbers that follow from a width, other than sizes: they change with a cut, and with them what the network computes.

The oracle: half of every layer is dead (zero filters, zero biases). Cutting exactly the dead half must leave the output
as it is, unless the group is said to be inexact.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import filterfold as ff
from filterfold.surgery.masking import emptied
from filterfold.surgery.weight_norms import normed_weights

from .networks import call, masked, randomise

pytestmark = pytest.mark.filterwarnings("ignore:.*_norm. is deprecated:FutureWarning")  # the old hooks are meant


class Net(nn.Module):
    """A function of a module and its input, and the layers that it uses."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def attention(logits: Callable[[Any, Tensor, Tensor], Tensor]) -> nn.Module:
    """Attention over positions; `logits` multiplies queries and keys."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x).relu()
        q, k, v = (layer(x).flatten(2) for layer in (m.q, m.k, m.v))
        return m.b((v @ logits(m, q, k).softmax(-1).transpose(1, 2)).view_as(x) + x)

    layers = {"a": (3, 16), "q": (16, 8), "k": (16, 8), "v": (16, 16), "b": (16, 4)}
    return Net(run, dk=8, **{name: nn.Conv2d(*sizes, 1) for name, sizes in layers.items()})


def gated(gate: Callable[[Any, Tensor], Any]) -> nn.Module:
    """A convolution multiplied by something, beside an ordinary one."""
    layers = {"a": (3, 16), "c": (16, 8), "b": (8, 4)}
    return Net(
        lambda m, x: m.b(m.c((y := m.a(x)) * gate(m, y)).relu()),
        width=16,
        **{name: nn.Conv2d(*sizes, 1) for name, sizes in layers.items()},
    )


def with_dead_halves(model: nn.Module) -> nn.Module:
    randomise(model)
    with torch.no_grad():
        for layer in model.children():
            if layer.weight.shape[0] > 4:
                layer.weight[: len(layer.weight) // 2] = 0
                layer.bias[: len(layer.bias) // 2] = 0
    return model


DEPENDS = "a number follows from how many there are"

# name -> (network, group that the number belongs to, whether it must be left whole)
NUMBERS: dict[str, tuple[Callable[[], nn.Module], str, bool]] = {
    "root of a shape": (
        lambda: attention(lambda m, q, k: q.transpose(1, 2) @ k / math.sqrt(q.shape[1])), "q", True),
    "root on the queries": (lambda: attention(lambda m, q, k: (q * q.size(1) ** -0.5).transpose(1, 2) @ k), "q", True),
    "attribute": (
        lambda: attention(
            lambda m, q, k: q.view(len(q), m.dk, -1).transpose(1, 2) @ k.view(len(k), m.dk, -1) * m.dk**-0.5
        ), "q", True),
    "literal tensor": (
        lambda: attention(lambda m, q, k: q.transpose(1, 2) @ k / torch.tensor(float(q.shape[1])).sqrt()), "q", True),
    "einsum": (lambda: attention(lambda m, q, k: torch.einsum("bcn,bcm->bnm", q, k) / q.shape[1]), "q", True),
    "constant": (lambda: attention(lambda m, q, k: q.transpose(1, 2) @ k * 0.3), "q", False),
    "cosine": (
        lambda: attention(lambda m, q, k: F.normalize(q, dim=1).transpose(1, 2) @ F.normalize(k, dim=1)), "q", False),
    "sum by count": (
        lambda: gated(lambda m, y: (y.sum(1, keepdim=True) / y.shape[1]).sigmoid()), "a", True),
    "sum": (lambda: gated(lambda m, y: y.sum(1, keepdim=True).sigmoid()), "a", False),
    "factor of a width": (lambda: gated(lambda m, y: y.shape[1] ** 0.5), "a", True),
    "factor of an attribute": (lambda: gated(lambda m, y: 1 / y.view(len(y), m.width, 8, 8).shape[1]), "a", True),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_dead_units_leave_the_output_as_it_is(name: str) -> None:
    build, group, whole = NUMBERS[name]
    model = with_dead_halves(build())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    before = call(model, x)
    result = ff.prune(model, x, keep=0.5)
    torch.testing.assert_close(call(model, x), before, rtol=1e-9, atol=1e-10)
    assert (group in result.frozen) == whole
    assert DEPENDS in result.frozen.get(group, DEPENDS)
    assert all(group in result.frozen or new * 2 == old for group, (old, new) in result.plan.widths.items())


class Heads(nn.Module):
    """Attention with queries, keys and values of one layer, and a temperature from the size of a head."""

    def __init__(self, *, gain: float = 1.0) -> None:
        super().__init__()
        self.heads, self.size = 4, 8
        self.a, self.qkv, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 96, 1), nn.Conv2d(32, 4, 1)
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        parts = self.qkv(self.a(x).relu()).view(n, self.heads, 3 * self.size, h * w).split([self.size] * 3, 2)
        q, k, v = parts
        logits = (q.transpose(2, 3) @ k) * self.size**-0.5 * self.gain
        return self.b((v @ logits.softmax(-1).transpose(2, 3)).reshape(n, -1, h, w))


@pytest.mark.parametrize("gain", [1.0, 1e-9])
def test_whole_heads_go_where_the_temperature_follows_from_their_size(gain: float) -> None:
    # At the small gain no comparison of outputs can see the temperature: the number itself must be looked at.
    model = randomise(Heads(gain=gain))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    whole = copy.deepcopy(model)
    result = ff.prune(model, x, keep=0.5)
    assert (model.heads, model.size, model.qkv.out_channels) == (2, 8, 48)
    torch.testing.assert_close(call(model, x), call(masked(whole, result.plan), x))


@pytest.mark.parametrize("gate", ["mean", "std", "amax"])
def test_statistics_over_channels_are_said_to_be_inexact(gate: str) -> None:
    model = with_dead_halves(gated(lambda m, y: getattr(y, gate)(1, keepdim=True).sigmoid()))
    group = ff.trace(model, torch.randn(1, 3, 8, 8, dtype=torch.float64)).by_name["a"]
    assert not group.exact
    assert not group.zeros_vanish
    assert "reduced over" in str(group.remark)


def test_a_length_of_a_kernel_written_out_is_said_to_be_inexact() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return F.conv2d(m.a(x).relu(), m.w / m.w.pow(2).sum((1, 2, 3), keepdim=True).sqrt())

    model = Net(run, a=nn.Conv2d(3, 8, 1), w=nn.Parameter(torch.ones(4, 8, 1, 1)))
    group = ff.trace(model, torch.randn(1, 3, 8, 8)).by_name["a"]
    assert (group.exact, group.zeros_vanish) == (False, False)


def test_zeros_that_do_not_stay_zeros_are_judged_by_permutation() -> None:
    model = attention(lambda m, q, k: (F.elu(q) + 1).transpose(1, 2) @ (F.elu(k) + 1) * 0.1)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    result = ff.prune(with_dead_halves(model), x, keep=0.5)
    assert result.verified is not None
    assert result.verified.inexact == ("q",)
    assert result.plan.widths["q"] == (8, 4)


WRAPS = {
    "weight norm, hook": nn.utils.weight_norm,
    "weight norm, parametrised": nn.utils.parametrizations.weight_norm,
    "weight norm over all": lambda layer: nn.utils.parametrizations.weight_norm(layer, dim=None),
    "spectral norm, hook": nn.utils.spectral_norm,
    "spectral norm, parametrised": nn.utils.parametrizations.spectral_norm,
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", WRAPS)
def test_kernels_that_are_divided_by_their_length_keep_their_values(name: str, transposed: bool) -> None:
    torch.manual_seed(0)
    kind = nn.ConvTranspose1d if transposed else nn.Conv1d
    layers = [nn.Conv1d(3, 12, 3, padding=1), kind(12, 8, 3, padding=1), kind(8, 2, 1)]
    model = nn.Sequential(layers[0], nn.ReLU(), WRAPS[name](layers[1]), nn.ReLU(), WRAPS[name](layers[2])).double()
    x = torch.randn(2, 3, 10, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(30):
            model(x)  # the estimates of spectral norms settle
        model.eval()(x)
        weights = [model[place].weight.detach().clone() for place in (0, 2, 4)]
    result = ff.prune(model, x, keep=0.5, criterion="random", strict=True)
    with torch.no_grad():
        model(x)
    kept = [[unit for unit, new in enumerate(cut.assignment) if new >= 0] for cut in result.plan.cuts]
    inputs, outputs = (0, 1) if transposed else (1, 0)
    middle = weights[1].index_select(outputs, torch.tensor(kept[1])).index_select(inputs, torch.tensor(kept[0]))
    torch.testing.assert_close(model[2].weight.detach(), middle)
    torch.testing.assert_close(model[4].weight.detach(), weights[2].index_select(inputs, torch.tensor(kept[1])))
    assert len(list(normed_weights(model, dict(model.named_parameters())))) == 2
    assert all(group.exact for group in result.groups)
    model.train()(x).sum().backward()


def test_emptied_gives_everything_back() -> None:
    model = nn.Sequential(
        nn.Conv1d(3, 6, 1), nn.BatchNorm1d(6), nn.utils.parametrizations.spectral_norm(nn.Conv1d(6, 2, 1))
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = ff.trace(model, torch.randn(2, 3, 4))
    plan = ff.select(groups, ff.score(groups, model, "l1"), keep=0.5)
    with emptied(model, plan.cuts):
        assert int((model[0].weight.abs().sum((1, 2)) == 0).sum()) == 3
        assert int((model[1].weight == 0).sum()) == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
