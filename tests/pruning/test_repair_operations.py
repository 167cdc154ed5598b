"""Repair of every kind of operation, against least squares on inputs that are taken apart by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from filterfold.graph import trace
from filterfold.plan import Plan
from filterfold.pruning.budgets import select
from filterfold.pruning.reconstruction import repair
from filterfold.surgery.apply import apply


class Padded(nn.Conv2d):
    """Pads in its own forward, as timm's `Conv2dSame` does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 1, 0)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Functional(nn.Module):
    """Calls an operation on a parameter of its own."""

    def __init__(self, shape: tuple[int, ...], function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(shape) / 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.kernel)


def flat(x: Tensor) -> Tensor:
    return x.flatten(2).mT


READERS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "1d": (1, lambda: nn.Conv1d(8, 4, 3, stride=2, padding=1, dilation=2)),
    "2d": (2, lambda: nn.Conv2d(8, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))),
    "2d, even, same": (2, lambda: nn.Conv2d(8, 4, (2, 3), padding="same")),
    "2d, grouped": (2, lambda: nn.Conv2d(8, 6, 3, groups=2, bias=False)),
    "2d, circular": (2, lambda: nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular")),
    "3d": (3, lambda: nn.Conv3d(8, 3, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1))),
    "subclass": (2, lambda: Padded(8, 4, 3)),
    "functional": (2, lambda: Functional((4, 8, 3, 3), lambda x, k: F.conv2d(x, k, padding=1))),
    "transposed 1d": (1, lambda: nn.ConvTranspose1d(8, 4, 4, stride=3, padding=2, output_padding=1)),
    "transposed 2d": (2, lambda: nn.ConvTranspose2d(8, 4, (3, 2), stride=2, padding=(1, 0), dilation=(2, 1))),
    "transposed 2d, grouped": (2, lambda: nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, groups=2, bias=False)),
    "transposed 3d": (3, lambda: nn.ConvTranspose3d(8, 3, 2, stride=(1, 2, 2))),
    "matrix": (2, lambda: Functional((8, 5), lambda x, k: flat(x) @ k)),
    "matrix from the left": (2, lambda: Functional((5, 8), lambda x, k: k @ x.flatten(2))),
    "matrix, turned": (2, lambda: Functional((5, 8), lambda x, k: flat(x) @ k.t())),
    "einsum": (2, lambda: Functional((5, 8), lambda x, k: torch.einsum("bchw,oc->bohw", x, k))),
    "kernel as a matrix": (2, lambda: Functional((5, 8, 1, 1), lambda x, k: F.linear(flat(x), k.flatten(1)))),
}


def network(kind: str) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    axes, make = READERS[kind]
    first = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](3, 8, 2)
    model = nn.Sequential(first, nn.Tanh(), make()).double().eval()
    return model, torch.randn(8, 3, *((24,), (8, 7), (4, 4, 5))[axes - 1], dtype=torch.float64)


def halved(model: nn.Module, x: Tensor, group: str = "0") -> Plan:
    """Keep the first half of a group's units: of a grouped reader, those that come first in every group."""
    (found,) = (entry for entry in trace(model, x[:1]) if entry.name == group)
    assert found.frozen is None, found.frozen
    plan = select([found], {group: torch.arange(found.size, 0, -1.0).double()}, keep={group: 0.5})
    apply(plan, model)
    return plan


def jacobian(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer that is linear in its parameters multiplies them with: its outputs' derivatives, by autograd."""
    names = [name for name, _ in layer.named_parameters()]
    values = tuple(value.detach() for value in layer.parameters())

    def call(*given: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, given, strict=True)), (x,)).flatten()

    found = torch.autograd.functional.jacobian(call, values, vectorize=True)
    return torch.cat([part.flatten(1) for part in found], 1), torch.cat([value.flatten() for value in values])


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("kind", READERS)
def test_every_kind_is_least_squares_on_what_it_reads(kind: str) -> None:
    """The oracle knows nothing of geometry: it takes the layer as a linear function of its parameters."""
    model, x = network(kind)
    original = copy.deepcopy(model)
    plan = halved(model, x)
    with torch.no_grad():
        read, wanted = model[:2](x), original(x).flatten()
    matrix, _ = jacobian(model[2], read)
    best = torch.linalg.lstsq(matrix, wanted[:, None], driver="gelsd").solution.squeeze(1)
    found = repair(model, original, plan, [x[:5], x[5:]], ridge=1e-10)
    assert not found.skipped
    (row,) = found.layers
    left = wanted - model(x).detach().flatten()
    assert torch.allclose(left, wanted - matrix @ best, atol=1e-6)
    assert row.after < row.before
    assert row.after == pytest.approx(float(left.norm() / wanted.norm()), rel=1e-4)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("kind", READERS)
def test_channels_that_others_determine_are_not_missed(kind: str) -> None:
    model, x = network(kind)
    with torch.no_grad():
        groups = dict(enumerate(owners(model, x)))
        kept = sorted(set(groups.values()))
        assert len(kept) == 4
        for unit, other in groups.items():
            if unit != other:
                model[0].weight[unit], model[0].bias[unit] = model[0].weight[other], model[0].bias[other]
    original, fresh = copy.deepcopy(model), torch.randn_like(x)
    plan = halved(model, x)
    assert (model(fresh) - original(fresh)).norm() > 0.1 * original(fresh).norm()
    repair(model, original, plan, [x], ridge=1e-12)
    assert (model(fresh) - original(fresh)).norm() < 1e-5 * original(fresh).norm()


def owners(model: nn.Module, x: Tensor) -> list[int]:
    """For every channel a kept one that can stand for it: itself, or one that the same group of the reader reads."""
    cut, groups = copy.deepcopy(model), getattr(model[2], "groups", 1)
    plan = halved(cut, x)
    (part,) = [p for p in plan.cuts[0].producers if p.tensor == "0.weight"]
    kept = [place for place, unit in enumerate(part.units) if plan.cuts[0].assignment[unit] >= 0]
    size = 8 // groups
    return [c if c in kept else [k for k in kept if k // size == c // size][c % (4 // groups)] for c in range(8)]
