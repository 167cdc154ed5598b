"""Criteria against loops in NumPy and formulas written down once more."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from filterfold.errors import ConfigError, DataError
from filterfold.plan import ChannelGroup, Cut, Plan, Slice
from filterfold.pruning.criteria import CRITERIA, criterion, score


def group(name, size, producers, consumers=(), frozen=None):
    return ChannelGroup(name, size, tuple(producers), tuple(consumers), True, frozen, (0,) * size, (0,) * size)


class Net(nn.Module):
    """conv (8) → batch norm → ReLU → pool → depthwise → linear, with a reused and a transposed layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False)
        self.head = nn.Linear(6 * 4, 5)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-1, 1)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        x = F.max_pool2d(F.relu(self.up(x)), 3)
        return self.head(x.flatten(1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def groups():
    spread = tuple(unit for unit in (0, 1, 2, 0, 1, 2) for _ in range(4))
    four = (0, 1, 2, 3)
    norm = [Slice(f"norm.{name}", 0, four, "norm") for name in ("weight", "bias")]
    return (
        group("conv", 4, [Slice("conv.weight", 0, four, "filter"), *norm], [Slice("up.weight", 0, four, "kernel")]),
        group("up", 3, [Slice("up.weight", 1, (0, 1, 2), "filter")], [Slice("head.weight", 1, spread, "kernel")]),
        group("head", 5, [Slice("head.weight", 0, (0, 1, 2, 3, 4), "filter")], frozen="an output"),
    )


def images(count=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 7, 7, generator=generator), torch.arange(count) % 5


def loader(size=2):
    x, y = images()
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


def close(got, expected):
    np.testing.assert_allclose(got.numpy(), np.asarray(expected, dtype=np.float64), rtol=1e-5, atol=1e-6)


# --- weights --------------------------------------------------------------------------------------


def test_norms_against_loops(net, groups):
    conv = net.conv.weight.detach().numpy()
    up = net.up.weight.detach().numpy()
    l1, l2, largest = (score(groups, net, name) for name in ("l1", "l2", "largest"))
    assert set(l1) == {"conv", "up"}
    close(l1["conv"], [sum(abs(float(w)) for w in conv[u].flat) for u in range(4)])
    close(l1["up"], [sum(abs(float(w)) for w in up[:, u].flat) for u in range(3)])
    close(l2["conv"], [sum(float(w) ** 2 for w in conv[u].flat) ** 0.5 for u in range(4)])
    close(largest["conv"], -l1["conv"].numpy())
    assert l1["conv"].dtype == torch.float64


def test_geometric_median_is_on_signed_weights(net, groups):
    conv = net.conv.weight.detach().double().numpy().reshape(4, -1)
    expected = [sum(np.sqrt(((conv[i] - conv[j]) ** 2).sum()) for j in range(4)) for i in range(4)]
    close(score(groups, net, "fpgm")["conv"], expected)
    opposite = nn.Conv2d(1, 3, 1, bias=False)
    opposite.weight.data = torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1, 1)
    one = group("c", 3, [Slice("weight", 0, (0, 1, 2), "filter")])
    close(score([one], opposite, "fpgm")["c"], [2.0, 4.0, 2.0])


def test_batch_norm_scale(net, groups):
    close(score(groups[:1], net, "bn-scale")["conv"], net.norm.weight.detach().abs())
    with pytest.raises(ConfigError, match=r"^group 'up' has no normalisation with a scale"):
        score(groups, net, "bn-scale")


def test_random_is_seeded_and_independent_of_the_order(net, groups):
    state = torch.get_rng_state()
    first, again = score(groups, net, "random", seed=3), score(groups[::-1], net, "random", seed=3)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv"], score(groups, net, "random", seed=4)["conv"])
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_is_widened(net, groups):
    exact = score(groups, net.bfloat16().float(), "l1")
    rounded = score(groups, net.bfloat16(), "l1")
    close(rounded["conv"], exact["conv"])


class Coupled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(1, size, 1, bias=False) for size in (3, 2, 1))
        self.a.weight.data = torch.tensor([1.0, -2.0, 3.0]).view(3, 1, 1, 1)
        self.b.weight.data = torch.tensor([10.0, 20.0]).view(2, 1, 1, 1)
        self.c.weight.data = torch.tensor([-5.0]).view(1, 1, 1, 1)

    def forward(self, x):
        return self.a(x) + torch.cat([self.b(x), self.c(x)], 1)


@pytest.mark.parametrize(
    ("combine", "expected"),
    [("sum", [11.0, 22.0, 8.0]), ("mean", [5.5, 11.0, 4.0]), ("max", [10.0, 20.0, 5.0]), ("first", [1.0, 2.0, 3.0])],
)
def test_coupled_layers_are_combined(combine, expected):
    units = {"a": (0, 1, 2), "b": (0, 1), "c": (2,)}
    parts = [Slice(f"{name}.weight", 0, vector, "filter") for name, vector in units.items()]
    close(score([group("a", 3, parts)], Coupled(), "l1", combine=combine)["a"], expected)


def test_units_with_several_positions_are_summed():
    layer = nn.Linear(1, 4, bias=False)
    layer.weight.data = torch.tensor([[1.0], [-2.0], [3.0], [4.0]])
    one = group("l", 2, [Slice("weight", 0, (0, 1, -1, 0), "filter")])
    close(score([one], layer, "l1")["l"], [5.0, 2.0])
    close(score([one], layer, "l2")["l"], [17**0.5, 2.0])


def test_channels_without_a_filter_are_scored_by_what_reads_them():
    layer = nn.Conv2d(2, 1, 1, bias=False)
    layer.weight.data = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1)
    close(score([group("g", 2, [], [Slice("weight", 1, (0, 1), "kernel")])], layer)["g"], [1.0, 2.0])
    with pytest.raises(ConfigError, match=r"^group 'g' has units that no filter makes or reads"):
        score([group("g", 3, [], [Slice("weight", 1, (0, 1), "kernel")])], layer)


def test_greedy_scoring_leaves_out_dropped_inputs(net, groups):
    cut = Cut("conv", (0, -1, 1, -1), groups[0].producers, groups[0].consumers)
    before = net.up.weight.detach().clone()
    greedy = score(groups, net, "l1", without=Plan((cut,)))
    close(greedy["up"], before[[0, 2]].abs().sum((0, 2, 3)))
    assert torch.equal(net.up.weight, before)
    with pytest.raises(ConfigError, match="reads data"):
        score(groups, net, "mean-l1", loader=loader(), without=Plan((cut,)))


# --- activations ----------------------------------------------------------------------------------


def maps(net, name):
    """Feature maps before batch norm and ReLU, by plain calls."""
    x, _ = images()
    with torch.no_grad():
        net.eval()
        out = net.conv(x)
        if name == "up":
            out = net.up(F.relu(net.norm(out)))
    return out.double().numpy()


FORMULAS = {
    "mean-mean": lambda x: np.mean([image.mean() for image in x]),
    "mean-std": lambda x: np.mean([image.std() for image in x]),
    "mean-l1": lambda x: np.mean([np.abs(image).sum() for image in x]),
    "mean-l2": lambda x: np.mean([np.sqrt((image**2).sum()) for image in x]),
    "var-l2": lambda x: np.var([np.sqrt((image**2).sum()) for image in x]),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("size", [1, 4, 6])
def test_activation_statistics_over_any_batches(net, groups, name, size):
    got = score(groups, net, name, loader=loader(size))
    values = maps(net, "conv")
    close(got["conv"], [FORMULAS[name](values[:, u]) for u in range(4)])
    values = maps(net, "up").reshape(6, 2, 3, *maps(net, "up").shape[2:])  # the same place in both groups
    close(got["up"], [np.mean([FORMULAS[name](values[:, g, u]) for g in range(2)]) for u in range(3)])


def test_activation_statistics_of_linear_and_reused_layers():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3, bias=False)

        def forward(self, x):
            return self.linear(self.linear(x))

    net, x = Twice(), torch.randn(4, 3)
    one = group("linear", 3, [Slice("linear.weight", 0, (0, 1, 2), "filter")])
    both = torch.cat([net.linear(x), net.linear(net.linear(x))]).detach().double()
    close(score([one], net, "mean-mean", loader=[x])["linear"], both.mean(0))
    close(score([one], net, "var-l2", loader=[x[:1], x[1:]])["linear"], both.abs().var(0, correction=0))


def test_share_of_zeros_is_taken_where_the_channel_is_read(net, groups):
    got = score(groups, net, "apoz", loader=loader())
    x, _ = images()
    with torch.no_grad():
        net.eval()
        first = F.relu(net.norm(net.conv(x)))
        second = F.max_pool2d(F.relu(net.up(first)), 3)
    close(got["conv"], [float((first[:, u] != 0).double().mean()) for u in range(4)])
    close(got["up"], [float((second[:, [u, u + 3]] != 0).double().mean()) for u in range(3)])


# --- gradients ------------------------------------------------------------------------------------


def test_taylor_against_autograd(net, groups):
    expected = {"conv": 0, "up": 0}
    net.eval()
    for x, y in loader():
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        expected["conv"] += (net.conv.weight * net.conv.weight.grad).sum((1, 2, 3)).square() / 3
        expected["up"] += (net.up.weight * net.up.weight.grad).sum((0, 2, 3)).square() / 3
    got = score(groups, net.train(), "taylor", loader=loader())
    close(got["conv"], expected["conv"].detach())
    close(got["up"], expected["up"].detach())


def test_taylor_predicts_the_change_of_the_loss():
    """For a loss that is linear in the weights the first-order term is the whole change."""
    torch.manual_seed(0)
    net, x = nn.Conv2d(2, 3, 1, bias=False), torch.randn(4, 2, 3, 3)
    one = group("conv", 3, [Slice("weight", 0, (0, 1, 2), "filter")])
    got = score([one], net, "taylor", loader=[(x, x)], loss=lambda out, _: out.sum())["conv"]
    changes = []
    for unit in range(3):
        weight = net.weight.detach().clone()
        weight[unit] = 0
        changes.append(float((F.conv2d(x, weight).sum() - net(x).sum().detach()) ** 2))
    np.testing.assert_allclose(got.numpy(), changes, rtol=1e-4)


# --- what is left behind --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, entry in CRITERIA.items() if entry.gather is not None])
@pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_nothing_is_left_behind(net, groups, name, outer):
    net.norm.eval()
    net.conv.weight.requires_grad_(False)
    F.cross_entropy(net(images()[0]), images()[1]).backward()
    gradient = net.head.weight.grad.clone()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    random = torch.get_rng_state()
    shuffled = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*images()), batch_size=3, shuffle=True)
    scored = groups[1:] if name == "reconstruction" else groups  # which can't solve a transposed convolution
    with outer():
        score(scored, net, name, loader=shuffled)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in net.modules()] == [True, True, False, True, True]
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert torch.equal(net.head.weight.grad, gradient)
    assert net.conv.weight.grad is None
    assert [key for key, value in net.named_parameters() if not value.requires_grad] == ["conv.weight"]
    for module in net.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
    F.cross_entropy(net(images()[0]), images()[1]).backward()


def test_an_error_in_the_middle_leaves_nothing_behind(net, groups):
    net.conv.weight.requires_grad_(False)
    with pytest.raises(ConfigError, match="criterion 'taylor' fails on the loader's batches: RuntimeError"):
        score(groups, net, "taylor", loader=[*loader(), (torch.zeros(1, 4, 7, 7), torch.zeros(1))])
    assert net.training
    assert not net.conv.weight.requires_grad


def test_batches_limit_the_loader(net, groups):
    few = score(groups, net, "mean-l1", loader=loader(2)[:2])
    limited = score(groups, net, "mean-l1", loader=loader(2), batches=2)
    assert torch.equal(few["conv"], limited["conv"])


# --- registry and refusals ------------------------------------------------------------------------


def test_a_criterion_of_ones_own(net, groups):
    @criterion("bias")
    def bias(group, tensors):
        return tensors.get(f"{group.name}.bias", torch.ones(group.size)).abs()

    try:
        close(score(groups, net, "bias")["conv"], net.conv.bias.detach().abs())
        with pytest.raises(ConfigError, match="exists already"):
            criterion("bias")(bias)
        with pytest.raises(ConfigError, match="leave combine away"):
            score(groups, net, "bias", combine="mean")
    finally:
        CRITERIA.pop("bias")
    close(score(groups, net, bias)["conv"], net.conv.bias.detach().abs())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"criterion": "l3"}, ConfigError, "criterion 'l3' is unknown; did you mean 'l2'?"),
        ({"combine": "min"}, ConfigError, "combine='min': must be one of sum, mean, max, first"),
        ({"criterion": "taylor"}, DataError, "criterion 'taylor' reads data: give it a loader"),
        ({"criterion": "apoz", "loader": []}, DataError, "criterion 'apoz': the loader gave no batch"),
        (
            {"criterion": "taylor", "loader": [images()[0]]},
            DataError,
            "the taylor criterion needs targets: let the loader give (inputs, targets)",
        ),
        (
            {"criterion": lambda group, tensors: torch.ones(2)},
            ConfigError,
            "criterion '<lambda>' gave (2,) for the 4 units of group 'conv'",
        ),
    ],
)
def test_refusals(net, groups, options, error, message):
    with pytest.raises(error) as caught:
        score(groups, net, **options)
    assert str(caught.value) == message
