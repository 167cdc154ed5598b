"""One budget for the whole network: what clusters well narrows first, milestones take steps of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from filterfold import data, zoo
from filterfold.errors import SelectionError
from filterfold.graph import trace
from filterfold.online import OnlineCallback, OnlineFilterClustering, Schedule, Target
from filterfold.online.widths import TargetWidths
from filterfold.plan import Cut, Plan, keep_units
from filterfold.profiling.macs import measure
from filterfold.profiling.predict import predict
from filterfold.pruning.budgets.prices import SizePrices
from filterfold.pruning.budgets.ranking import parts, unranked
from filterfold.surgery.apply import apply
from filterfold.training import Recipe, train

X = torch.zeros(1, 3, 8, 8)


def net() -> nn.Sequential:
    """The first layer's 24 filters are four, six times over; the second's are unrelated."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, bias=False), nn.ReLU(), nn.Conv2d(24, 24, 3, bias=False), nn.ReLU(), nn.Conv2d(24, 4, 1)
    )
    with torch.no_grad():
        model[0].weight[4:] = model[0].weight[:4].repeat(5, 1, 1, 1)
    return model


@pytest.mark.parametrize("method", ["fold", "l1"])
def test_what_clusters_narrows_first_and_the_budget_is_met(method: str):
    model = net()
    full = measure(model, X).macs
    OnlineFilterClustering(model, X, macs=0.5, method=method).cluster_and_prune()
    assert measure(model, X).macs <= 0.5 * full
    assert model[0].out_channels < 16
    assert model[2].out_channels == 24


def test_milestones_take_steps_of_the_budget_also_after_a_restart():
    model = net()
    full = measure(model, X).macs
    schedule = Schedule(milestones=((1, 0.5), (2, 1.0)))
    online = OnlineFilterClustering(model, X, macs=0.2, schedule=schedule, round_to=4)
    online.step(1)
    assert 0.2 * full < measure(model, X).macs <= 0.6 * full
    again = OnlineFilterClustering(model, X, macs=0.2, schedule=schedule, round_to=4)
    again.load_state_dict(online.state_dict())
    again.step(2)
    assert 0.1 * full < measure(model, X).macs <= 0.2 * full
    assert (model[0].out_channels % 4, model[2].out_channels % 4) == (0, 0)


@pytest.mark.parametrize("method", ["fold", "l1", "fpgm", "random"])
def test_wide_groups_get_even_widths_unless_told_otherwise(method: str):
    def wide() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 144, 3), nn.ReLU(), nn.Conv2d(144, 60, 3), nn.ReLU(), nn.Conv2d(60, 4, 1))

    schedule = Schedule(milestones=((1, 0.5), (2, 1.0)))
    for round_to in (None, 1):
        model = wide()
        full = measure(model, X).macs
        online = OnlineFilterClustering(model, X, macs=0.47, schedule=schedule, round_to=round_to, method=method)
        online.step(1)
        online.step(2)
        assert measure(model, X).macs <= 0.47 * full
        assert (model[0].out_channels % 16 == 0) == (round_to is None)


def test_refusals():
    with pytest.raises(SelectionError, match="keep= can't be combined with macs="):
        OnlineFilterClustering(net(), X, macs=0.5, keep=0.5)
    with pytest.raises(SelectionError, match=r"macs=1\.5 is no share"):
        OnlineFilterClustering(net(), X, macs=1.5)
    with pytest.raises(SelectionError, match=r"macs=1e-06 can't be met: the smallest share within reach is macs 0\."):
        OnlineFilterClustering(net(), X, macs=1e-6)


def vgg() -> nn.Module:
    torch.manual_seed(0)
    return zoo.build("vgg16", channels=1, width=0.25)


def enlarged() -> data.ImageData:
    """Digits of 32 by 32 pixels."""
    digits = data.load("digits", train_limit=64)
    big = {
        name: replace(split, images=split.images.repeat_interleave(4, 2).repeat_interleave(4, 3))
        for name in ("train", "validation", "test")
        if isinstance(split := getattr(digits, name), data.Split)
    }
    return replace(digits, image_size=32, **big)


class StopError(Exception):
    pass


@pytest.mark.slow
def test_a_budget_in_the_training_loop_is_met_in_steps_and_resumed(tmp_path):
    images, recipe = enlarged(), Recipe(epochs=4, batch_size=32, lr=0.05)
    schedule = {"updates": [1, 2, 3], "milestones": [[2, 0.5], [3, 1.0]]}

    def run(model: nn.Module, path=None, check=None) -> tuple[list[int], OnlineCallback]:
        callback = OnlineCallback(macs=0.26, schedule=schedule, strength=0.1)
        history = train(
            model, images, recipe, callbacks=(callback,), checkpoint=path, check=check, device="cpu", validate_every=0
        )
        return [row["macs"] for row in history.rows], callback

    def stop_after(epochs: int):
        seen = []

        def check(seconds: float) -> None:
            seen.append(seconds)
            if len(seen) == epochs:
                raise StopError

        return check

    whole = vgg()
    full = measure(whole, images.example).macs
    macs, first = run(whole)
    assert macs[0] == full
    assert 0.6 * full < macs[1] <= 0.63 * full
    assert 0.24 * full < macs[2] <= 0.26 * full
    assert macs[3] == macs[2] == measure(whole, images.example).macs
    for epochs in (1, 2):
        path, again = tmp_path / str(epochs), vgg()
        with pytest.raises(StopError):
            run(vgg(), path, stop_after(epochs))
        resumed, second = run(again, path)
        assert resumed == macs
        assert same_weights(whole, again)
        assert first.online is not None
        assert second.online is not None
        assert first.online.plans == second.online.plans
        assert first.online.history == second.online.history


def same_weights(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_widths_are_chosen_at_milestones_only(monkeypatch):
    calls, choose = [], TargetWidths.choose

    def counting(self, groups, share, *others):
        calls.append(share)
        choose(self, groups, share, *others)

    monkeypatch.setattr(TargetWidths, "choose", counting)
    schedule = Schedule(updates=(1, 2, 3, 4, 5), milestones=((3, 0.5), (6, 1.0)))
    online = OnlineFilterClustering(net(), X, macs=0.5, schedule=schedule)
    for epoch in range(1, 7):
        online.step(epoch)
    assert calls == [0.5] * 2 + [1.0] * 2  # before and at each milestone
    assert [row["k"] for row in online.history if row["group"] == "0" and row["epoch"] < 3] == [
        row["k"] for row in online.history if row["group"] == "0" and row["epoch"] == 1
    ] * 2


@pytest.mark.parametrize("name", ["densenet", "resnet20", "vgg16"])
@pytest.mark.parametrize("round_to", [1, 4])
def test_prices_agree_with_the_prediction_and_the_surgery(name: str, round_to: int):
    torch.manual_seed(0)
    model = Dense() if name == "densenet" else zoo.build(name, width=0.5)
    x = torch.zeros(1, 3, 32, 32)
    cost, traced = measure(model, x), trace(model, x)
    widths = TargetWidths(Target(macs=0.4, round_to=round_to), traced, cost)
    groups = widths.active(traced)
    prices, cuts = SizePrices([unranked(group) for group in groups], cost), []
    counts = prices.full
    for index, group in enumerate(groups):
        assert len(parts(group)) == 1
        fewer = group.size - group.size // 3
        before, saved = prices.amounts(counts)["macs"], prices.saved(counts, index, fewer)
        counts = (*counts[:index], fewer, *counts[index + 1 :])
        assert prices.amounts(counts)["macs"] == before - saved
        cuts.append(Cut(group.name, keep_units(group.size, range(fewer)), group.producers, group.consumers))
    plan = Plan(tuple(cuts))
    after = predict(plan, cost)
    assert prices.amounts(counts) == {"units": sum(counts), "macs": after.macs, "parameters": after.parameters}
    widths.choose(groups, 1.0, dict(model.named_parameters()), cost, "filters")
    chosen = widths.chosen.values()
    assert all(width in (group.size, width // round_to * round_to) for group, width in zip(groups, chosen, strict=True))
    apply(plan, model)
    assert prices.amounts(counts)["macs"] == measure(model, x).macs


class Dense(nn.Module):
    """Layers that read everything before them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 12 * i, 12, 3, padding=1) for i in range(3))
        self.head = nn.Linear(39, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.cat((x, torch.relu(layer(x))), dim=1)
        return self.head(x.mean((2, 3)))


def test_every_control_works_under_a_budget_with_the_widths_that_folding_has():
    schedule = Schedule(updates=(1, 2), milestones=((2, 0.5), (3, 1.0)))
    found = {}
    for method in ("fold", "centroid", "l1", "l2", "random", "fpgm"):
        torch.manual_seed(0)
        model = zoo.build("vgg_small", channels=1, image_size=8, width=0.5)
        x = torch.randn(2, 1, 8, 8)
        full, kept = measure(model, x).macs, {name: value.clone() for name, value in model.state_dict().items()}
        online = OnlineFilterClustering(model, x, macs=0.4, schedule=schedule, method=method)
        for epoch in (1, 2):
            online.step(epoch)
        first = {row["group"]: row["k"] for row in reversed(online.history) if row["epoch"] == 2}  # at the cut
        found[method] = first if method == "centroid" else {n: w[1] for n, w in online.plans[0].widths.items()}
        online.step(3)
        assert online.finished
        assert online.loss().item() == 0
        if method == "centroid":
            assert measure(model, x).macs == full
            assert online.plans == []
            weight = model.features[0].weight
            assert weight.shape == kept["features.0.weight"].shape
            distinct = torch.unique(weight.detach().flatten(1), dim=0)
            last = {row["group"]: row["k"] for row in online.history}
            assert len(distinct) == last.get("features.0", len(weight))
        else:
            assert measure(model, x).macs <= 0.4 * full
    changed = {name: width for name, width in found["fold"].items() if width != found["centroid"].get(name)}
    assert changed == {}
    assert all(widths == found["fold"] for method, widths in found.items() if method != "centroid")
