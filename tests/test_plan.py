"""Plans are checked when made, print as a table, and survive JSON."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import filterfold as ff
from filterfold.errors import PlanError
from filterfold.graph import rewrite_stale_sizes
from filterfold.plan import AttributeChange, Cut, Plan, Slice, keep_units
from filterfold.utils.runs import Runs, encode


@given(st.lists(st.integers(-1, 40), max_size=60))
def test_label_vectors_survive_their_encoding(values):
    runs = encode(values)
    assert list(Runs().decoded(json.loads(json.dumps(runs)))) == values
    assert len(runs) <= max(1, len(values))


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1))))
def test_keep_units_keeps_the_order(case):
    size, kept = case
    assignment = keep_units(size, kept)
    assert [unit for unit in range(size) if assignment[unit] >= 0] == sorted(kept)
    assert [index for index in assignment if index >= 0] == list(range(len(kept)))
    cut = Cut("g", assignment, (), ())
    assert (cut.size, cut.new_size, cut.folds) == (size, len(kept), False)
    assert cut.changes is (len(kept) < size)


def example() -> Plan:
    part = Slice("conv.weight", 0, (0, 1, 2, 3), "filter")
    own = Slice("norm.weight", 0, (0, 1, 2, 3), "norm", (1.0, 0.5, 0.5, 0.25))
    read = Slice("head.weight", 1, (0, 0, 1, 1, 2, 2, 3, 3, -1), "kernel")
    weights = {"blend": (1.0, 0.5, 0.5, 0.1), "gain": (1.0, 2.0, -1.0, 1 / 3)}
    cuts = (Cut("conv", (0, 1, 1, -1), (part, own), (read,), **weights), Cut("other", (0, 1), (), ()))
    changes = (AttributeChange("", "width", 4, 2), AttributeChange("a.b", "sizes", (4, (1, 2)), (2, (1, 2))))
    return Plan(cuts, changes, {"criterion": "l1", "asked": {"keep": 0.5}})


def test_json_gives_back_an_equal_plan():
    plan = example()
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json(indent=2)) == plan


def test_a_plan_prints_as_a_table():
    assert str(example()).splitlines() == [
        "group  units  dropped  folded",
        "conv   4->2   1        1",
        "other  2->2   0        0",
    ]
    assert example().widths == {"conv": (4, 2), "other": (2, 2)}
    assert example().changes
    assert not Plan((Cut("g", (0, 1), (), ()),)).changes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cut("g", (-1, -1), (), ()), "group 'g': the plan leaves no unit; keep at least one"),
        (lambda: Cut("g", (0, 2), (), ()), "is no map onto 0..2: index 1 is never used"),
        (lambda: Cut("g", (0, -2), (), ()), "an index is below -1"),
        (lambda: Cut("g", (0, 1), (), (), gain=(1.0,)), "gain has 1 entries for 2 units"),
        (lambda: Cut("g", (0, 1), (), (), blend=(1.0,) * 3), "blend has 3 entries for 2 units"),
        (lambda: Cut("g", (0, 1), (Slice("w", 0, (0, 2), "filter"),), ()), "w names unit 2 of only 2"),
        (lambda: Cut("g", (0, 1), (Slice("w", 0, (0, 1), "norm", (1.0,)),), ()), "w has 1 weights for 2 units"),
    ],
)
def test_malformed_cuts_are_refused(make, message):
    with pytest.raises(PlanError) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", '{"format": 2}', '{"format": 1, "cuts": [{}], "attributes": [], "notes": {}}'],
)
def test_what_is_no_plan_is_refused_in_one_line(text):
    with pytest.raises(PlanError) as caught:
        Plan.from_json(text)
    assert "\n" not in str(caught.value)


def test_another_format_is_named():
    with pytest.raises(PlanError, match="plan format 7 is not 1"):
        Plan.from_json(example().to_json().replace('"format": 1', '"format": 7'))


def test_a_plan_can_be_hashed_and_its_notes_not_changed():
    assert len({example(), example(), Plan(example().cuts)}) == 2
    listed = Plan((), (AttributeChange("", "sizes", [4, [1, 2]], [2, [1, 2]]),))
    assert Plan.from_json(listed.to_json()) == listed
    assert hash(Plan.from_json(listed.to_json())) == hash(listed)
    asked = {"keep": 0.5}
    plan = Plan((), notes=asked)
    asked["keep"] = 0.75
    assert plan.notes == {"keep": 0.5}
    with pytest.raises(TypeError):
        plan.notes["keep"] = 0.25


def results() -> list[Any]:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    x = torch.zeros(1, 3, 8, 8)
    traced = ff.trace(net, x)
    result = ff.prune(net, x, keep=0.5)
    return [traced, result, result.plan, result.plan.cuts[0], traced[0], result.before, result.verified, example()]


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_what_prune_and_trace_give_can_be_copied_and_pickled(again):
    for value in results():
        other = again(value)
        assert type(other) is type(value)
        assert other == value
        assert str(other) == str(value)
    traced = results()[0]
    other = again(traced)
    assert other.by_name == traced.by_name
    assert other.unmet == traced.unmet
    assert [step.op for step in other.sizes.steps] == [step.op for step in traced.sizes.steps]


def test_a_copied_trace_still_predicts_sizes():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width, self.first, self.last = 6, nn.Conv2d(3, 6, 3), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).mean((2, 3)).view(-1, self.width))

    net, x = Net(), torch.randn(2, 3, 5, 5)
    traced = pickle.loads(pickle.dumps(ff.trace(net, x)))
    plan = Plan((Cut("first", keep_units(6, (0, 2)), traced[0].producers, traced[0].consumers),))
    ff.apply(plan, net)
    assert [(c.attribute, c.old, c.new) for c in rewrite_stale_sizes(net, plan, traced, x)] == [("width", 6, 2)]
