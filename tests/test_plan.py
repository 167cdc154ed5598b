"""Plans are checked when made, print as a table, and survive JSON."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filterfold.errors import PlanError
from filterfold.plan import AttributeChange, Cut, Plan, Slice, _decode, _encode, keep_units


@given(st.lists(st.integers(-1, 40), max_size=60))
def test_label_vectors_survive_their_encoding(values):
    runs = _encode(values)
    assert list(_decode(json.loads(json.dumps(runs)))) == values
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
