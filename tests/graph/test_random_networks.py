"""Random networks built from the constructs: whatever is cut equals the masked network in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import filterfold.surgery.apply as surgery
from filterfold.errors import SelectionError
from filterfold.graph import trace
from filterfold.plan import Plan
from filterfold.pruning.prune import Scoring, prune

from .networks import call, check, cut, dead, flatten, half, masked, randomise

KINDS = (
    "conv", "conv", "grouped", "depthwise", "norm", "prelu", "residual", "projected", "padded", "concat", "dense",
    "excite", "spatial gate", "shuffle", "halves", "slices", "flip", "maxout", "pixel shuffle", "transposed",
    "group norm", "layer norm", "layer scale", "pool", "upsample", "shared", "functional", "stack", "written",
    "weight norm", "spectral norm", "attention", "recurrent", "constants",
)  # fmt: skip


OWN_SIZES = ("heads", "local split")
"""Constructs whose code has sizes of its own, which `prune` rewrites or ties."""


NORMED = ("weight norm", "spectral norm")
"""Weights whose gradients go through a length of their own: after a cut they are equal, their gradients are not."""

pytestmark = pytest.mark.filterwarnings("ignore:.*_norm. is deprecated:FutureWarning")  # the old hooks are meant


class Piece(nn.Module):
    """One construct: `width` channels in, `self.width` out."""

    def __init__(self, kind: str, width: int, choice: int) -> None:
        super().__init__()
        self.kind, self.choice = kind, choice
        self.width = new = width
        self.other = 2 + choice % 5
        if kind in ("conv", "transposed"):
            new = self.other * 2
            self.a = nn.Conv2d(width, new, 3, padding=1) if kind == "conv" else nn.ConvTranspose2d(width, new, 1)
        elif kind == "grouped":
            groups = 2 if width % 2 == 0 else 1
            new = groups * self.other
            self.a = nn.Conv2d(width, new, 3, padding=1, groups=groups)
        elif kind == "depthwise":
            new = width * (1 + choice % 2)
            self.a = nn.Conv2d(width, new, 3, padding=1, groups=width, bias=choice % 3 == 0)
        elif kind in ("residual", "shared", "dense", "stack", "written", "concat"):
            out = width if kind in ("residual", "shared", "stack") else self.other
            self.a = nn.Conv2d(width, out, 3, padding=1)
            self.b = nn.Conv2d(width, out, 1)
            new = {"dense": width + out, "concat": 2 * out, "written": 2 * out}.get(kind, width)
        elif kind == "projected":
            new = self.other
            self.a, self.b = nn.Conv2d(width, new, 3, padding=1), nn.Conv2d(width, new, 1, bias=False)
        elif kind == "padded":
            new = width + 2
            self.a = nn.Conv2d(width, new, 3, padding=1)
        elif kind == "excite":
            self.a, self.b = nn.Conv2d(width, self.other, 1), nn.Conv2d(self.other, width, 1)
        elif kind == "spatial gate":
            self.a = nn.Conv2d(width, 1, 1)
        elif kind in ("halves", "maxout", "slices"):
            new = self.other
            self.a = nn.Conv2d(width, 2 * new + (kind == "slices"), 1)
            self.cut = new
        elif kind == "pixel shuffle":
            new = self.other
            self.a = nn.Conv2d(width, 4 * new, 1)
        elif kind == "functional":
            new = self.other
            self.a = nn.Parameter(torch.ones(new, width, 1, 1))
        elif kind in NORMED:
            new = self.other
            old = choice % 2 == 0  # by hook, or by parametrisation
            wraps = nn.utils if old else nn.utils.parametrizations
            wrap = wraps.weight_norm if kind == "weight norm" else wraps.spectral_norm
            self.a = wrap(nn.Conv2d(width, new, 3, padding=1))
            with torch.no_grad():
                self.a(torch.zeros(1, width, 1, 1))  # else an old hook's weight has a graph, and can't be copied
        elif kind == "recurrent":
            new = self.other
            self.a = (nn.GRU, nn.LSTM, nn.RNN)[choice % 3](width, new)
        elif kind == "heads":
            self.heads, self.size = 2 + choice % 2, self.other
            self.a = nn.Conv2d(width, 3 * self.heads * self.size, 1)
            new = self.heads * self.size
        elif kind == "local split":
            self.a, self.b = nn.Conv2d(width, 2 * width + 2, 1), nn.Conv2d(width, width, 3, padding=1)
        elif kind == "attention":
            self.a, self.b, self.c = (nn.Conv2d(width, size, 1) for size in (self.other, self.other, width))
        elif kind == "layer scale":
            self.a = nn.Parameter(torch.ones(width, 1, 1))
        elif kind in ("norm", "group norm", "layer norm", "prelu"):
            parts = next(count for count in (3, 2, 1) if width % count == 0)
            self.a = {
                "norm": lambda: nn.BatchNorm2d(width), "group norm": lambda: nn.GroupNorm(parts, width),
                "layer norm": lambda: nn.LayerNorm(width), "prelu": lambda: nn.PReLU(width),
            }[kind]()  # fmt: skip
        self.width = new

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, "run_" + self.kind.replace(" ", "_"), self.run_layer)(x)

    def run_layer(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x)) if self.choice % 2 else self.a(x)

    def run_residual(self, x: Tensor) -> Tensor:
        return x + self.b(F.relu(self.a(x)))

    def run_projected(self, x: Tensor) -> Tensor:
        return self.a(x).add_(self.b(x)).relu_()

    def run_padded(self, x: Tensor) -> Tensor:
        return self.a(x) + F.pad(x, (0, 0, 0, 0, 1, 1))

    def run_shared(self, x: Tensor) -> Tensor:
        return self.a(F.relu(self.a(x)))

    def run_concat(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), F.relu(self.b(x))], 1)

    def run_dense(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.a(x)], 1)

    def run_stack(self, x: Tensor) -> Tensor:
        return torch.stack([self.a(x), self.b(x)]).sum(0)

    def run_written(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        out = x.new_zeros(x.shape[0], a.shape[1] + b.shape[1], *x.shape[2:])
        out[:, : a.shape[1]] = a
        out[:, a.shape[1] :] = b
        return out

    def run_excite(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.b(F.relu(self.a(x.mean((2, 3), keepdim=True)))))

    def run_spatial_gate(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.a(x))

    def run_shuffle(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        groups = 2 if c % 2 == 0 else 1
        return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)

    def run_halves(self, x: Tensor) -> Tensor:
        a, b = self.a(x).chunk(2, dim=1)
        return a * torch.tanh(b)

    def run_slices(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return y[:, : self.cut].tanh()

    def run_maxout(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return y.view(y.shape[0], -1, 2, *y.shape[2:]).amax(2)

    def run_flip(self, x: Tensor) -> Tensor:
        return x.flip(1)

    def run_pixel_shuffle(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.pixel_shuffle(self.a(x), 2), 2)

    def run_functional(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.a)

    def run_layer_norm(self, x: Tensor) -> Tensor:
        return self.a(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def run_layer_scale(self, x: Tensor) -> Tensor:
        return self.a * x

    def run_recurrent(self, x: Tensor) -> Tensor:
        """Over the pixels, one after another."""
        states: Tensor = self.a(x.flatten(2).permute(2, 0, 1))[0]
        return states.permute(1, 2, 0).reshape(x.shape[0], -1, *x.shape[2:])

    def run_attention(self, x: Tensor) -> Tensor:
        """A temperature that is fixed, or follows from the width of the queries."""
        q, k, v = (layer(x).flatten(2) for layer in (self.a, self.b, self.c))
        scale = 0.4 if self.choice % 2 else q.shape[1] ** -0.5
        return x + (v @ torch.softmax(q.transpose(1, 2) @ k * scale, -1).transpose(1, 2)).view_as(x)

    def run_heads(self, x: Tensor) -> Tensor:
        """Queries, keys and values of one layer; the temperature is fixed, or follows from the size of a head."""
        n, _, h, w = x.shape
        q, k, v = self.a(x).view(n, self.heads, 3 * self.size, h * w).split([self.size] * 3, 2)
        scale = 0.4 if self.choice % 2 else self.size**-0.5
        return (v @ torch.softmax(q.transpose(2, 3) @ k * scale, -1).transpose(2, 3)).reshape(n, -1, h, w)

    def run_local_split(self, x: Tensor) -> Tensor:
        q, context, gates = self.a(x).split((x.shape[1], x.shape[1], 2), 1)
        return q * (self.b(context) * gates[:, :1] + gates[:, 1:])

    def run_constants(self, x: Tensor) -> Tensor:
        return x * torch.tensor(0.5, dtype=x.dtype) * x.new_tensor([1.0, -2.0]).sum() / x.new_full((1,), 0.1)

    def run_pool(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, 1, 1)

    def run_upsample(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(F.interpolate(x, scale_factor=2), 2)


def network(kinds: list[tuple[str, int]], head: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 6, 3, padding=1)]
    width = 6
    for kind, choice in kinds:
        if kind == "depthwise" and width > 16:
            continue
        piece = Piece(kind, width, choice)
        width = piece.width
        layers.append(piece)
    if head == 0:
        layers += [nn.Flatten(), nn.Linear(16 * width, 3)]
    elif head == 1:
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)]
    else:
        layers += [nn.Conv2d(width, 3, 1)]
    return nn.Sequential(*layers)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kinds=st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 11)), min_size=1, max_size=6),
    head=st.integers(0, 2),
    seed=st.integers(0, 9),
    share=st.sampled_from([0.3, 0.5, 0.8]),
)
@example(kinds=[("group norm", 0), ("dense", 4), ("dense", 4), ("group norm", 0)], head=0, seed=0, share=0.3)
@example(kinds=[("conv", 0), ("dense", 3), ("group norm", 0)], head=0, seed=0, share=0.3)  # a norm across two groups
def test_cut_equals_masked(kinds: list[tuple[str, int]], head: int, seed: int, share: float) -> None:
    images: Any = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    check(network(kinds, head), images, seed, share)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kinds=st.lists(st.tuples(st.sampled_from((*KINDS, *OWN_SIZES)), st.integers(0, 11)), min_size=1, max_size=6),
    head=st.integers(0, 2),
    seed=st.integers(0, 9),
)
@example(kinds=[("attention", 4)], head=2, seed=0)
@example(kinds=[("conv", 3), ("heads", 4)], head=2, seed=0)
@example(kinds=[("conv", 3), ("local split", 1)], head=2, seed=0)
@example(kinds=[("constants", 0), ("heads", 1), ("local split", 0)], head=0, seed=1)
@example(kinds=[("weight norm", 1), ("spectral norm", 2)], head=0, seed=0)
def test_dead_units_leave_without_a_trace(kinds: list[tuple[str, int]], head: int, seed: int) -> None:
    """What `prune` cuts equals the network in which whatever makes the units that go makes zeros."""
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    model = randomise(network(kinds, head), seed)
    groups = trace(model, images)
    judged = [group for group in groups if group.exact or group.zeros_vanish]
    others = [group.name for group in groups if group not in judged]
    if not any(group.frozen is None for group in judged):
        return
    small = copy.deepcopy(model)
    try:
        result = prune(small, images, criterion="random", keep=0.5, scoring=Scoring(seed=seed), ignore=others)
    except SelectionError:
        return  # all that may go is tied to what may not
    torch.testing.assert_close(call(small, images), call(dead(model, result.plan), images), rtol=1e-9, atol=1e-10)


def trained_one_step(model: nn.Module, images: Tensor) -> None:
    """One step of SGD in training mode, on a loss that weighs every output differently."""
    model.train()
    (output,) = flatten(model(images))
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    (output * weights).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01).step()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kinds=st.lists(
        st.tuples(st.sampled_from(sorted(set(KINDS) - set(NORMED))), st.integers(0, 11)), min_size=1, max_size=5
    ),
    head=st.integers(0, 2),
    seed=st.integers(0, 9),
)
def test_a_step_after_the_cut_equals_the_masked_networks_step(
    kinds: list[tuple[str, int]], head: int, seed: int
) -> None:
    images = torch.randn(3, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    model = randomise(network(kinds, head), seed)
    groups = trace(model, images)
    _, plan = cut(model, half(groups, seed), groups, images)
    small, plan = cut(model, Plan(tuple(c for c in plan.cuts if groups.by_name[c.group].exact)), groups, images)
    twin = masked(model, plan)
    for network_ in (small, twin):
        trained_one_step(network_, images)
    surgery.apply(plan, twin)
    expected = dict(twin.state_dict())
    for name, tensor in small.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
