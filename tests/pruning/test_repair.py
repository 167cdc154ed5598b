"""Repair from a few images: exact where it can be, never worse on the images, and nothing else touched."""

from __future__ import annotations

import copy
from math import inf

import pytest
import torch
from torch import Tensor, nn

from filterfold.errors import ConfigError, DataError, ModelError, PlanError
from filterfold.graph import trace
from filterfold.online.folding.fold import from_clusters
from filterfold.plan import Plan
from filterfold.pruning.budgets import select
from filterfold.pruning.prune import prune
from filterfold.pruning.reconstruction import reestimate, repair
from filterfold.pruning.reconstruction.least_squares import RIDGES
from filterfold.surgery.apply import apply


def images(count: int = 24, size: int = 6) -> Tensor:
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def net(groups: int = 1, norm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(8) if norm else nn.Identity(), nn.BatchNorm2d(6) if norm else nn.Identity()]
    layers = [
        *(nn.Conv2d(3, 8, 3, padding=1), norms[0], nn.ReLU()),
        *(nn.Conv2d(8, 6, 3, 2, 1, groups=groups, bias=not norm, padding_mode="reflect"), norms[1], nn.ReLU()),
        *(nn.Dropout(), nn.Flatten(), nn.Linear(6 * 9, 5)),
    ]
    return nn.Sequential(*layers).double()


def test_statistics_are_the_mean_over_batches_and_all_else_is_kept():
    model, x = net(), images()
    model[1].eval()
    model[1].momentum, model[1].num_batches_tracked = 0.3, torch.tensor(7)
    model.append(nn.BatchNorm1d(5).double())
    old = {name: value.clone() for name, value in model.state_dict().items()}
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    assert reestimate(model, [(x[:12], 0), (x[12:], 0), (x, 0)], batches=2) == 3
    made = model[0](x)
    assert torch.allclose(model[1].running_mean, made.mean((0, 2, 3)))
    assert torch.allclose(model[1].running_var, (made[:12].var((0, 2, 3)) + made[12:].var((0, 2, 3))) / 2)
    assert model[1].momentum == 0.3
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, old[name])}
    assert changed == {f"{place}.running_{kind}" for place in (1, 4, 9) for kind in ("mean", "var")}


def test_statistics_survive_a_batch_that_does_not_fit():
    model, x = net(), images()
    old = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match="can't run on a batch"):
        reestimate(model, [x, x[:, :2]])
    assert all(torch.equal(value, old[name]) for name, value in model.state_dict().items())
    with pytest.raises(DataError, match="no batch"):
        reestimate(model, [])


def dependent(model: nn.Sequential) -> Plan:
    """Make filters 4-7 of the first layer positive multiples of 0-3, and drop them."""
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias):
            tensor[4:] = tensor[:4] * torch.tensor([0.5, 2, 3, 1.5]).double().view(-1, *[1] * (tensor.dim() - 1))
    groups = trace(model, images(1))
    scores = {group.name: torch.arange(group.size, 0, -1.0).double() for group in groups}
    return select(groups, scores, keep={"0": 0.5})


def test_channels_that_others_determine_are_not_missed():
    model, x = net(norm=False).eval(), images()
    plan = dependent(model)
    original, fresh = copy.deepcopy(model), images(30)[24:]
    apply(plan, model)
    assert (model(fresh) - original(fresh)).norm() > 0.01 * original(fresh).norm()
    found = repair(model, original, plan, [x[:12], x[12:]], ridge=1e-12)
    assert [row.name for row in found.layers] == ["3"]
    assert found.layers[0].after < 1e-6
    assert (model(fresh) - original(fresh)).norm() <= 1e-6 * original(fresh).norm()


def test_nor_behind_batch_norms():
    model, x = net(), images()
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias):
            tensor[4:] = tensor[:4]
        model[1].weight[4:], model[1].bias[4:] = 2 * model[1].weight[:4], 2 * model[1].bias[:4]
    reestimate(model, [x])
    model.eval()
    groups = trace(model, images(1))
    plan = select(groups, {g.name: torch.arange(g.size, 0, -1.0).double() for g in groups}, keep={"0": 0.5})
    original = copy.deepcopy(model)
    apply(plan, model)
    repair(model, original, plan, [x], ridge=1e-12)
    assert (model(x) - original(x)).norm() <= 1e-6 * original(x).norm()


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize(("groups", "norm"), [(1, True), (2, True), (1, False)])
def test_no_layer_gets_worse_and_only_readers_change(groups: int, norm: bool, fold: bool):
    model, x = net(groups, norm), images()
    original = copy.deepcopy(model)
    if fold:
        traced = trace(model, x[:1])
        plan = from_clusters(
            traced, {g.name: [u % (g.size // 2) for u in range(g.size)] for g in traced if not g.frozen}
        )
        apply(plan, model)
    else:
        plan = prune(model, x[:1], keep=0.5).plan
    cut, kept = copy.deepcopy(model), copy.deepcopy(original.state_dict())
    state = torch.get_rng_state()
    found = repair(model, original, plan, [x[:16], x[16:]])
    assert [row.name for row in found.layers] == ["3", "8"]
    assert all(row.after < row.before for row in found.layers)
    assert not found.skipped
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, kept[name]) for name, value in original.state_dict().items())
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, cut.state_dict()[n])}
    statistics = {f"{place}.running_{kind}" for place in (1, 4) for kind in ("mean", "var")} if norm else set()
    assert changed <= {"3.weight", "3.bias", "8.weight", "8.bias"} | statistics
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_last_layer_is_ridge_regression_on_what_it_reads():
    model, x = net(norm=False).eval(), images(80)
    original = copy.deepcopy(model)
    plan = prune(model, x[:1], keep={"3": 0.5}).plan
    cut = copy.deepcopy(model)
    (row,) = repair(model, original, plan, [x[:50], x[50:]], ridge=1e-2).layers
    read, wanted = cut[:-1](x).detach(), original(x).detach()
    left = wanted - cut(x).detach()
    centred, ridge = read - read.mean(0), 1e-2 * (read - read.mean(0)).square().sum(0).mean()
    eye = ridge.sqrt() * torch.eye(read.shape[1], dtype=torch.float64)
    stacked = torch.linalg.lstsq(torch.cat((centred, eye)), torch.cat((left - left.mean(0), torch.zeros(len(eye), 5))))
    assert torch.allclose(model[-1].weight, cut[-1].weight + stacked.solution.T, atol=1e-10)
    assert torch.allclose(model(x).mean(0), wanted.mean(0))
    assert row.before == pytest.approx(float(left.norm() / wanted.norm()))
    assert row.after == pytest.approx(float((wanted - model(x).detach()).norm() / wanted.norm()))


@pytest.mark.parametrize(("count", "independent"), [(401, False), (20, True)])
def test_the_ridge_is_the_one_that_holds_on_examples_it_was_not_solved_on(count, independent):
    """By hand, for a last layer that reads six inputs: solved on the even examples, judged on the odd, and back."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4, bias=False)).double().eval()
    x = torch.randn(count, 12, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        model[0].weight[6:] = model[0].weight[:6] * 2
        if independent:  # what is dropped depends on other inputs, and matters more
            model[0].weight[:6, 6:] = 0
            model[0].weight[6:, :6] = 0
            model[2].weight[:, 6:] *= 5
    groups = trace(model, x[:1])
    plan = select(groups, {g.name: torch.arange(12, 0, -1.0).double() for g in groups if not g.frozen}, keep={"0": 0.5})
    original = copy.deepcopy(model)
    apply(plan, model)
    cut = copy.deepcopy(model)
    read, left = cut[:-1](x).detach(), (original(x) - cut(x)).detach()

    def solved(ridge, rows):
        gram = read[rows].T @ read[rows]
        eye = ridge * gram.diagonal().mean() * torch.eye(6, dtype=torch.float64)
        return torch.linalg.solve(gram + eye, read[rows].T @ left[rows]) if ridge < inf else torch.zeros(6, 4).double()

    def held_out(ridge):
        halves = (slice(0, None, 2), slice(1, None, 2))
        return sum(float((left[b] - read[b] @ solved(ridge, a)).square().sum()) for a, b in (halves, halves[::-1]))

    best = min(RIDGES, key=held_out)
    assert (best > 0.1) == independent  # few examples and noise ask for a strong ridge
    (row,) = repair(model, original, plan, [x[:11], x[11:]]).layers
    assert row.ridge == best
    assert torch.allclose(model[2].weight, cut[2].weight + solved(best, slice(None)).T, atol=1e-9)


def test_refusals_leave_the_network_alone():
    model, x = net(), images()
    original = copy.deepcopy(model)
    plan = prune(model, x[:1], keep=0.5).plan
    cut = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match="ridge"):
        repair(model, original, plan, [x], ridge=0)
    with pytest.raises(ModelError, match="can't run"):
        repair(model, original, plan, [x[:, :2]])
    with pytest.raises(PlanError, match="the plan gives outputs"):
        repair(original, original, plan, [x])
    assert all(torch.equal(value, cut[name]) for name, value in model.state_dict().items())
