"""Folds of equal units, up to a scale, against the network as it was; shares and features by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from filterfold.errors import SelectionError
from filterfold.graph.trace import trace
from filterfold.online.clustering import cluster
from filterfold.online.folding import features, fold, importance
from filterfold.online.folding.fold import regression
from filterfold.plan import ChannelGroup, Plan, Slice
from filterfold.pruning.budgets.ranking import parts, unranked
from filterfold.surgery.apply import apply

EPS = 1e-5


def block(inputs: int, outputs: int, kernel: int = 3, groups: int = 1, bias: bool = False) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=bias),
        nn.BatchNorm2d(outputs, eps=EPS),
        nn.ReLU(),
    ]


class Vgg(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*block(3, 8, bias=True), nn.MaxPool2d(2), *block(8, 8), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(8 * 9, 8), nn.BatchNorm1d(8, eps=EPS), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    # (filter, batch norm) pairs that make one group's units
    makers = (("body.0", "body.1"),), (("body.4", "body.5"),), (("head.0", "head.1"),)


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, bias=False), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return self.c(torch.nn.functional.leaky_relu(self.b(x)).mean((2, 3)))

    makers = (("a", None),), (("b", None),)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*block(3, 8))
        self.one, self.two = nn.Sequential(*block(8, 6), *block(6, 8)[:2]), nn.Sequential(*block(8, 8, bias=True)[:2])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.one(x))
        x = torch.relu(x + self.two(x))
        return self.head(x.mean((2, 3)))

    makers = (("stem.0", "stem.1"), ("one.3", "one.4"), ("two.0", "two.1")), (("one.0", "one.1"),)


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*block(3, 8, 1), *block(8, 8, 3, groups=8), *block(8, 6, 1), nn.Flatten())
        self.head = nn.Linear(6 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))

    makers = (("net.0", "net.1"), ("net.3", "net.4")), (("net.6", "net.7"),)


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Sequential(*block(3, 8)), nn.Sequential(*block(8, 6)), nn.Conv2d(14, 5, 1))
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = torch.cat((x, self.b(x)), dim=1)
        return self.head(torch.relu(self.c(x)).amax((2, 3)))

    makers = (("a.0", "a.1"),), (("b.0", "b.1"),)


class Dense(nn.Module):
    """Two dense layers as in DenseNet: each normalises, in its own way, all that came before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm0, self.norm1, self.norm2 = (nn.BatchNorm2d(size, eps=EPS) for size in (8, 14, 20))
        self.squeeze0, self.squeeze1 = nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(14, 8, 1, bias=False)
        self.inner0, self.inner1 = nn.BatchNorm2d(8, eps=EPS), nn.BatchNorm2d(8, eps=EPS)
        self.grow0, self.grow1 = (nn.Conv2d(8, 6, 3, padding=1, bias=False) for _ in range(2))
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.squeeze0(torch.relu(self.norm0(x)))
        x = torch.cat((x, self.grow0(torch.relu(self.inner0(y)))), dim=1)
        y = self.squeeze1(torch.relu(self.norm1(x)))
        x = torch.cat((x, self.grow1(torch.relu(self.inner1(y)))), dim=1)
        return self.head(torch.relu(self.norm2(x)).mean((2, 3)))

    # a norm behind a concatenation: the place where the group's units begin in it; no filter: that of the first pair
    makers = (
        (("stem", "norm0"), (None, "norm1"), (None, "norm2")),
        (("squeeze0", "inner0"),),
        (("grow0", "norm1@8"), (None, "norm2@8")),
        (("squeeze1", "inner1"),),
        (("grow1", "norm2@14"),),
    )


NETS: tuple[Callable[[], nn.Module], ...] = (Vgg, Raw, Residual, Depthwise, Concat, Dense)


def prepared(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network in float64 with batch norms as if trained, some γ negative where one filter has one norm."""
    torch.manual_seed(seed)
    net = make().double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net.requires_grad_(False)


def make_twins(net: nn.Module, makers: tuple, like: list[int], draw: Callable[[], float], gamma_signs: bool) -> None:
    """Give unit j the function of unit like[j], times a factor, in every layer of one group."""
    chain = any(name and getattr(net.get_submodule(name), "groups", 1) > 1 for name, _ in makers)
    with torch.no_grad():
        for unit, source in enumerate(like):
            if unit == source:
                continue
            common, before = draw(), 1.0  # before: what the layer's input is multiplied by, inside a chain
            for name, norm in makers:
                if name is not None:
                    layer, scale = net.get_submodule(name), draw() if norm else common
                    sign = -1 if gamma_signs and len(makers) == 1 and norm and draw() > 1 else 1
                    layer.weight[unit] = sign * scale * layer.weight[source]
                    if layer.bias is not None:
                        layer.bias[unit] = sign * scale * layer.bias[source]
                if norm:
                    norm, _, place = norm.partition("@")
                    one, two = unit + int(place or 0), source + int(place or 0)
                    bn, factor = net.get_submodule(norm), draw() if chain else common
                    bn.running_mean[one] = sign * scale * before * bn.running_mean[two]
                    bn.running_var[one] = (scale * before) ** 2 * (bn.running_var[two] + EPS) - EPS
                    bn.weight[one] = sign * factor * bn.weight[two]
                    bn.bias[one] = factor * bn.bias[two]
                    before = factor if chain else 1.0


@settings(max_examples=60, deadline=None)
@given(
    make=st.sampled_from(NETS),
    seed=st.integers(0, 10_000),
    data=st.data(),
    scaled=st.booleans(),
    signs=st.booleans(),
    member=st.booleans(),
    weighted=st.booleans(),
    gain=st.sampled_from(["scale", "regression"]),
)
def test_folding_twins_changes_nothing(make, seed, data, scaled, signs, member, weighted, gain) -> None:
    net = prepared(make, seed)
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    labels = {}
    for makers in net.makers:
        size = len(net.get_submodule(makers[0][0]).weight)
        like = [data.draw(st.integers(0, unit)) for unit in range(size)]
        for unit in range(size):  # follow to the first of its kind
            like[unit] = like[like[unit]]
        factors = st.floats(0.3, 3.0) if scaled else st.just(1.0)
        make_twins(net, makers, like, lambda factors=factors: data.draw(factors), scaled and signs)
        labels[makers[0][0]] = like
    groups = trace(net, x)
    before = net(x)
    plan = fold(groups, labels, net, representative="member" if member else "mean", weighted=weighted, gain=gain)
    assert {name: widths[1] for name, widths in plan.widths.items()} == {n: len(set(v)) for n, v in labels.items()}
    apply(Plan.from_json(plan.to_json()), net)
    torch.testing.assert_close(net(x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", NETS)
def test_clustering_finds_the_twins(make) -> None:
    net = prepared(make, 3)
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    labels, like = {}, [0, 1, 0, 3, 1, 0]
    for makers in net.makers:
        size = len(net.get_submodule(makers[0][0]).weight)
        twins = like + list(range(6, size))
        make_twins(net, makers, twins, lambda: float(torch.rand(1, generator=generator)) * 2 + 0.2, False)
    groups = trace(net, x)
    before = net(x)
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    for makers in net.makers:
        group = groups.by_name[makers[0][0]]
        found = cluster(features(group, tensors), clusters=group.size - 3)
        labels[group.name] = found.labels
        assert found.inertia < 1e-20
    apply(fold(groups, labels, net), net)
    torch.testing.assert_close(net(x), before, rtol=1e-12, atol=1e-12)


def test_float32_twins_to_one_in_a_hundred_thousand() -> None:
    net = prepared(Vgg, 0)
    make_twins(net, net.makers[0], [0, 1, 0, 1, 0, 5, 5, 5], lambda: 0.7, False)
    net, x = net.float(), torch.randn(3, 3, 6, 6)
    before = net(x)
    apply(fold(trace(net, x), {"body.0": [0, 1, 0, 1, 0, 5, 5, 5]}, net), net)
    assert float((net(x) - before).norm() / before.norm()) < 1e-5


def test_dead_units_fold_into_live_ones() -> None:
    net = prepared(Raw, 0)
    with torch.no_grad():
        net.a.weight[3], net.a.bias[3] = 0, 0
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    before = net(x)
    apply(fold(trace(net, x), {"a": [0, 1, 2, 0, 4, 5, 6, 7]}, net), net)
    torch.testing.assert_close(net(x), before, rtol=1e-12, atol=1e-12)


def test_untouched_where_nothing_is_folded() -> None:
    net = prepared(Vgg, 0)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    kept = copy.deepcopy(net.state_dict())
    apply(fold(trace(net, x), {"body.0": range(8), "body.4": [0, 1, 2, 3, 4, 5, 6, 6]}, net), net)
    assert torch.equal(net.body[0].weight, kept["body.0.weight"])
    assert torch.equal(net.body[4].weight[:6], kept["body.4.weight"][:6])


def test_group_norm_folds_equal_units_by_mean() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 2, 1)).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():  # every unit twice in its block: halving leaves the block's mean and variance as they are
        for module in (net[0], net[1]):
            module.weight[[1, 3, 5, 7]] = module.weight[[0, 2, 4, 6]]
            module.bias[[1, 3, 5, 7]] = module.bias[[0, 2, 4, 6]]
    groups = trace(net, x)
    before = net(x)
    assert len(parts(groups[0])) == 2
    apply(fold(groups, {groups[0].name: [0, 0, 1, 1, 2, 2, 3, 3]}, net), net)
    torch.testing.assert_close(net(x), before, rtol=1e-12, atol=1e-12)


def test_importance_is_scale_times_what_is_read() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([3.0, 1.0]))
        net[1].bias.copy_(torch.tensor([4.0, 0.0]))
        net[3].weight.copy_(torch.tensor([[0.6, 1.0], [0.8, 0.0]])[..., None, None])
    group = trace(net, torch.zeros(1, 1, 4, 4))[0]
    torch.testing.assert_close(importance(group, dict(net.named_parameters())), torch.tensor([5.0, 1.0]))


def test_regression_of_relu_outputs_against_samples() -> None:
    gamma, beta, cosine = torch.tensor([[0.5, 2.0, 1.0], [0.3, -1.0, 2.0], [0.9, 0.2, -0.5]], dtype=torch.float64)
    mean = torch.tensor([1.2, 0.8, 1.0], dtype=torch.float64), torch.tensor([0.1, -0.5, 1.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1_000_000, 1, dtype=torch.float64, generator=generator)
    made = torch.relu(mean[0] * a + mean[1])
    unit = torch.relu(gamma * (cosine * a + (1 - cosine**2).sqrt() * b) + beta)
    slope = ((made - made.mean(0)) * unit).mean(0) / made.var(0)
    found = regression(gamma, beta, *mean, cosine, torch.full((3,), torch.nan))
    torch.testing.assert_close(found, slope.clamp(min=0), rtol=0.02, atol=0.01)
    assert regression(gamma[:1], beta[:1], gamma[:1], beta[:1] - 99, cosine[:1], gamma[:1] * 7).item() == 3.5


def by_hand(classes: list[int], blocks: list[int]) -> ChannelGroup:
    made = Slice("0.weight", 0, tuple(range(len(classes))), "filter")
    return ChannelGroup("0", len(classes), (made,), (), True, None, tuple(classes), tuple(blocks))


@pytest.mark.parametrize(
    ("classes", "blocks", "total", "expected"),
    [
        ([0] * 8, [0] * 8, 3, (3,)),
        ([0] * 8, [0] * 4 + [1] * 4, 5, (2, 2)),
        ([0] * 8, [0] * 4 + [1] * 4, 1, (1, 1)),
        ([0] * 6 + [1] * 2, [0] * 8, 4, (3, 1)),
        ([0] * 7 + [1], [0] * 8, 2, (1, 1)),
        ([0] * 8, [0] * 8, 20, (8,)),
    ],
)
def test_widths_are_shared_out_among_classes_and_blocks(classes, blocks, total: int, expected) -> None:
    ranked = unranked(by_hand(classes, blocks))
    assert ranked.shared_out(ranked.nearest(total)) == expected


def test_refusals() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
    mixed = by_hand([0, 0, 1, 1], [0] * 4)
    with pytest.raises(SelectionError, match="cluster 1 spans more than one class"):
        fold([mixed], {"0": [0, 1, 1, 2]}, net)
    with pytest.raises(SelectionError, match="3 labels for 4 units"):
        fold([mixed], {"0": [0, 1, 1]}, net)
    with pytest.raises(SelectionError, match="no group is named 'no'"):
        fold([mixed], {"no": [0]}, net)


def test_features_of_units_take_batch_norm_in() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[3.0, 4.0], [6.0, 8.0], [-3.0, -4.0]])[..., None, None])
        net[1].weight.copy_(torch.tensor([1.0, 1.0, -1.0]))
        net[1].bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    group = trace(net, torch.zeros(1, 2, 4, 4))[0]
    tensors = dict(net.named_parameters())
    filters = features(group, tensors)
    torch.testing.assert_close(filters, torch.tensor([[0.6, 0.8]] * 3))
    units = features(group, tensors, "units")
    half = 0.5**0.5
    torch.testing.assert_close(units, torch.tensor([[0.6, 0.8, 0.0], [0.6 * half, 0.8 * half, half], [0.6, 0.8, 0.0]]))
