"""Schedules and target widths as tables."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from filterfold.errors import ConfigError
from filterfold.online import OnlineFilterClustering, Schedule, Target
from filterfold.online.schedule import Plateau
from filterfold.online.widths import TargetWidths
from filterfold.plan import ChannelGroup, Slice
from filterfold.profiling.macs import Cost
from filterfold.surgery.layer_attributes import restore, snapshot


@pytest.mark.parametrize(
    ("schedule", "milestones"),
    [
        (Schedule.document(100), ((50, 1 / 3), (60, 2 / 3), (70, 1.0))),
        (Schedule.document(3), ((2, 1.0),)),
        (Schedule.document(1), ((1, 1.0),)),
        (Schedule.gradual(100), ((20, 0.4), (35, 0.8), (50, 1.0))),
        (Schedule.gradual(10), ((2, 0.4), (4, 0.8), (5, 1.0))),
        (Schedule.gradual(3), ((1, 0.8), (2, 1.0))),
        (Schedule.every(2, 1, 9, milestones=(10, 20)), ((10, 0.5), (20, 1.0))),
    ],
)
def test_milestones(schedule: Schedule, milestones) -> None:
    assert [at for at, _ in schedule.milestones] == [at for at, _ in milestones]
    assert [share for _, share in schedule.milestones] == pytest.approx([share for _, share in milestones])
    assert Schedule.from_dict(schedule.to_dict()) == schedule


def test_updates() -> None:
    assert Schedule.gradual(10).updates == (1, 2, 3, 4, 5)
    assert Schedule.every(2, 1, 9, milestones=(10,)).updates == (1, 3, 5, 7, 9)


def test_milestones_that_are_behind() -> None:
    schedule = Schedule((), ((2, 0.5), (4, 1.0)))
    assert [schedule.passed(epoch, 0) for epoch in (1, 2, 3, 4)] == [0, 1, 1, 2]
    assert [schedule.passed(epoch, 1) for epoch in (1, 2, 3, 4, 9)] == [1, 1, 1, 2, 2]
    assert [schedule.next_share(passed) for passed in (0, 1, 2)] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("updates", "milestones", "message"),
    [
        ((), ((3, 0.5), (2, 1.0)), "must rise"),
        ((), ((2, 1.0), (3, 0.5)), "must rise"),
        ((), ((2, 0.5),), "the last is 1"),
        ((), ((2, 0.0), (3, 1.0)), r"\(0, 1\]"),
        ((-1,), (), "counted from 1"),
    ],
)
def test_bad_schedules(updates, milestones, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule(updates, milestones)


@pytest.mark.parametrize("make", [Schedule.document, Schedule.gradual])
def test_no_epochs(make) -> None:
    with pytest.raises(ConfigError, match="0 epochs"):
        make(0)


@pytest.mark.parametrize(
    ("target", "full", "share", "width"),
    [
        (Target(keep=0.5), 64, 1.0, 32),
        (Target(keep=0.5), 64, 0.4, 51),
        (Target(keep=0.3), 10, 1.0, 3),  # 0.3 * 10 is 3.0000000000000004 the other way round
        (Target(keep=0.01), 10, 1.0, 1),
        (Target(keep=1.0), 10, 1.0, 10),
        (Target(clusters=10), 64, 1.0, 10),
        (Target(clusters=10), 64, 0.5, 37),
        (Target(clusters=10), 8, 1.0, 8),
        (Target(clusters=10, round_to=16), 64, 1.0, 16),
        (Target(clusters=40, round_to=16), 64, 1.0, 32),  # the smaller of two equally near
        (Target(clusters=41, round_to=16), 64, 1.0, 48),
        (Target(keep=0.9, round_to=8), 20, 1.0, 16),
        (Target(keep=0.95, round_to=8), 20, 1.0, 20),  # the whole width is nearest
        (Target(keep=0.1, min_keep=4), 10, 1.0, 4),
        (Target(keep={"*": 0.5, "conv1": 0.25}), 8, 1.0, 2),
        (Target(clusters=60, round_to=16), 64, 1.0, 64),
        (Target(keep=0.5, round_to=16), 12, 1.0, 12),
        (Target(keep=0.3), 512, 1.0, 160),
        (Target(keep=0.3), 512, 0.5, 336),  # 332.8
        (Target(keep=0.3), 128, 1.0, 32),  # 38.4
        (Target(keep=0.3), 127, 1.0, 38),
        (Target(keep=0.01), 128, 1.0, 16),
        (Target(keep=0.3, round_to=1), 512, 1.0, 153),
        (Target(clusters=10), 512, 1.0, 10),
        (Target(clusters=10), 512, 0.5, 261),
        (Target(clusters={"*": 5, "conv*": 3}), 9, 1.0, 3),
        (Target(clusters={"conv*": 3, "*": 5}), 9, 1.0, 5),  # the last pattern counts
        (Target(clusters={"other": 3}), 9, 1.0, 9),
    ],
)
def test_widths(target: Target, full: int, share: float, width: int) -> None:
    groups = [hand_made("conv1", full), hand_made("other", full)]
    assert TargetWidths(target, groups, Cost(1, 1, 1, ())).width(groups[0], share) == width


def hand_made(name: str, size: int) -> ChannelGroup:
    makes = Slice(f"{name}.weight", 0, tuple(range(size)), "filter")
    return ChannelGroup(name, size, (makes,), (), True, None, (0,) * size, (0,) * size)


def test_a_plateau_is_so_many_epochs_without_a_lower_loss() -> None:
    plateau = Plateau(3, 0.1)
    assert [plateau.reached(loss) for loss in (1.0, 0.95, 0.91, 0.89, 0.85, 0.81, 0.805)] == [False] * 6 + [True]
    plateau.reset()
    assert [plateau.reached(loss) for loss in (5.0, math.nan, 4.9, math.nan)] == [False] * 3 + [True]
    again = Plateau(3, 0.1)
    again.reached(2.0)
    again.reached(2.0)
    other = Plateau(3, 0.1)
    other.load_state_dict(again.state_dict())
    assert [other.reached(2.0), other.reached(2.0)] == [False, True]


def levelling(schedule: Schedule, losses: list[float], restart: int | None = None) -> list[tuple[int, int]]:
    """(epoch, width after it) of every cut."""

    def fresh() -> tuple[nn.Sequential, OnlineFilterClustering]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 2, 1))
        return net, OnlineFilterClustering(net, torch.zeros(1, 1, 4, 4), keep=0.5, schedule=schedule)

    net, online = fresh()
    cuts = []
    for epoch, loss in enumerate(losses, 1):
        before = net[0].out_channels
        online.step(epoch, loss)
        if net[0].out_channels < before:
            cuts.append((epoch, net[0].out_channels))
        if epoch == restart:
            kept, structure, weights = online.state_dict(), snapshot(net), net.state_dict()
            net, online = fresh()
            restore(net, structure)
            net.load_state_dict(weights)
            online.load_state_dict(kept)
    return cuts


@pytest.mark.parametrize("restart", [None, 1, 3, 4, 6])
def test_milestones_are_taken_once_the_loss_levels_off(restart: int | None) -> None:
    schedule = Schedule(updates=(1, 2, 5), milestones=((20, 0.5), (30, 1.0)), patience=2)
    losses = [1.0, 0.5, 0.5, 0.5, 2.0, 1.5, 1.5, 1.5, 1.5]  # the cut after epoch 4 makes it rise
    assert levelling(schedule, losses, restart) == [(4, 9), (8, 6)]


def test_the_milestone_is_the_latest() -> None:
    schedule = Schedule(milestones=((3, 0.5), (5, 1.0)), patience=2)
    assert levelling(schedule, [1.0, 0.8, 0.6, 0.5, 0.4, 0.3]) == [(3, 9), (5, 6)]
    assert levelling(schedule, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]) == [(3, 9), (5, 6)]


def test_a_plateau_needs_a_metric() -> None:
    net = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 2, 1))
    schedule = Schedule.plateau(10)
    online = OnlineFilterClustering(net, torch.zeros(1, 1, 4, 4), keep=0.5, schedule=schedule)
    with pytest.raises(ConfigError, match=r"call step\(epoch, metric=loss\)"):
        online.step(1)
    assert schedule.milestones == Schedule.document(10).milestones


@pytest.mark.parametrize(
    ("options", "message"), [({"patience": 0}, "patience of 0 epochs"), ({"change": 1.0}, r"in \[0, 1\)")]
)
def test_bad_plateaus(options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule(milestones=((2, 1.0),), **options)


def test_plateau_schedules_are_written_down() -> None:
    schedule = Schedule.plateau(10, patience=4, change=0.1)
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    assert Schedule.of("plateau", 10) == Schedule.plateau(10)


def test_names_of_schedules_by_steps() -> None:
    assert Schedule.of("0.1,0.2,0.4", 10, 1000).milestones == ((100, 1 / 3), (200, 2 / 3), (400, 1.0))
    small = Schedule.of("small-cuts", 10, 1000)
    assert [place for place, _ in small.milestones] == list(range(25, 501, 25))
    assert small.milestones[9][1] == pytest.approx(1 - 0.5**3)
    assert small.unit == Schedule.of("0.1", 10, 1000).unit == "step"
    for name in ("small-cuts", "0.1,0.2"):
        with pytest.raises(ConfigError, match=f"{name}.* not known"):
            Schedule.of(name, 10)
    for name, message in (("0.2,0.1", "must rise"), ("0.5,1", r"in \[0, 1\)"), ("0.5;0.7", "or a Schedule")):
        with pytest.raises(ConfigError, match=message):
            Schedule.of(name, 10, 1000)


def test_schedules_by_steps_lie_at_the_same_fractions() -> None:
    schedule = Schedule.gradual(steps=1000)
    assert schedule.milestones == ((200, 0.4), (350, 0.8), (500, 1.0))
    assert schedule.updates == tuple(range(10, 501, 10))
    assert schedule.unit == "step"
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    assert Schedule.at_fractions([(0.5, 1.0)], epochs=10) == Schedule((1, 2, 3, 4, 5), ((5, 1.0),))


@pytest.mark.parametrize("power", [1.0, 3.0])
def test_small_cuts_follow_the_cubic_and_leave_time_to_recover(power: float) -> None:
    schedule = Schedule.small_cuts(steps=1000, every=50, start=0.1, end=0.6, power=power)
    places, shares = zip(*schedule.milestones, strict=True)
    assert places == tuple(range(150, 601, 50))
    assert shares == pytest.approx([1 - (1 - (place - 100) / 500) ** power for place in places])
    assert shares[-1] == 1
    assert schedule.updates == (100, *places)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule.gradual(), "how long training is"),
        (lambda: Schedule.gradual(10, steps=10), "how long training is"),
        (lambda: Schedule.gradual(steps=True), "steps=True must be int"),
        (lambda: Schedule.gradual(steps=100, every=0), "every=0"),
        (lambda: Schedule.at_fractions([(1.5, 1.0)], steps=10), "fractions of training"),
        (lambda: Schedule.small_cuts(steps=100, every=60), "no cut every 60 steps"),
        (lambda: Schedule.small_cuts(steps=100, start=0.6), "no cut every 1 steps"),
        (lambda: Schedule(milestones=((1, math.nan),)), "milestones="),
        (lambda: Schedule(unit="batch"), "unit='batch'"),
    ],
)
def test_bad_lengths(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_without_a_schedule_there_is_no_step() -> None:
    net = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 2, 1))
    online = OnlineFilterClustering(net, torch.zeros(1, 1, 4, 4), keep=0.5)
    with pytest.raises(ConfigError, match="needs a schedule"):
        online.step(1)
    assert not online.finished


@pytest.mark.parametrize("restart", [None, 3, 4, 17, 20])
def test_small_cuts_by_optimizer_step_with_a_restart(restart: int | None) -> None:
    schedule = Schedule.small_cuts(steps=40, every=4, end=0.5, power=1)
    found = levelling(schedule, [0.0] * 40, restart)
    assert found == [(4, 10), (8, 9), (12, 8), (16, 7), (20, 6)]
