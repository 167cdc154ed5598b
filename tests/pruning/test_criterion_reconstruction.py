"""The reconstruction criterion against least squares over every subset, solved by NumPy."""

from __future__ import annotations

import copy
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import filterfold as ff
from filterfold.errors import ConfigError
from filterfold.plan import ChannelGroup, Slice
from filterfold.pruning.criteria import reconstruction, score
from filterfold.pruning.reconstruction import least_squares, repair


@pytest.fixture(autouse=True)
def no_ridge(monkeypatch):
    monkeypatch.setattr(reconstruction, "RIDGES", (1e-12,) * 2)
    monkeypatch.setattr(least_squares, "RIDGES", (1e-12,) * 2)


def lost(x: np.ndarray, wanted: np.ndarray, columns: list[int], *, centred: bool) -> float:
    """Share of what is wanted that these columns of x can't give, by least squares."""
    if centred:
        x, wanted = x - x.mean(0), wanted - wanted.mean(0)
    rest = wanted - x[:, columns] @ np.linalg.lstsq(x[:, columns], wanted, rcond=None)[0] if columns else wanted
    return float((rest**2).sum() / (wanted**2).sum())


def backward_elimination(readers: list[tuple], size: int) -> tuple[list[int], np.ndarray]:
    """The order in which units go, and the loss after each: `readers` are (x, wanted, columns of a unit, centred)."""
    left, order, losses = list(range(size)), [], []
    while left:
        found = {
            unit: sum(
                lost(x, wanted, [c for u in left if u != unit for c in owned(u)], centred=centred)
                for x, wanted, owned, centred in readers
            )
            for unit in left
        }
        unit = min(found, key=found.get)
        left.remove(unit)
        order.append(unit)
        losses.append(found[unit])
    return order, np.array(losses)


def check(scores: torch.Tensor, readers: list[tuple]) -> None:
    order, losses = backward_elimination(readers, len(scores))
    assert scores.argsort().tolist() == order
    steps = np.maximum.accumulate(np.diff(losses, prepend=0))
    np.testing.assert_allclose(scores[order].numpy(), steps, rtol=1e-5, atol=1e-9)


def unfolded(x: torch.Tensor, conv: nn.Conv2d) -> np.ndarray:
    return F.unfold(x, conv.kernel_size, padding=conv.padding, stride=conv.stride).mT.flatten(0, 1).detach().numpy()


def rows(maps: torch.Tensor) -> np.ndarray:
    return maps.flatten(2).mT.flatten(0, 1).detach().numpy()


@pytest.mark.parametrize("norm", [True, False])
def test_a_convolution_and_a_linear_layer_against_least_squares_over_subsets(norm: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3, 2, 1, bias=False)),
        *(nn.BatchNorm2d(5) if norm else nn.Identity(), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 9, 3)),
    )
    model = model.double().eval()
    x = torch.randn(40, 2, 8, 8, dtype=torch.float64)
    groups = ff.trace(model, x[:1])
    scores = score(groups, model, "reconstruction", loader=[x[:15], x[15:]])
    read = F.relu(model[0](x))
    made = model[2](read)
    check(scores["0"], [(unfolded(read, model[2]), rows(made), lambda u: range(9 * u, 9 * u + 9), norm)])
    flat = F.relu(model[3](made)).flatten(1)
    wanted = F.linear(flat, model[6].weight).detach().numpy()
    check(scores["2"], [(flat.detach().numpy(), wanted, lambda u: range(9 * u, 9 * u + 9), True)])


def test_several_readers_count_together_and_groups_of_a_convolution_alike() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(2, 6, 1)
            self.grouped = nn.Conv2d(6, 4, 1, groups=2, bias=False)
            self.plain = nn.Conv2d(6, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            read = self.first(x).relu()
            return self.grouped(read).mean((2, 3)) + self.plain(read).mean((2, 3))

    torch.manual_seed(1)
    model = Fork().double()
    x = torch.randn(8, 2, 5, 5, dtype=torch.float64)
    owner = tuple(range(3)) * 2  # unit u is channel u of both halves
    first = ChannelGroup(
        "first",
        3,
        (Slice("first.weight", 0, owner, "filter"),),
        (Slice("grouped.weight", 1, (0, 1, 2), "kernel"), Slice("plain.weight", 1, owner, "kernel")),
        True,
        None,
        (0,) * 3,
        (0,) * 3,
    )
    got = score([first], model, "reconstruction", loader=[x])["first"]
    read = model.first(x).relu()
    made = rows(model.grouped(read))
    size = (made**2).sum()
    shares = [(made[:, half] ** 2).sum() / size for half in (slice(0, 2), slice(2, 4))]
    plain = unfolded(read, model.plain), rows(model.plain(read))
    found = []
    for unit in range(3):
        left = [u for u in range(3) if u != unit]
        both = sum(
            share * lost(rows(read)[:, 3 * half : 3 * half + 3], made[:, 2 * half : 2 * half + 2], left, centred=False)
            for half, share in enumerate(shares)
        )
        columns = [9 * place + k for place, k in product(range(6), range(9)) if place % 3 != unit]
        found.append(both + lost(*plain, columns, centred=True))
    assert int(got.argmin()) == int(np.argmin(found))
    np.testing.assert_allclose(float(got.min()), min(found), rtol=1e-5)


def test_what_others_can_make_good_goes_first_and_repair_makes_it_good() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()).double()
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias):
            tensor[2:5] = 40 * tensor[[0, 0, 6]]  # the largest filters by far, and not needed at all
    x = torch.randn(40, 3, 7, 7, dtype=torch.float64)
    scores = score(ff.trace(model, x[:1]), model, "reconstruction", loader=[x])["0"]
    gone = set(scores.argsort()[:3].tolist())
    assert (len(gone & {0, 2, 3}), len(gone & {4, 6})) == (2, 1)
    original = copy.deepcopy(model)
    plan = ff.prune(model, x[:1], keep={"0": 5 / 8}, criterion="reconstruction", loader=[x]).plan
    repair(model, original, plan, [x], ridge=1e-12)
    fresh = torch.randn(5, 3, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(model(fresh), original(fresh), rtol=1e-6, atol=1e-6)


def test_where_training_follows_every_layer_has_the_same_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False)).double()
    x = torch.randn(10, 3, 8, 8, dtype=torch.float64)
    groups = ff.trace(model, x[:1])
    found = score(groups, model, "reconstruction-then-train", loader=[x])["0"]
    rows = model[1](model[0](x)).detach().permute(0, 2, 3, 1).reshape(-1, 6).numpy()
    kernels, gram = model[2].weight.detach().view(4, 6).numpy().T, rows.T @ rows
    ridge = 0.1 * np.trace(gram) / 6 * np.eye(6)

    def loss(unit: int) -> float:  # the optimal brain surgeon's, Hassibi & Stork 1993, equation 5
        return float((kernels[unit] ** 2).sum() / np.linalg.inv(gram + ridge)[unit, unit])

    losses = [loss(unit) for unit in range(6)]
    first = int(np.argmin(losses))
    assert int(found.argmin()) == first
    assert float(found[first]) == pytest.approx(losses[first] / float(((rows @ kernels) ** 2).sum()), rel=1e-9)
    monkeypatch.setattr(least_squares, "RIDGES", (10.0,) * 2)
    assert torch.equal(found, score(groups, model, "reconstruction-then-train", loader=[x])["0"])


def test_many_units_go_a_few_at_a_time_and_none_is_scored_twice() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(10, 200), nn.ReLU(), nn.Linear(200, 5)).double()
    x = torch.randn(1000, 10, dtype=torch.float64)
    scores = score(ff.trace(model, x[:1]), model, "reconstruction", loader=[x])["0"]
    assert len(scores.unique()) == 200
    read = F.relu(model[0](x)).detach().numpy()
    wanted = (read @ model[2].weight.detach().numpy().T).astype(float)
    kept, largest = scores.topk(20).indices.tolist(), model[0].weight.abs().sum(1).topk(20).indices.tolist()
    assert lost(read, wanted, kept, centred=True) < 0.7 * lost(read, wanted, largest, centred=True)


class Padded(nn.Conv2d):
    """Pads in its own forward, as timm's `Conv2dSame` does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Padded(6, 4, 3, 2),
        lambda: nn.Conv2d(6, 4, 3, groups=2),
        lambda: nn.ConvTranspose2d(6, 3, 3, 2, 1, 1),
        lambda: nn.ConvTranspose2d(6, 4, 2, 2, groups=2),
    ],
    ids=["subclass", "grouped", "transposed", "grouped, transposed"],
)
def test_every_kind_of_layer_against_least_squares_of_its_parameters(make) -> None:
    """The oracle takes the reader as a linear function of its weights and biases, by autograd."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), make()).double().eval()
    x = torch.randn(12, 2, 5, 5, dtype=torch.float64)
    groups = [group for group in ff.trace(model, x[:1]) if group.name == "0"]
    (group,) = groups
    (part,) = [part for part in group.consumers if part.role == "kernel"]
    weight, bias, read = model[2].weight.detach(), model[2].bias.detach(), model[:2](x).detach()

    def call(*given: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model[2], {"weight": given[0], "bias": given[1]}, (read,)).flatten()

    columns, means = torch.autograd.functional.jacobian(call, (weight, bias), vectorize=True)
    columns = columns.flatten(1)
    wanted = columns @ weight.flatten()
    means = torch.linalg.qr(means).Q
    columns, wanted = columns - means @ (means.T @ columns), wanted - means @ (means.T @ wanted)
    index = torch.arange(weight.numel()).view_as(weight)
    owned = [
        index.index_select(part.axis, torch.tensor([p for p, u in enumerate(part.units) if u == unit])).flatten()
        for unit in range(group.size)
    ]
    scores = score(groups, model, "reconstruction", loader=[x])["0"]
    check(scores, [(columns.numpy(), wanted.numpy(), lambda unit: owned[unit].tolist(), False)])


class Odd(nn.Module):
    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 1), last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).relu()).mean((2, 3))


def test_refusals_name_the_group_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 6, 6)
    model = Odd(nn.Conv2d(4, 2, 3))
    monkeypatch.setattr(reconstruction, "_LARGEST", 35)
    with pytest.raises(ConfigError, match=r"last\.weight: more than 35 inputs"):
        score(ff.trace(model, x), model, "reconstruction", loader=[x])


def test_images_that_leave_inputs_dark_are_enough() -> None:
    """Dead channels and fewer positions than inputs: the ridge keeps it solvable, and dead channels go first."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3), nn.Flatten())
    with torch.no_grad():
        model[0].bias[[1, 4]] = -1e4
    x = torch.randn(1, 3, 5, 5)
    scores = score(ff.trace(model, x), model, "reconstruction", loader=[x])["0"]
    assert bool(torch.isfinite(scores).all())
    assert {1, 4} <= set(scores.argsort()[:5].tolist())
    with torch.no_grad():
        model[0].bias[:] = -1e4
    assert bool(torch.isfinite(score(ff.trace(model, x), model, "reconstruction", loader=[x])["0"]).all())
