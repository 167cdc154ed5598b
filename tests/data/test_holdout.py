"""Held-out and limited splits: exact counts, balance, and independence of everything but the seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from filterfold.data.splits import hold_out, limit
from filterfold.errors import DataError


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=6), st.floats(0, 0.5), st.integers(0, 5))
def test_hold_out_is_exact_and_proportional(sizes: list[int], share: float, seed: int) -> None:
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    count = round(len(labels) * share)
    kept, held = hold_out(labels, count, len(sizes), seed)
    assert len(held) == count
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(len(labels)))
    taken = torch.bincount(labels[held], minlength=len(sizes)).tolist()
    for part, size in zip(taken, sizes, strict=True):
        assert abs(part - size * count / len(labels)) < 1
    assert torch.equal(held, hold_out(labels, count, len(sizes), seed)[1])


def test_another_seed_holds_out_other_images() -> None:
    labels = torch.arange(1000) % 10
    assert not torch.equal(hold_out(labels, 0.1, 10, 0)[1], hold_out(labels, 0.1, 10, 1)[1])


def test_limits_are_balanced_and_nested() -> None:
    labels = torch.cat([torch.zeros(100), torch.ones(5), torch.full((50,), 2)]).long()
    small, large = limit(labels, 12, 3, seed=0), limit(labels, 60, 3, seed=0)
    assert torch.bincount(labels[small]).tolist() == [4, 4, 4]
    counts = torch.bincount(labels[large]).tolist()
    assert sum(counts) == 60
    assert counts[1] == 5
    assert abs(counts[0] - counts[2]) <= 1
    assert set(small.tolist()) <= set(large.tolist())
    assert len(limit(labels, 1000, 3, seed=0)) == 155


@pytest.mark.parametrize("amount", [-1, 1.0, 1.5, 20, 18])
def test_impossible_amounts_are_refused(amount: float) -> None:
    labels = torch.arange(20) % 4
    with pytest.raises(DataError, match="hold"):
        hold_out(labels, amount, 4, 0)


def test_a_limit_below_one_a_class_is_refused() -> None:
    with pytest.raises(DataError, match="train_limit=3"):
        limit(torch.arange(20) % 4, 3, 4, 0)
