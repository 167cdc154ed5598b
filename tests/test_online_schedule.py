"""Schedules and target widths as tables."""

from __future__ import annotations

import pytest

from filterfold.errors import ConfigError
from filterfold.online import Schedule, Target


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


def test_due() -> None:
    schedule = Schedule((), ((2, 0.5), (4, 1.0)))
    assert [schedule.due(epoch, 0) for epoch in (1, 2, 3, 4)] == [None, 0.5, 0.5, 1.0]
    assert [schedule.due(epoch, 1) for epoch in (2, 3, 4, 9)] == [None, None, 1.0, 1.0]
    assert schedule.due(9, 2) is None
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
        (Target(clusters=40, round_to=16), 64, 1.0, 48),
        (Target(clusters=60, round_to=16), 64, 1.0, 64),
        (Target(keep=0.5, round_to=16), 12, 1.0, 12),
        (Target(clusters={"conv*": 3, "*": 5}), 9, 1.0, 3),
        (Target(clusters={"other": 3}), 9, 1.0, 9),
    ],
)
def test_widths(target: Target, full: int, share: float, width: int) -> None:
    assert target.width("conv1", full, share) == width
