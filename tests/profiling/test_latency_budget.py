"""Widths for a share of the time, on machines whose clock is arithmetic."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from torch import nn

from filterfold.errors import SelectionError, VerificationError
from filterfold.graph import trace
from filterfold.plan import Plan
from filterfold.profiling import LayerTimes, layer_calls
from filterfold.profiling.macs import measure
from filterfold.pruning.budgets import LatencyBudget, Selection, select_for_latency
from filterfold.pruning.budgets.layer_times import LayerTimeModel, score_curve
from filterfold.pruning.budgets.ranking import hardware_friendly, rank
from filterfold.pruning.budgets.solver import descend
from filterfold.pruning.prune import prune

from .machines import Machine

X = torch.zeros(1, 3, 8, 8)


def net(widths=(64, 64, 128)) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    before = 3
    for width in widths:
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def budget(share: float, machine: Machine, **options) -> LatencyBudget:
    return LatencyBudget(share, batch_size=2, repeats=2, folder=False, timer=machine, **options)


@pytest.mark.parametrize("share", [0.7, 0.4, 0.25, 0.1])
@pytest.mark.parametrize("elementwise", [0.0, 2e-7], ids=["layers only", "much besides layers"])
def test_the_budget_is_met_by_the_clock_and_nearly_used_up(share, elementwise):
    machine, model = Machine(elementwise=elementwise), net()
    dense = machine.of(copy.deepcopy(model), X)
    if elementwise:
        layers = Machine().of(copy.deepcopy(model), X)
        assert layers < 0.7 * dense
    result = prune(model, X, latency=budget(share, machine))
    measured = machine.of(model, X) / dense
    assert share * 0.75 <= measured <= share
    notes = result.plan.notes
    assert (notes["criterion"], notes["asked"]) == ("l1", {"latency": share})
    assert notes["latency"]["measured"] == pytest.approx(measured, rel=0.01)
    assert notes["achieved"]["macs"] == pytest.approx(result.after.macs / result.before.macs)
    assert notes["latency"]["control"] == pytest.approx(1.0)
    assert json.loads(result.plan.to_json())["notes"]["latency"]["tries"]
    assert result.verified
    assert result.verified.ok
    found = notes["latency"]
    line = f"time at batch 2: asked {share:.1%}, predicted {found['predicted']:.1%}, measured {found['measured']:.1%}"
    assert line in str(result).splitlines()


def test_widths_are_those_that_the_hardware_likes():
    widths = prune(net(), X, latency=budget(0.3, Machine())).plan.widths
    assert all(new % 16 == 0 for _, new in widths.values())
    widths = prune(net(), X, latency=budget(0.3, Machine()), round_to=24).plan.widths
    assert all(new % 24 == 0 or new == old for old, new in widths.values())


def test_the_best_units_stay():
    model, old = net(), net()
    result = prune(model, X, latency=budget(0.2, Machine()))
    kept = result.plan.widths["0"][1]
    assert kept < 64
    norms = old[0].weight.abs().sum((1, 2, 3))
    assert torch.equal(model[0].weight, old[0].weight[sorted(norms.topk(kept).indices.tolist())])


def test_time_is_saved_where_it_is_spent():
    """The same network; on the second machine the 5x5 layer is slow and must give more."""

    def build() -> nn.Sequential:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 128, 1), nn.ReLU(), nn.Conv2d(128, 64, 5), nn.ReLU(), nn.Conv2d(64, 128, 1)]
        return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(128, 128, 1), nn.ReLU(), nn.Conv2d(128, 16, 1))

    even = prune(build(), X, latency=budget(0.5, Machine(slow={25: 1 / 25})), verify=False).plan.widths
    uneven = prune(build(), X, latency=budget(0.5, Machine(slow={25: 40.0})), verify=False).plan.widths
    assert uneven["0"][1] * uneven["2"][1] < 0.55 * 128 * 64  # nearly all of the time is there
    assert uneven["4"][1] * uneven["6"][1] == 128 * 128
    assert even["4"][1] * even["6"][1] < 128 * 128


def test_a_forecast_that_is_wrong_is_put_right_by_measuring():
    """Layers alone seem to cost nothing when narrow; in the network they hardly get faster."""

    class Deceiving(Machine):
        def __call__(self, run, times):
            alone = not (hasattr(run, "func") and run.func.__name__ == "call_as_is")
            self.block = 1 if alone else 64
            return super().__call__(run, times)

    machine, model = Deceiving(), net((256, 256))
    honest = Machine(block=64)
    dense = honest.of(copy.deepcopy(model), X)
    result = prune(model, X, latency=budget(0.3, machine))
    found = result.plan.notes["latency"]
    assert honest.of(model, X) / dense <= 0.3
    assert found["tries"][0]["predicted"] <= 0.3 < found["tries"][0]["measured"]


def test_a_lucky_measurement_is_not_believed():
    class Lucky(Machine):
        """The first short measurement of a cut network claims twice its speed."""

        lies = 2  # calls of the timer: one round of two blocks each

        def __call__(self, run, times):
            taken = super().__call__(run, times)
            model = run.args[0] if hasattr(run, "args") and run.args and isinstance(run.args[0], nn.Module) else None
            if model is not None and model[0].out_channels < 64 and self.lies and times > 1:
                self.lies -= 1
                return taken / 2
            return taken

    model = net()
    dense = Machine().of(copy.deepcopy(model), X)
    result = prune(model, X, latency=budget(0.4, Lucky()))
    assert Machine().of(model, X) / dense <= 0.4
    assert result.plan.notes["latency"]["measured"] <= 0.4


def test_what_cannot_be_met_is_refused_with_what_can():
    model, machine = net(), Machine(elementwise=1e-6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(SelectionError) as caught:
        prune(model, X, latency=budget(0.01, machine), selection=Selection(min_keep=32))
    text = str(caught.value)
    assert text.startswith("latency=0.01 can't be met: the smallest measured share within reach is 0.")
    smallest = net((32, 32, 32))
    assert float(text.split("reach is ")[1].split(" ")[0]) == pytest.approx(
        machine.of(smallest, X) / machine.of(net(), X), rel=0.02
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_whole_time_cuts_nothing():
    result = prune(net(), X, latency=budget(1.0, Machine()))
    assert not result.plan.changes
    assert result.plan.notes["achieved"]["latency"] == 1.0


def test_ignored_groups_stay():
    result = prune(net(), X, latency=budget(0.6, Machine()), ignore=["3"])
    assert "3" not in result.plan.widths
    assert result.plan.notes["ignored"] == ["3"]


class Stubborn(nn.Module):
    """A size is written into code where nobody can rewrite it."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        self.three, self.free = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 5, 1)

    def forward(self, x):
        x = self.one(x)
        x = x.reshape(len(x), 8 * 8, *x.shape[2:]).relu()
        return self.free(self.three(self.two(x).relu()).relu())


def test_groups_whose_trial_cut_fails_are_left_whole():
    torch.manual_seed(0)
    model, machine = Stubborn(), Machine()
    dense = machine.of(copy.deepcopy(model), X)
    result = prune(model, X, latency=budget(0.5, machine))
    assert list(result.frozen) == ["one"]
    assert machine.of(model, X) / dense <= 0.5
    assert model.one.out_channels == 64
    with pytest.raises(VerificationError, match=r"^cutting one would be wrong"):
        prune(Stubborn(), X, latency=budget(0.5, machine), strict=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latency": 0.5, "keep": 0.5}, "keep= can't be combined with latency=: give one or the other"),
        ({"latency": 0.5, "macs": 0.5}, "macs= can't be combined with latency="),
        ({"latency": 0}, "latency=0 is no share: it must lie above 0 and be at most 1"),
        ({"latency": 1.5}, "latency=1.5 is no share"),
        ({"latency": 0.5, "round_to": 0}, "round_to=0"),
        ({"latency": 0.5, "selection": Selection("global")}, "scope= has no effect with latency="),
        ({"latency": 0.5, "ignore": ["nothing"]}, "ignore: 'nothing' matches no layer"),
    ],
)
def test_refusals(options, message, monkeypatch, tmp_path):
    monkeypatch.setenv("FILTERFOLD_CACHE", str(tmp_path))
    with pytest.raises(SelectionError) as caught:
        prune(net((8,)), X, **options)
    assert message in str(caught.value)


def test_budgets_that_make_no_sense():
    for options in ({"batch_size": 0}, {"repeats": 0}, {"rounds": 0}):
        with pytest.raises(SelectionError, match="must be at least 1"):
            LatencyBudget(0.5, **options)


def test_a_network_where_nothing_can_be_cut_is_refused():
    with pytest.raises(SelectionError, match="nothing would be cut"):
        prune(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), X, latency=budget(0.5, Machine()))


def rooms_of(model, scores):
    groups = [group for group in trace(model, X) if group.frozen is None]
    return groups, [hardware_friendly(rank(group, scores, 1, 1), 16) for group in groups]


def test_the_way_down_never_widens_and_ends_at_the_smallest():
    model, machine = net(), Machine(elementwise=1e-9)
    groups = [group for group in trace(model, X) if group.frozen is None]
    scores = {group.name: torch.rand(group.size) + 0.1 for group in groups}
    _, rooms = rooms_of(model, scores)
    times = LayerTimes(torch.device("cpu"), torch.float32, 1, timer=machine, folder=False)
    forecast = LayerTimeModel(rooms, layer_calls(model, X), times, machine.of(model, X))
    stations = list(descend([score_curve(room) for room in rooms], forecast))
    assert stations[0] == (64, 64, 128)
    assert stations[-1] == tuple(room.allowed[0] for room in rooms)
    for before, after in itertools.pairwise(stations):
        assert sum(a < b for a, b in zip(after, before, strict=True)) == 1
        assert all(a <= b for a, b in zip(after, before, strict=True))
    for counts in stations[:: len(stations) // 4]:  # saved() is the difference of seconds()
        smaller = (rooms[0].allowed[0], *counts[1:])
        saved = forecast.saved(counts, 0, rooms[0].allowed[0])
        assert saved == pytest.approx(forecast.seconds(counts) - forecast.seconds(smaller))


@pytest.mark.parametrize("widths", [(64, 64, 128), (16, 32, 64), (48, 16, 96), (64, 32, 32)])
def test_forecasts_agree_with_a_machine_that_adds_up(widths):
    model, machine = net(), Machine(block=1)
    groups = [group for group in trace(model, X) if group.frozen is None]
    _, rooms = rooms_of(model, {group.name: torch.rand(group.size) for group in groups})
    times = LayerTimes(torch.device("cpu"), torch.float32, 1, timer=machine, folder=False)
    forecast = LayerTimeModel(rooms, layer_calls(model, X), times, machine.of(model, X))
    assert forecast.seconds(widths) == pytest.approx(machine.of(net(widths), X), rel=1e-6)


def test_selecting_alone_with_a_cut_of_ones_own():
    model, machine, cut = net(), Machine(), []
    groups = trace(model, X)
    scores = {group.name: torch.rand(group.size) for group in groups}

    def cutter(plan: Plan) -> nn.Module:
        cut.append(plan)
        return net([new for _, new in plan.widths.values()])

    options = {"model": model, "example_inputs": X, "cut": cutter, "cost": measure(model, X)}
    plan = select_for_latency(groups, scores, latency=budget(0.5, machine), **options)
    assert plan.widths in [tried.widths for tried in cut]
    assert len(cut) >= len(plan.notes["latency"]["tries"])
    assert plan.notes["frozen"].keys() == {group.name for group in groups if group.frozen}
