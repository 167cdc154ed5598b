"""The bound of a fold that is not exact, against what the fold changes in the layers that read its units."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from filterfold.graph import trace
from filterfold.online import OnlineFilterClustering
from filterfold.online.folding import bounds, fold
from filterfold.plan import Cut, Plan, keep_units
from filterfold.surgery.apply import apply


def net(norm: bool, pool: str, slope: float, linear: bool) -> nn.Sequential:
    between = {
        "max": nn.MaxPool2d(2),
        "average": nn.AvgPool2d(2),
        "global": nn.AdaptiveAvgPool2d(1),
        "none": nn.Identity(),
    }
    side = {"max": 4, "average": 4, "global": 1, "none": 8}[pool]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=not norm),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.LeakyReLU(slope),
        between[pool],
        *((nn.Flatten(), nn.Linear(8 * side * side, 5)) if linear else (nn.Conv2d(8, 5, 3, stride=2, padding=1),)),
    ).double()


def randomised(model: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.normal_()
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.1)
    return model.eval().requires_grad_(False)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    labels=st.lists(st.integers(0, 3), min_size=8, max_size=8),
    norm=st.booleans(),
    linear=st.booleans(),
    pool=st.sampled_from(["max", "average", "global", "none"]),
    slope=st.sampled_from([0.0, 0.2]),
    near=st.sampled_from([0.0, 1e-6, 0.1, 10.0]),
    dropped=st.booleans(),
)
def test_the_change_never_exceeds_the_bound(seed, labels, norm, linear, pool, slope, near, dropped) -> None:
    model = randomised(net(norm, pool, slope, linear), seed)
    with torch.no_grad():  # members of a cluster: equal but for noise
        noise = near * torch.randn_like(model[0].weight)
        first = [labels.index(label) for label in labels]
        model[0].weight.copy_(model[0].weight[first] + noise)
        for vector in (*model[0].parameters(), *model[1].parameters(), *model[1].buffers()):
            if vector.ndim == 1:
                vector.copy_(vector[first])
    x = 2 * torch.randn(4, 3, 8, 8, dtype=torch.float64)
    groups = trace(model, x)
    group = groups.by_name["0"]
    plan = fold(groups, {"0": labels}, model, gain="regression")
    if dropped:
        kept = [unit for unit in range(8) if labels[unit] == labels[0]]
        plan = Plan((Cut("0", keep_units(8, kept), group.producers, group.consumers),))
    found, out = bounds(model, plan, x), model(x)
    other = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    other_out = model(other)
    apply(plan, model)
    if not plan.changes:
        assert found == {}
        return
    bound = found["0"]
    change = float((model(x) - out).norm() / out.norm())
    assert change <= bound.relative * (1 + 1e-9) + 1e-12
    patches = nn.functional.unfold(other, 3, padding=1)
    lifted = float((patches.square().sum() + patches.shape[0] * patches.shape[2]) ** 0.5)
    assert float((model(other) - other_out).norm()) <= bound.gain * lifted * (1 + 1e-9) + 1e-12
    if near == 0 and not dropped:
        assert bound.relative < 1e-9  # rounding, of squares that are summed up


def test_one_unit_read_by_one_weight_is_bounded_tightly() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[2.0, 1.0]]))
    groups = trace(model, torch.zeros(1, 2, dtype=torch.float64))
    group = groups.by_name["0"]
    plan = Plan((Cut("0", (-1, 0), group.producers, group.consumers),))
    assert bounds(model, plan, torch.ones(1, 2, dtype=torch.float64))["0"].gain == pytest.approx(
        10.0
    )  # |2| · ‖(3, 4, 0)‖


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.d = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = torch.relu(x + self.b(x))
        return self.d(self.c(x))


def test_where_nothing_is_known_nothing_is_said() -> None:
    model = Branches().double().eval()
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    groups = trace(model, x)
    plan = fold(groups, {"a": [0, 0, 1, 2, 3, 4, 5, 6]}, model)
    assert bounds(model, plan, x) == {}


def test_a_norm_that_does_not_follow_its_filter_is_not_taken_for_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).eval()
    groups = trace(model, torch.zeros(1, 3, 8, 8))
    plan = fold(groups, {"0": [0, 0, 1, 2, 3, 4, 5, 6]}, model)
    assert bounds(model, plan, torch.randn(1, 3, 8, 8)) == {}


class Halves(nn.Module):
    """One convolution makes the units of two groups, as in YOLO's C2f blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.made, self.norm = nn.Conv2d(2, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.one, self.other = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.norm(self.made(x)).relu().chunk(2, dim=1)
        return self.one(one) + self.other(other)


def test_a_filter_of_two_groups_has_no_bound_and_is_cut() -> None:
    model, x = Halves(), torch.randn(2, 2, 4, 4)
    online = OnlineFilterClustering(model, x, keep=0.5)
    assert online.cluster_and_prune().bounds == {}
    assert model.made.out_channels == 4
    assert model(x).shape == (2, 3, 4, 4)


def test_the_bounds_are_recorded_with_the_cut() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(8 * 16, 3)),
    )
    kept = copy.deepcopy(model.state_dict())
    online = OnlineFilterClustering(model, torch.randn(2, 3, 8, 8), keep=0.5)
    (one, two) = online.cluster_and_prune().bounds.items()
    assert (one[0], two[0]) == ("0", "3")
    assert one[1].relative > 0
    assert two[1].gain > 0
    assert kept["0.weight"].shape[0] == 2 * model[0].out_channels
    centroid = OnlineFilterClustering(model, torch.randn(2, 3, 8, 8), keep=0.5, method="centroid")
    assert centroid.cluster_and_prune().bounds == {}
