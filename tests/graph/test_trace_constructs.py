"""Every construct that ConvNets are built from: traced, cut by half, and held against the masked network in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import filterfold as ff
from filterfold.graph import trace

from .networks import check, free, part

Forward = Callable[..., Any]


class Net(nn.Module):
    """Layers by keyword, raw parameters as tensors, and a forward function that gets the module first."""

    def __init__(self, forward: Forward, **parts: Any) -> None:
        super().__init__()
        self.run = forward
        for name, value in parts.items():
            setattr(self, name, nn.Parameter(value) if isinstance(value, Tensor) else value)

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)


def image(channels: int = 3, size: int = 8, count: int = 2) -> Tensor:
    return torch.randn(count, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def conv(a: int, b: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, kernel, padding=kernel // 2, **options)


def shuffle(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def standardised(layer: nn.Conv2d, x: Tensor) -> Tensor:
    weight = layer.weight
    flat = weight.flatten(1)
    flat = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, keepdim=True) + 1e-3).sqrt()
    return F.conv2d(x, flat.view_as(weight), layer.bias, padding=1)


def filled(net: Net, x: Tensor) -> Tensor:
    y, z = net.a(x), net.b(x)
    out = torch.zeros(x.shape[0], y.shape[1] + z.shape[1], *y.shape[2:], dtype=x.dtype)
    out[:, : y.shape[1]] = y
    out[:, y.shape[1] :] = z
    return net.c(out)


def halves(net: Net, x: Tensor) -> Tensor:
    a, b = net.a(x).chunk(2, dim=1)
    return net.b(a * b.sigmoid())


def squeeze_excite(net: Net, x: Tensor) -> Tensor:
    x = net.a(x)
    return net.b(x * net.e(F.relu(net.r(x.mean((2, 3), keepdim=True)))).sigmoid())


CASES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, int]]] = {
    "concat": (
        lambda: Net(
            lambda m, x: m.c(F.relu(m.bn(torch.cat([m.a(x), m.b(x)], 1)))),
            a=conv(3, 4),
            b=conv(3, 6),
            bn=nn.BatchNorm2d(10),
            c=conv(10, 2),
        ),
        image(),
        {"a": 4, "b": 6},
    ),
    "dense": (
        lambda: Net(
            lambda m, x: m.c(torch.cat([x := m.a(x), y := m.b(x), m.d(torch.cat([x, y], 1))], 1)),
            a=conv(3, 4),
            b=conv(4, 5),
            d=conv(9, 6),
            c=conv(15, 2),
        ),
        image(),
        {"a": 4, "b": 5, "d": 6},
    ),
    "grouped": (lambda: nn.Sequential(conv(3, 8), conv(8, 12, groups=4), conv(12, 2)), image(), {"0": 2, "1": 3}),
    "uneven grouped": (
        lambda: nn.Sequential(conv(3, 12), conv(12, 6, groups=3), conv(6, 2)),
        image(),
        {"0": 4, "1": 2},
    ),
    "depthwise": (
        lambda: nn.Sequential(conv(3, 6), conv(6, 6, groups=6), nn.BatchNorm2d(6), conv(6, 2)),
        image(),
        {"0": 6},
    ),
    "depthwise multiplier": (lambda: nn.Sequential(conv(3, 6), conv(6, 12, groups=6), conv(12, 2)), image(), {"0": 6}),
    "squeeze-excite": (
        lambda: Net(squeeze_excite, a=conv(3, 8), r=conv(8, 4, 1), e=conv(4, 8, 1), b=conv(8, 2)),
        image(),
        {"a": 8, "r": 4},
    ),
    "spatial gate": (
        lambda: Net(lambda m, x: m.b((x := m.a(x)) * m.g(x).sigmoid()), a=conv(3, 6), g=conv(6, 1), b=conv(6, 2)),
        image(),
        {"a": 6, "g": 1},
    ),
    "channel shuffle": (
        lambda: Net(lambda m, x: m.b(shuffle(m.g(m.a(x)), 2)), a=conv(3, 6), g=conv(6, 8, groups=2), b=conv(8, 2)),
        image(),
        {"a": 3, "g": 4},
    ),
    "nn.ChannelShuffle": (lambda: nn.Sequential(conv(3, 8), nn.ChannelShuffle(2), conv(8, 2)), image(), {"0": 4}),
    "gated halves": (lambda: Net(halves, a=conv(3, 12), b=conv(6, 2)), image(), {"a": 6}),
    "glu": (lambda: nn.Sequential(conv(3, 12), nn.GLU(1), conv(6, 2)), image(), {"0": 6}),
    "channel flip": (lambda: Net(lambda m, x: m.b(m.a(x).flip(1)), a=conv(3, 6), b=conv(6, 2)), image(), {"a": 6}),
    "flip and add": (
        lambda: Net(lambda m, x: m.b((x := m.a(x)) + x.flip(1)), a=conv(3, 6), b=conv(6, 2)),
        image(),
        {"a": 3},
    ),
    "view and max": (
        lambda: Net(
            lambda m, x: m.b((x := m.a(x)).view(x.shape[0], -1, 2, *x.shape[2:]).max(2).values),
            a=conv(3, 12),
            b=conv(6, 2),
        ),
        image(),
        {"a": 6},
    ),
    "permute and flatten into linear": (
        lambda: Net(lambda m, x: m.b(m.a(x).permute(0, 2, 3, 1).flatten(1)), a=conv(3, 6), b=nn.Linear(384, 2)),
        image(),
        {"a": 6},
    ),
    "flatten into linear": (
        lambda: nn.Sequential(conv(3, 6), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 4), nn.ReLU(), nn.Linear(4, 2)),
        image(),
        {"0": 6, "3": 4},
    ),
    "pixel shuffle": (lambda: nn.Sequential(conv(3, 16), nn.PixelShuffle(2), conv(4, 2)), image(), {"0": 4}),
    "pixel unshuffle": (lambda: nn.Sequential(conv(3, 4), nn.PixelUnshuffle(2), conv(16, 2)), image(), {"0": 4}),
    "transposed": (
        lambda: nn.Sequential(conv(3, 6), nn.ConvTranspose2d(6, 8, 2, 2), nn.ReLU(), conv(8, 2)),
        image(),
        {"0": 6, "1": 8},
    ),
    "transposed grouped": (
        lambda: nn.Sequential(conv(3, 6), nn.ConvTranspose2d(6, 8, 2, 2, groups=2), conv(8, 2)),
        image(),
        {"0": 3, "1": 4},
    ),
    "transposed depthwise": (
        lambda: nn.Sequential(conv(3, 6), nn.ConvTranspose2d(6, 6, 2, 2, groups=6), conv(6, 2)),
        image(),
        {"0": 6},
    ),
    "one-dimensional": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 6, 3),
            nn.BatchNorm1d(6),
            nn.ReLU(),
            nn.Conv1d(6, 4, 3),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(4, 2),
        ),
        torch.randn(2, 3, 16, dtype=torch.float64),
        {"0": 6, "3": 4},
    ),
    "three-dimensional": (
        lambda: nn.Sequential(
            nn.Conv3d(3, 6, 3, padding=1),
            nn.BatchNorm3d(6),
            nn.MaxPool3d(2),
            nn.ConvTranspose3d(6, 4, 2),
            nn.Conv3d(4, 2, 1),
        ),
        torch.randn(1, 3, 4, 4, 4, dtype=torch.float64),
        {"0": 6, "3": 4},
    ),
    "shared layer": (
        lambda: Net(lambda m, x: m.b(m.s(m.s(m.a(x)))), a=conv(3, 6), s=conv(6, 6), b=conv(6, 2)),
        image(),
        {"a": 6},
    ),
    "functional convolution": (
        lambda: Net(
            lambda m, x: F.linear(F.conv2d(x, m.w, m.v).mean((2, 3)), m.u),
            w=torch.ones(6, 3, 3, 3),
            v=torch.ones(6),
            u=torch.ones(2, 6),
        ),
        image(),
        {"w": 6},
    ),
    "matrix product with a parameter": (
        lambda: Net(lambda m, x: m.a(x).mean((2, 3)) @ m.w @ m.u, a=conv(3, 6), w=torch.ones(6, 4), u=torch.ones(4, 2)),
        image(),
        {"a": 6, "w": 4},
    ),
    "layer scale": (
        lambda: Net(
            lambda m, x: m.b((x := m.a(x)) + m.g * m.d(x)),
            a=conv(3, 6),
            g=torch.ones(6, 1, 1),
            d=conv(6, 6),
            b=conv(6, 2),
        ),
        image(),
        {"a": 6},
    ),
    "layer norm, channels last": (
        lambda: Net(
            lambda m, x: m.b(m.n(m.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
            a=conv(3, 6),
            n=nn.LayerNorm(6),
            b=conv(6, 2),
        ),
        image(),
        {"a": 6},
    ),
    "group norm": (lambda: nn.Sequential(conv(3, 12), nn.GroupNorm(3, 12), conv(12, 2)), image(), {"0": 12}),
    "group norm by channel": (
        lambda: nn.Sequential(conv(3, 12), nn.GroupNorm(12, 12), conv(12, 2)),
        image(),
        {"0": 12},
    ),
    "group norm by channel, called": (
        lambda: Net(lambda n, x: n.b(F.group_norm(n.a(x), n.parts)), a=conv(3, 12), b=conv(12, 2), parts=12),
        image(),
        {"a": 12},
    ),
    "instance norm": (
        lambda: nn.Sequential(conv(3, 6), nn.InstanceNorm2d(6, affine=True, track_running_stats=True), conv(6, 2)),
        image(),
        {"0": 6},
    ),
    "prelu": (
        lambda: nn.Sequential(conv(3, 6), nn.PReLU(6), conv(6, 4), nn.PReLU(), conv(4, 2)),
        image(),
        {"0": 6, "2": 4},
    ),
    "local response norm": (lambda: nn.Sequential(conv(3, 6), nn.LocalResponseNorm(3), conv(6, 2)), image(), {"0": 6}),
    "weight standardisation": (
        lambda: Net(lambda m, x: m.b(standardised(m.c, m.a(x))), a=conv(3, 6), c=conv(6, 5), b=conv(5, 2)),
        image(),
        {"a": 6, "c": 5},
    ),
    "weight norm": (
        lambda: nn.Sequential(conv(3, 6), parametrizations.weight_norm(conv(6, 5)), conv(5, 2)),
        image(),
        {"0": 6, "1": 5},
    ),
    "upsampling": (
        lambda: Net(
            lambda m, x: m.b(F.interpolate(m.a(x), scale_factor=2, mode="bilinear") + F.interpolate(m.d(x), size=16)),
            a=conv(3, 6),
            d=conv(3, 6),
            b=conv(6, 2),
        ),
        image(),
        {"a": 6},
    ),
    "two inputs, two outputs": (
        lambda: Net(
            lambda m, x, y: {"p": m.c(m.a(x) + m.b(y)), "q": [m.d(m.a(x))]},
            a=conv(3, 6),
            b=conv(1, 6),
            c=conv(6, 2),
            d=conv(6, 2),
        ),
        (image(), image(1)),
        {"a": 6},
    ),
    "written into zeros": (lambda: Net(filled, a=conv(3, 4), b=conv(3, 6), c=conv(10, 2)), image(), {"a": 4, "b": 6}),
    "padded with zeros in front": (
        lambda: Net(lambda m, x: m.c(F.pad(m.a(x), (0, 0, 0, 0, 2, 0))), a=conv(3, 4), c=conv(6, 2)),
        image(),
        {"a": 4},
    ),
    "stack summed": (
        lambda: Net(
            lambda m, x: m.c(torch.stack([m.a(x), m.b(x)], 1).sum(1)), a=conv(3, 4), b=conv(3, 4), c=conv(4, 2)
        ),
        image(),
        {"a": 4},
    ),
    "embedding": (
        lambda: Net(
            lambda m, i: m.b(m.a(m.e(i).transpose(1, 2))),
            e=nn.Embedding(9, 6),
            a=nn.Conv1d(6, 4, 3),
            b=nn.Conv1d(4, 2, 1),
        ),
        torch.arange(8).view(1, 8),
        {"e": 6, "a": 4},
    ),
    "einsum": (
        lambda: Net(lambda m, x: torch.einsum("nchw,co->nohw", m.a(x), m.w), a=conv(3, 6), w=torch.ones(6, 2)),
        image(),
        {"a": 6},
    ),
    "unfold": (
        lambda: Net(lambda m, x: F.linear(F.unfold(m.a(x), 3).mean(2), m.w), a=conv(3, 4), w=torch.ones(2, 36)),
        image(),
        {"a": 4},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_half_of_everything(name: str) -> None:
    build, inputs, expected = CASES[name]
    assert free(check(build(), inputs)) == expected


def test_grouped_convolution_ties_the_same_place_in_every_group() -> None:
    groups = check(nn.Sequential(conv(3, 12), conv(12, 6, groups=3), conv(6, 2)), image())
    assert part(groups, "0", "0.weight", 0) == (0, 1, 2, 3) * 3
    assert part(groups, "0", "1.weight", 1) == (0, 1, 2, 3)
    assert part(groups, "1", "1.weight", 0) == (0, 1) * 3
    assert part(groups, "1", "2.weight", 1) == (0, 1) * 3


def test_shuffle_permutes_what_the_next_layer_reads() -> None:
    build, inputs, _ = CASES["channel shuffle"]
    groups = check(build(), inputs)
    assert part(groups, "g", "b.weight", 1) == (0, 0, 1, 1, 2, 2, 3, 3)


def test_flip_reverses_what_the_next_layer_reads() -> None:
    build, inputs, _ = CASES["channel flip"]
    assert part(check(build(), inputs), "a", "b.weight", 1) == (5, 4, 3, 2, 1, 0)


def test_concatenated_groups_share_a_norm_and_a_consumer() -> None:
    build, inputs, _ = CASES["concat"]
    groups = check(build(), inputs)
    assert part(groups, "b", "bn.running_var", 0) == (-1,) * 4 + tuple(range(6))
    assert part(groups, "a", "c.weight", 1) == tuple(range(4)) + (-1,) * 6


def test_group_norm_wants_equally_many_from_every_block() -> None:
    build, inputs, _ = CASES["group norm"]
    group = check(build(), inputs).by_name["0"]
    assert group.blocks == (0,) * 4 + (1,) * 4 + (2,) * 4
    assert not group.exact
    assert "normalised over in group_norm" in str(group.remark)


@pytest.mark.parametrize("name", ["layer norm, channels last", "weight standardisation", "local response norm"])
def test_what_masking_cannot_judge_is_said(name: str) -> None:
    build, inputs, _ = CASES[name]
    groups = check(build(), inputs)
    group = groups.by_name["a"] if "a" in groups.by_name else groups.by_name["0"]
    assert not group.exact
    assert group.symmetric == (name != "local response norm")


def test_dense_outputs_of_one_group_have_classes() -> None:
    """Half of a layer's channels are read once more than the others."""
    net = Net(lambda m, x: m.b(x := m.a(x)) + m.c(x[:, :4]), a=conv(3, 8), b=conv(8, 2), c=conv(4, 2))
    net.keep = 4
    net.run = lambda m, x: m.b(x := m.a(x)) + m.c(x[:, : m.keep])
    groups = check(net, image())
    assert groups.by_name["a"].classes in ((0,) * 4 + (1,) * 4, (1,) * 4 + (0,) * 4)


FROZEN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "reaches the model's output": (lambda: nn.Sequential(conv(3, 6)), "0"),
    "tied to constant padding": (
        lambda: Net(
            lambda m, x: m.c(m.b(x) + F.pad(m.a(x), (0, 0, 0, 0, 1, 1))), a=conv(3, 4), b=conv(3, 6), c=conv(6, 2)
        ),
        "a",
    ),
    "must keep the size of a fixed axis": (lambda: Net(lambda m, x: m.b(x + m.a(x)), a=conv(3, 3), b=conv(3, 2)), "a"),
    "picked by position": (
        lambda: Net(lambda m, x: m.b(m.a(x)[:, 2:3] + m.a(x)[:, 3].unsqueeze(1)), a=conv(3, 6), b=conv(1, 2)),
        "a",
    ),
    "transformed over in _fft": (
        lambda: Net(lambda m, x: m.b(torch.fft.fft(m.a(x), dim=1).real), a=conv(3, 6), b=conv(6, 2)),
        "a",
    ),
    "shifted by a fixed number": (lambda: Net(lambda m, x: m.b(m.a(x).roll(1, 1)), a=conv(3, 6), b=conv(6, 2)), "a"),
    "cut into pieces of unequal size": (
        lambda: Net(lambda m, x: m.b(torch.cat(m.a(x).chunk(3, 1)[::-1], 1)), a=conv(3, 7), b=conv(7, 2)),
        "a",
    ),
    "two channel axes merged": (
        lambda: Net(
            lambda m, x: m.b((m.a(x).mean((2, 3)).unsqueeze(2) * m.a2(x).mean((2, 3)).unsqueeze(1)).flatten(1)),
            a=conv(3, 4),
            a2=conv(3, 5),
            b=nn.Linear(20, 2),
        ),
        "a",
    ),
}


@pytest.mark.parametrize("reason", FROZEN)
def test_what_cannot_be_shrunk_says_why(reason: str) -> None:
    build, name = FROZEN[reason]
    assert reason in str(check(build(), image()).by_name[name].frozen)


class Attending(nn.Module):
    """A convolution read by PyTorch's own encoder layer, which may run as one opaque operation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.project = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.project(self.stem(x).relu()).flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize("fast", [True, False])
def test_layers_that_surgery_cannot_resize_are_frozen_and_what_is_around_them_is_cut(fast: bool) -> None:
    torch.manual_seed(0)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        model, x = Attending().eval(), torch.randn(1, 3, 6, 6)
        found = {group.name: group.frozen for group in trace(model, x)}
        result = ff.prune(model, x, keep=0.5)
        assert torch.backends.mha.get_fastpath_enabled() == fast
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    whole = "belongs to a MultiheadAttention, which stays whole"
    assert found == {
        "stem": None, "project": whole, "layer.self_attn.in_proj_weight": whole, "layer.linear1": None,
        "head": "reaches the model's output",
    }  # fmt: skip
    assert result.plan.widths == {"stem": (8, 4), "layer.linear1": (12, 6)}
    assert result.verified
