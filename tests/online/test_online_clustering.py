"""Online clustering in a plain training loop: what it must not touch, what it cuts, how it goes on."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from filterfold.errors import CheckpointError, ConfigError, SelectionError
from filterfold.online import OnlineFilterClustering, Pull, Schedule, averager, pull
from filterfold.pruning.criteria import score
from filterfold.surgery.layer_attributes import restore, snapshot
from filterfold.utils.io import load_tree, save_tree


def vgg(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 9, 16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.branch = nn.Sequential(
            nn.Conv2d(8, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.relu(x + self.branch(x)).mean((2, 3)))


def batch(index: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(16, 1, 6, 6, generator=generator)
    return x.to(dtype), x.mean((1, 2, 3)).mul(20).long().clamp(-1, 1) + 1


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, index: int, extra: Tensor | None = None) -> float:
    x, y = batch(index, next(model.parameters()).dtype)
    optimizer.zero_grad()
    loss = functional.cross_entropy(model(x), y)
    (loss if extra is None else loss + extra).backward()
    optimizer.step()
    return loss.item()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 0.01, amsgrad=True)


EXAMPLE = torch.zeros(1, 1, 6, 6)


def frozen_copy(tree: object) -> object:
    return copy.deepcopy(tree)


def same(one: object, two: object) -> bool:
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(same(a, b) for a, b in zip(one, two, strict=True))  # type: ignore[arg-type]
    return one == two


@pytest.mark.parametrize("make", [vgg, Residual])
@pytest.mark.parametrize("kind", [sgd, adamw])
def test_update_clusters_touches_nothing(make, kind) -> None:
    model = make().train()
    optimizer = kind(model)
    train_step(model, optimizer, 0)
    online = OnlineFilterClustering(model, EXAMPLE, optimizer, keep=0.5)
    grads = [p.grad.clone() for p in model.parameters()]
    before = frozen_copy((model.state_dict(), optimizer.state_dict()))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    rows = online.update_clusters()
    assert same(before, (model.state_dict(), optimizer.state_dict()))
    assert same(grads, [p.grad for p in model.parameters()])
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])  # noqa: NPY002
    assert all(module.training for module in model.modules())
    assert {row["group"]: (row["k"], row["changed"]) for row in rows} == {
        group.name: (group.size // 2, group.size) for group in online.groups if group.frozen is None
    }
    assert all(0 < row["cosine"] <= 1 and row["inertia"] > 0 for row in rows)
    assert [row["changed"] for row in online.update_clusters()] == [0] * len(rows)


@pytest.mark.parametrize("kind", [sgd, adamw])
@pytest.mark.parametrize("make", [vgg, Residual])
def test_training_goes_on_after_the_fold(make, kind) -> None:
    model = make()
    optimizer = kind(model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    online = OnlineFilterClustering(
        model, EXAMPLE, optimizer, keep=0.5, averaged=averaged, schedule=Schedule((1, 2), ((3, 0.5), (5, 1.0)))
    )
    parameters, events = list(model.parameters()), []
    for epoch in range(1, 8):
        for index in range(4):
            train_step(model, optimizer, epoch * 10 + index, online.loss())
            averaged.update_parameters(model)
        events.append(online.step(epoch))
    assert [bool(event) for event in events] == [True, True, True, False, True, False, False]
    assert all(one is two for one, two in zip(parameters, model.parameters(), strict=True))
    for parameter in parameters:
        for value in optimizer.state[parameter].values():
            assert not isinstance(value, Tensor) or value.ndim == 0 or value.shape == parameter.shape
    assert [cut.verified is not None and cut.verified.ok for cut in online.cuts] == [True, True]
    assert online.cuts[1].macs[1] < online.cuts[1].macs[0] == online.cuts[0].macs[1] < online.cuts[0].macs[0]
    assert online.finished
    assert online.loss().item() == 0
    assert averaged(batch(0)[0]).shape == (16, 3)
    assert online.groups[0].size == 4


def test_widths_step_from_full_to_target() -> None:
    model = vgg()
    online = OnlineFilterClustering(
        model, EXAMPLE, sgd(model), clusters={"0": 2, "4": 100, "8": 4}, schedule=Schedule((), ((1, 0.5), (2, 1.0)))
    )
    online.step(1)
    assert (model[0].out_channels, model[4].out_channels, model[8].out_features) == (5, 12, 10)
    online.step(2)
    assert (model[0].out_channels, model[4].out_channels, model[8].out_features) == (2, 12, 4)
    assert [plan.widths["0"] for plan in online.plans] == [(8, 5), (5, 2)]


def test_a_late_call_catches_up() -> None:
    model = vgg()
    online = OnlineFilterClustering(model, EXAMPLE, sgd(model), keep=0.5, schedule=Schedule.gradual(10))
    assert len(online.step(9)) == 1
    assert online.finished
    assert model[0].out_channels == 4


def twins(model: nn.Sequential) -> nn.Sequential:
    model = model.double()
    with torch.no_grad():
        for index, norm in ((0, 1), (4, 5), (8, None)):
            layer = model[index]
            half = len(layer.weight) // 2
            scale = 1.7 if norm is None else 1.0  # with a norm scaled twins would need other statistics
            for tensor in (layer.weight, layer.bias):
                if tensor is not None:
                    tensor[half:] = scale * tensor[:half]
    return model


def test_folding_equal_filters_is_exact() -> None:
    model = twins(vgg())
    x = batch(1, torch.float64)[0]
    before = model.eval()(x)
    online = OnlineFilterClustering(model, x[:1], None, keep=0.5)
    result = online.cluster_and_prune()
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    assert result.exact
    assert result.change < 1e-12
    assert "fold: 36 -> 18 units" in str(result)
    assert "output unchanged" in str(result)


def test_an_inexact_fold_says_so() -> None:
    model = vgg()
    result = OnlineFilterClustering(model, EXAMPLE, None, keep=0.5).cluster_and_prune()
    assert not result.exact
    assert result.change > 1e-3
    assert result.verified is not None
    assert result.verified.ok


def test_threshold_folds_twins_and_nothing_else() -> None:
    model = twins(vgg())
    online = OnlineFilterClustering(model, EXAMPLE.double(), None, threshold=0.999)
    assert online.cluster_and_prune().exact
    assert (model[0].out_channels, model[4].out_channels, model[8].out_features) == (4, 6, 8)


@pytest.mark.parametrize("method", ["l1", "random", "fpgm"])
def test_controls_drop_at_the_same_milestones(method: str) -> None:
    model = vgg()
    online = OnlineFilterClustering(model, EXAMPLE, sgd(model), keep=0.5, schedule=Schedule.gradual(10), method=method)
    groups, kept = online.groups, copy.deepcopy(model)
    assert online.step(1) == []
    assert online.loss().item() == 0
    (event,) = online.step(2)
    assert event.startswith(f"{method}: 36 -> ")
    scores = score(groups, kept, method, seed=0)["0"]
    best = scores.argsort(descending=True)[:6].sort().values
    assert torch.equal(model[0].weight, kept[0].weight[best])
    online.step(5)
    assert model[0].out_channels == 4


def test_centroid_control_replaces_and_removes_nothing() -> None:
    model = vgg()
    kept = copy.deepcopy(model.state_dict())
    online = OnlineFilterClustering(model, EXAMPLE, sgd(model), keep=0.5, method="centroid")
    online.update_clusters()
    labels = dict(online.labels)
    result = online.cluster_and_prune()
    assert result.macs[0] == result.macs[1]
    assert str(result).startswith("centroid: nothing removed")
    for name, index in (("0", 0), ("4", 4), ("8", 8)):
        for unit, label in enumerate(labels[name].tolist()):
            mean = kept[f"{name}.weight"][labels[name] == label].mean(dim=0)
            torch.testing.assert_close(model[index].weight[unit], mean)


def test_the_pull_equals_autograd_on_the_formula() -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 2])
    unit = weight.flatten(1) / weight.flatten(1).norm(dim=1, keepdim=True)
    mean = torch.stack([unit[labels == k].mean(dim=0) for k in range(3)])
    plain = 0.5 * (unit - mean[labels]).square().sum()
    (expected,) = torch.autograd.grad(plain, weight)
    value = pull(weight, labels, averager(labels))
    (found,) = torch.autograd.grad(3 * value, weight)
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(found, 3 * expected)


def test_the_pull_gathers_the_filters_of_coupled_layers() -> None:
    model = Residual()
    online = OnlineFilterClustering(model, EXAMPLE, None, keep=0.5, pull=Pull(strength=1.0))
    assert online.loss().item() == 0
    layers = {"stem.0": 2, "branch.0": 1}  # a row of a coupled group is its layers' directions, at length 1 together
    first = sum(row["inertia"] * layers[row["group"]] for row in online.update_clusters())
    assert online.loss().item() == pytest.approx(first / 2, rel=1e-5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(100):
        optimizer.zero_grad()
        online.loss().backward()
        optimizer.step()
    assert online.loss().item() < 0.05 * first
    assert online.cluster_and_prune().verified


def test_no_pull_on_frozen_parameters_or_at_strength_zero() -> None:
    model = vgg()
    model[0].weight.requires_grad_(False)
    online = OnlineFilterClustering(model, EXAMPLE, None, keep=0.5)
    online.update_clusters()
    online.loss().backward()
    assert model[0].weight.grad is None
    assert model[4].weight.grad is not None
    online = OnlineFilterClustering(vgg(), EXAMPLE, None, keep=0.5, pull=Pull(strength=0))
    online.update_clusters()
    assert online.loss().item() == 0
    assert not online.pulls


@pytest.mark.parametrize("stop", [2, 3, 4])
@pytest.mark.parametrize("kind", [sgd, adamw])
def test_resume_ends_with_the_same_weights(tmp_path, kind, stop: int) -> None:
    schedule = Schedule((1, 2, 3, 4), ((3, 0.5), (5, 1.0)))

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = vgg()
        return model, kind(model)

    def run(model, optimizer, online, epochs) -> None:
        for epoch in epochs:
            for index in range(3):
                train_step(model, optimizer, 100 * epoch + index, online.loss())
            online.step(epoch)

    model, optimizer = fresh()
    online = OnlineFilterClustering(model, EXAMPLE, optimizer, keep=0.5, schedule=schedule, pull=Pull(strength=0.1))
    run(model, optimizer, online, range(1, stop + 1))
    tree = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict(), "online": online.state_dict()}
    save_tree(tmp_path / "state", {**tree, "structure": snapshot(model)})
    run(model, optimizer, online, range(stop + 1, 7))

    again, other = fresh()
    kept = load_tree(tmp_path / "state")
    restore(again, kept["structure"])
    again.load_state_dict(kept["model"])
    other.load_state_dict(kept["optimizer"])
    resumed = OnlineFilterClustering(again, EXAMPLE, other, keep=0.5, schedule=schedule, pull=Pull(strength=0.1))
    resumed.load_state_dict(kept["online"])
    run(again, other, resumed, range(stop + 1, 7))
    assert same(dict(model.state_dict()), dict(again.state_dict()))
    assert online.history == resumed.history
    assert online.plans == resumed.plans
    assert resumed.finished


def test_a_state_must_fit() -> None:
    model = vgg()
    online = OnlineFilterClustering(model, EXAMPLE, None, keep=0.5)
    state = online.state_dict()
    online.cluster_and_prune()
    with pytest.raises(CheckpointError, match="group '0' has 4 units, the state says 8"):
        online.load_state_dict(state)
    with pytest.raises(CheckpointError, match="the state is of method 'fold', this is 'l1'"):
        OnlineFilterClustering(vgg(), EXAMPLE, None, keep=0.5, method="l1").load_state_dict(state)


def test_wrapped_models_are_looked_into() -> None:
    inner = vgg()
    averaged = torch.optim.swa_utils.AveragedModel(inner)
    OnlineFilterClustering(averaged, EXAMPLE, None, keep=0.5).cluster_and_prune()
    assert averaged.module[0].out_channels == 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, SelectionError, "no budget: say how much may remain with clusters=, keep=, threshold= or macs="),
        ({"keep": 0.5, "clusters": 3}, SelectionError, "clusters= can't be combined with keep="),
        ({"keep": 1.5}, SelectionError, r"keep=1.5 is no share: it must lie above 0 and be at most 1"),
        ({"clusters": 0}, SelectionError, "clusters=0: must be a whole number of at least 1"),
        ({"keep": 0.5, "method": "magic"}, ConfigError, "unknown method 'magic'"),
        ({"keep": 0.5, "pull": "magic"}, ConfigError, "unknown pull 'magic'"),
        ({"keep": 0.5, "round_to": 0}, SelectionError, "round_to=0"),
        ({"threshold": 2.0}, ConfigError, "threshold=2.0"),
        ({"threshold": 0.5, "method": "l1"}, ConfigError, "says nothing about how many units 'l1' keeps"),
        ({"clusters": {"no*": 3}}, SelectionError, r"clusters: 'no\*' matches no layer"),
        ({"keep": 0.5, "ignore": ["*"]}, SelectionError, "no channel group can be cut"),
    ],
)
def test_bad_options(options, error, message: str) -> None:
    with pytest.raises(error, match=message):
        OnlineFilterClustering(vgg(), EXAMPLE, None, **options)
