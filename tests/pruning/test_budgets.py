"""Selections against exhaustive enumeration and exact rational arithmetic."""

from __future__ import annotations

import csv
import itertools
from fractions import Fraction

import pytest
import torch
from torch import nn

from filterfold import zoo
from filterfold.errors import SelectionError
from filterfold.graph import trace
from filterfold.online.folding.fold import from_clusters
from filterfold.plan import ChannelGroup, Plan, Slice
from filterfold.profiling.macs import measure
from filterfold.pruning.budgets import predict, select, select_greedily
from filterfold.pruning.budgets.ranking import count
from filterfold.pruning.criteria import score


def group(name="conv", size=4, *, classes=None, blocks=None, frozen=None, consumers=()):
    parts = (Slice(f"{name}.weight", 0, tuple(range(size)), "filter"),)
    blank = (0,) * size
    return ChannelGroup(name, size, parts, tuple(consumers), True, frozen, classes or blank, blocks or blank)


def kept(plan, index=0):
    return [unit for unit, new in enumerate(plan.cuts[index].assignment) if new >= 0]


# --- counts ---------------------------------------------------------------------------------------


SHARES = [share for tenths in range(1, 10) for share in (1 - tenths / 10, (10 - tenths) / 10)]


def exact(size, share):
    """`int(size * share)` of the decimal that was meant, in rational arithmetic."""
    return int(size * Fraction(round(10 * share), 10))


def test_counts_are_free_of_float_noise():
    pairs = [(size, share) for size in range(1, 513) for share in SHARES]
    assert any(int(size * share) != exact(size, share) for size, share in pairs)  # the noise is real
    assert [pair for pair in pairs if count(*pair) != exact(*pair)] == []


def test_a_group_keeps_that_count():
    groups = [group(str(size), size) for size in range(2, 65)]
    scores = _scores(**{one.name: one.size for one in groups})
    for share in SHARES:
        widths = select(groups, scores, keep=share).widths
        assert widths == {one.name: (one.size, max(1, exact(one.size, share))) for one in groups}


def test_ties_keep_exact_counts_and_lower_indices():
    plan = select([group(size=8)], {"conv": torch.ones(8)}, keep=0.75)
    assert kept(plan) == [0, 1, 2, 3, 4, 5]
    plan = select([group(size=6)], {"conv": torch.tensor([1.0, 2, 2, 2, 0, 2])}, keep=0.5)
    assert kept(plan) == [1, 2, 3]


@pytest.mark.parametrize(
    ("size", "keep", "round_to", "count"),
    [
        (64, 0.5, 8, 32),
        (64, 0.55, 8, 32),  # 35 is nearer to 32 than to 40
        (64, 0.6, 8, 40),  # 38
        (64, 0.5625, 8, 32),  # 36: the smaller of two
        (64, 0.02, 8, 8),  # not below one multiple
        (20, 0.9, 8, 16),  # 18 is nearer to 16 ... and 20 is as near: the smaller
        (20, 0.95, 8, 20),  # 19: the whole width is nearest
    ],
)
def test_rounding_is_to_the_nearest_multiple(size, keep, round_to, count):
    groups, shares = [group("a", size), group("b", 64)], {"a": keep, "b": 0.5}
    plan = select(groups, _scores(a=size, b=64), keep=shares, round_to=round_to)
    assert plan.cuts[0].new_size == count
    asked = int(round(size * keep, 9))
    assert plan.notes.get("adjusted", {}).get("a", [asked, asked]) == [asked, count]


def _scores(**sizes):
    return {name: torch.arange(size, dtype=torch.float32) for name, size in sizes.items()}


def test_narrow_layers_stay_whole_under_rounding_and_are_noted():
    plan = select([group("a", 6), group("b", 16)], _scores(a=6, b=16), keep=0.5, round_to=8)
    assert plan.widths == {"a": (6, 6), "b": (16, 8)}
    assert plan.notes["adjusted"] == {"a": [3, 6]}


def test_min_keep():
    plan = select([group("a", 6), group("b", 2)], _scores(a=6, b=2), keep=0.2, min_keep=3)
    assert plan.widths == {"a": (6, 3), "b": (2, 2)}


# --- classes and blocks ---------------------------------------------------------------------------


def test_every_class_keeps_its_share():
    classes = (0,) * 6 + (1,) * 3
    scores = {"conv": torch.tensor([9.0, 8, 7, 6, 5, 4, 1, 3, 2])}
    plan = select([group(size=9, classes=classes)], scores, keep=2 / 3)
    assert kept(plan) == [0, 1, 2, 3, 7, 8]


def test_a_tiny_share_leaves_one_of_every_class():
    plan = select([group(size=6, classes=(0, 0, 0, 0, 1, 2))], _scores(conv=6), keep=0.01)
    assert kept(plan) == [3, 4, 5]
    assert plan.notes["adjusted"] == {"conv": [0, 3]}


def test_classes_never_shrink_when_more_is_kept():
    one = group(size=12, classes=(0,) * 7 + (1,) * 4 + (2,))
    sets = [set(kept(select([one], _scores(conv=12), keep=n / 12))) for n in range(3, 13)]
    assert [len(units) for units in sets] == list(range(3, 13))
    assert all(small < large for small, large in itertools.pairwise(sets))


def test_classes_are_rounded_each():
    one = group(size=48, classes=(0,) * 32 + (1,) * 16)
    chosen = kept(select([one], _scores(conv=48), keep=0.5, round_to=8))
    assert len([unit for unit in chosen if unit < 32]) == 16
    assert len(chosen) == 24


def test_blocks_keep_equal_numbers():
    one = group(size=8, blocks=(0, 0, 0, 0, 1, 1, 1, 1))
    scores = {"conv": torch.tensor([9.0, 8, 7, 6, 1, 2, 3, 4])}
    assert kept(select([one], scores, keep=0.5)) == [0, 1, 6, 7]
    assert kept(select([one], scores, keep=0.65)) == [0, 1, 6, 7]  # 5 units: 4 is the smaller of two
    assert select([one], scores, keep=0.9, round_to=3).widths == {"conv": (8, 6)}  # a multiple of 2 and 3


def test_unequal_blocks_are_refused():
    with pytest.raises(SelectionError, match="blocks differ in size"):
        select([group(size=3, blocks=(0, 0, 1))], _scores(conv=3), keep=0.5)


# --- which layers ---------------------------------------------------------------------------------


def test_patterns_frozen_and_ignored():
    groups = [group("stem"), group("layer1.0"), group("layer1.1"), group("layer2.0"), group("out", frozen="an output")]
    scores = _scores(**{one.name: 4 for one in groups})
    plan = select(groups, scores, keep={"layer*": 0.5, "layer1.1": 0.75}, ignore=["layer2"])
    assert plan.widths == {"stem": (4, 4), "layer1.0": (4, 2), "layer1.1": (4, 3)}
    assert plan.notes["frozen"] == {"out": "an output"}
    assert plan.notes["ignored"] == ["layer2.0"]
    assert plan.notes["asked"] == {"keep": {"layer*": 0.5, "layer1.1": 0.75}}
    assert plan.notes["achieved"] == {"units": 9 / 12}
    assert Plan.from_json(plan.to_json()) == plan


def test_a_coupled_layer_is_found_by_any_of_its_names():
    parts = (Slice("a.weight", 0, (0, 1), "filter"), Slice("b.weight", 0, (0, 1), "filter"))
    groups = [ChannelGroup("a", 2, parts, (), True, None, (0, 0), (0, 0)), group("c")]
    assert select(groups, _scores(a=2, c=4), keep=0.5, ignore=["b"]).widths == {"c": (4, 2)}


# --- global ---------------------------------------------------------------------------------------


def test_global_ranking_against_sorting():
    generator = torch.Generator().manual_seed(0)
    groups = [group(name, size) for name, size in (("a", 5), ("b", 7), ("c", 3))]
    scores = {one.name: torch.rand(one.size, generator=generator) for one in groups}
    for units in range(3, 16):
        plan = select(groups, scores, keep=units / 15, scope="global", normalize="none")
        flat = {(name, unit): float(value) for name, values in scores.items() for unit, value in enumerate(values)}
        best = {name: max(range(len(values)), key=lambda u, v=values: float(v[u])) for name, values in scores.items()}
        chosen = set(best.items())
        chosen |= set(sorted(flat.keys() - chosen, key=lambda key: -flat[key])[: units - 3])
        assert {(cut.group, u) for i, cut in enumerate(plan.cuts) for u in kept(plan, i)} == chosen


def test_normalisation_makes_layers_comparable():
    groups = [group("a"), group("b")]
    scores = {"a": torch.tensor([1.0, 2, 3, 4]), "b": torch.tensor([100.0, 200, 300, 400])}
    assert select(groups, scores, keep=0.5, scope="global").widths == {"a": (4, 2), "b": (4, 2)}
    assert select(groups, scores, keep=0.5, scope="global", normalize="none").widths == {"a": (4, 1), "b": (4, 3)}


def test_negative_scores_keep_their_order_globally():
    groups = [group("a"), group("b")]
    scores = {"a": -torch.tensor([1.0, 2, 3, 4]), "b": -torch.tensor([10.0, 20, 30, 40])}
    plan = select(groups, scores, keep=0.5, scope="global")
    assert [kept(plan, 0), kept(plan, 1)] == [[0, 1], [0, 1]]


# --- budgets --------------------------------------------------------------------------------------


def tiny(widths=(4, 5)):
    """Three convolutions in a row, with the groups written down by hand."""
    a, b = widths
    net = nn.Sequential(
        nn.Conv2d(3, a, 3, padding=1), nn.BatchNorm2d(a), nn.Conv2d(a, b, 3), nn.Flatten(), nn.Linear(4 * b, 10)
    )
    first, second = tuple(range(a)), tuple(range(b))
    spread = tuple(unit for unit in second for _ in range(4))
    ride = [Slice("0.bias", 0, first, "bias")]
    ride += [Slice(f"1.{name}", 0, first, "norm") for name in ("weight", "bias", "running_mean", "running_var")]
    groups = (
        ChannelGroup(
            "0", a, (Slice("0.weight", 0, first, "filter"), *ride), (Slice("2.weight", 1, first, "kernel"),),
            True, None, (0,) * a, (0,) * a,
        ),
        ChannelGroup(
            "2", b, (Slice("2.weight", 0, second, "filter"), Slice("2.bias", 0, second, "bias")),
            (Slice("4.weight", 1, spread, "kernel"),), True, None, (0,) * b, (0,) * b,
        ),
    )  # fmt: skip
    return net, groups


EXAMPLE = torch.zeros(1, 3, 4, 4)


def by_hand(a, b):
    """MACs and parameters of `tiny` with widths a and b."""
    macs = a * 3 * 9 * 16 + b * a * 9 * 4 + 10 * 4 * b
    return macs, (a * 27 + a) + 2 * a + (b * a * 9 + b) + (10 * 4 * b + 10)


def test_prediction_equals_the_measured_small_network():
    net, groups = tiny()
    cost = measure(net, EXAMPLE)
    assert (cost.macs, cost.parameters) == by_hand(4, 5)
    for a, b in itertools.product(range(1, 5), range(1, 6)):
        plan = select(groups, _scores(**{"0": 4, "2": 5}), keep={"0": a / 4, "2": b / 5}, cost=cost)
        small = measure(tiny((a, b))[0], EXAMPLE)
        assert predict(plan, cost) == small
        assert (small.macs, small.parameters) == by_hand(a, b)


def test_prediction_of_folds():
    net, groups = tiny()
    plan = from_clusters(groups, {"0": [0, 1, 0, 1], "2": [3, 3, -1, 3, 4]})
    assert predict(plan, measure(net, EXAMPLE)) == measure(tiny((2, 2))[0], EXAMPLE)


@pytest.mark.parametrize("kind", ["macs", "parameters"])
@pytest.mark.parametrize("share", [0.15, 0.3, 0.4, 0.5, 0.61, 0.8, 0.95])
def test_uniform_budgets_against_enumeration(kind, share):
    net, groups = tiny((12, 16))
    cost, at = measure(net, EXAMPLE), ("macs", "parameters").index(kind)
    total = by_hand(12, 16)[at]
    plan = select(groups, _scores(**{"0": 12, "2": 16}), cost=cost, **{kind: share})
    a, b = (cut.new_size for cut in plan.cuts)
    assert by_hand(a, b)[at] <= share * total
    assert plan.notes["achieved"][kind] == by_hand(a, b)[at] / total
    # no common ratio fits better, and no layer can take another unit than the ratio gave it
    ratios = {Fraction(n, size) for size in (12, 16) for n in range(1, size + 1)}
    uniform = [(max(1, int(12 * r)), max(1, int(16 * r))) for r in ratios]
    best = max(by_hand(*widths)[at] for widths in uniform if by_hand(*widths)[at] <= share * total)
    assert by_hand(a, b)[at] >= best
    assert any(widths[0] <= a <= widths[0] + 1 and widths[1] <= b <= widths[1] + 1 for widths in uniform)


@pytest.mark.parametrize("share", [0.2, 0.35, 0.5, 0.75, 0.9])
def test_global_budgets_against_enumeration(share):
    net, groups = tiny((6, 8))
    scores = {"0": torch.rand(6, generator=torch.Generator().manual_seed(1)), "2": torch.linspace(0.1, 0.9, 8)}
    plan = select(groups, scores, macs=share, cost=measure(net, EXAMPLE), scope="global", normalize="none")
    pooled = sorted(scores["0"].sort(descending=True).values[1:].tolist() + scores["2"].sort().values[:-1].tolist())
    fitting = []
    for threshold in [*pooled, 2.0]:
        widths = [max(1, int((values >= threshold).sum())) for values in (scores["0"].double(), scores["2"].double())]
        fitting += [widths] if by_hand(*widths)[0] <= share * by_hand(6, 8)[0] else []
    chosen, prefix = [cut.new_size for cut in plan.cuts], max(fitting, key=sum)
    assert by_hand(*chosen)[0] <= share * by_hand(6, 8)[0]
    assert all(more >= least for more, least in zip(chosen, prefix, strict=True))
    for more in ([chosen[0] + 1, chosen[1]], [chosen[0], chosen[1] + 1]):  # nothing else fits
        assert by_hand(*more)[0] > share * by_hand(6, 8)[0] or more[0] > 6 or more[1] > 8


def test_both_budgets_hold_together():
    net, groups = tiny((12, 16))
    plan = select(groups, _scores(**{"0": 12, "2": 16}), macs=0.5, parameters=0.3, cost=measure(net, EXAMPLE))
    assert plan.notes["achieved"]["macs"] <= 0.5
    assert plan.notes["achieved"]["parameters"] <= 0.3


def test_rounded_budgets_are_met():
    net, groups = tiny((16, 24))
    plan = select(groups, _scores(**{"0": 16, "2": 24}), macs=0.5, cost=measure(net, EXAMPLE), round_to=4)
    assert all(cut.new_size % 4 == 0 for cut in plan.cuts)
    assert 0.35 < plan.notes["achieved"]["macs"] <= 0.5


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_an_impossible_budget_names_the_smallest_share(scope):
    net, groups = tiny((12, 16))
    reach = by_hand(2, 2)[0] / by_hand(12, 16)[0]
    with pytest.raises(SelectionError) as caught:
        select(groups, _scores(**{"0": 12, "2": 16}), macs=0.01, cost=measure(net, EXAMPLE), scope=scope, min_keep=2)
    message = str(caught.value)
    assert message.startswith("macs=0.01 can't be met: the smallest share within reach is macs 0.")
    reached = float(message.split()[-1])
    assert reach <= reached < reach + 1e-4


# --- refusals -------------------------------------------------------------------------------------

WHOLE = "nothing would be cut: min_keep, max_cut, round_to or the small widths leave every group whole"
FROZEN = "nothing would be cut: every channel group is frozen or ignored (out: an output)"
COST = measure(nn.Conv2d(3, 4, 1), torch.zeros(1, 3, 2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no budget: say how much may remain with keep=, macs=, parameters= or latency="),
        ({"keep": 1.5}, "keep=1.5 is no share: it must lie above 0 and be at most 1"),
        ({"keep": 0}, "keep=0 is no share: it must lie above 0 and be at most 1"),
        ({"keep": {"a": -1}}, "keep['a']=-1 is no share: it must lie above 0 and be at most 1"),
        ({"keep": 0.5, "macs": 0.5}, "keep= can't be combined with macs=: give one or the other"),
        ({"macs": 0.5}, "macs= and parameters= need cost=filterfold.profiling.macs.measure(model, example_inputs)"),
        ({"keep": {"a": 0.5}, "scope": "global"}, 'keep= for single layers needs scope="layer"'),
        ({"keep": 0.5, "round_to": 0}, "round_to=0: must be a whole number of at least 1"),
        ({"keep": 0.5, "min_keep": 1.5}, "min_keep=1.5: must be a whole number of at least 1"),
        ({"keep": 0.5, "min_keep": 0.0}, "min_keep=0.0 is no share: it must lie above 0 and be at most 1"),
        ({"keep": 0.5, "max_cut": 2}, "max_cut=2 is no share: it must lie above 0 and be at most 1"),
        ({"keep": 0.5, "scope": "net"}, 'scope=\'net\': must be "layer" or "global"'),
        ({"keep": 0.5, "normalize": "std"}, "normalize='std': must be one of mean, max, l2, none"),
        ({"keep": 0.5, "ignore": ["blok1"]}, "ignore: 'blok1' matches no layer; did you mean 'block1'?"),
        ({"keep": {"blok1": 0.5}}, "keep: 'blok1' matches no layer; did you mean 'block1'?"),
        ({"keep": 0.9, "round_to": 4}, WHOLE),
        ({"keep": 0.5, "ignore": ["*"]}, FROZEN),
        ({"macs": 0.5, "cost": COST, "ignore": ["*"]}, FROZEN),
    ],
)  # fmt: skip
def test_refusals(options, message):
    with pytest.raises(SelectionError) as caught:
        select([group("block1"), group("out", frozen="an output")], _scores(block1=4), **options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({}, "group 'conv' has no scores; score all groups that are to be cut"),
        ({"conv": torch.ones(3)}, "group 'conv': scores of shape (3,) for 4 units"),
        (
            {"conv": torch.tensor([1.0, 2, 3, float("nan")])},
            "group 'conv': scores are not finite; look for NaN or inf in its weights",
        ),
    ],
)
def test_scores_that_do_not_fit(scores, message):
    with pytest.raises(SelectionError) as caught:
        select([group()], scores, keep=0.5)
    assert str(caught.value) == message


def test_keeping_all_is_no_error():
    plan = select([group()], _scores(conv=4), keep=1.0)
    assert not plan.changes


# --- greedy ---------------------------------------------------------------------------------------


def test_greedy_selection_by_hand():
    """The second layer's filters read [3, 1] channels; once the first channel is gone, 2 beats 1."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 2, 1, bias=False))
    net[0].weight.data = torch.tensor([1.0, 4.0]).view(2, 1, 1, 1)
    net[1].weight.data = torch.tensor([[9.0, 1.0], [-3.0, 2.0]]).view(2, 2, 1, 1)
    first = ChannelGroup(
        "0", 2, (Slice("0.weight", 0, (0, 1), "filter"),), (Slice("1.weight", 1, (0, 1), "kernel"),),
        True, None, (0, 0), (0, 0),
    )  # fmt: skip
    second = ChannelGroup("1", 2, (Slice("1.weight", 0, (0, 1), "filter"),), (), True, None, (0, 0), (0, 0))
    independent = select((first, second), score((first, second), net), keep=0.5)
    assert [cut.assignment for cut in independent.cuts] == [(-1, 0), (0, -1)]
    greedy = select_greedily(
        (first, second), lambda group, plan: score([group], net, without=plan)[group.name], keep=0.5
    )
    assert [cut.assignment for cut in greedy.cuts] == [(-1, 0), (-1, 0)]
    assert greedy.notes["scoring"] == "greedy"


# --- the networks of Li et al. --------------------------------------------------------------------

FIRST_CONVOLUTIONS = [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(9)]
RESNET56 = {
    "resnet56-pruned-A": ((0.1, 0.1, 0.1), (16, 20, 38, 54)),
    "resnet56-pruned-B": ((0.6, 0.3, 0.1), (16, 18, 20, 34, 38, 54)),
}


@pytest.mark.parametrize("name", RESNET56)
def test_resnet56_as_li_et_al_prune_it(reference, name):
    with (reference / "li2017_table1.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["model"] == name)
    ratios, skipped = RESNET56[name]
    model, example = zoo.build("resnet56"), torch.zeros(1, 3, 32, 32)
    groups, cost = trace(model, example), measure(model, example)
    keep = {
        layer: 1 - ratios[place // 9] for place, layer in enumerate(FIRST_CONVOLUTIONS) if 2 * place + 2 not in skipped
    }
    after = predict(select(groups, score(groups, model), keep=keep, cost=cost), cost)
    assert (after.macs, after.weights) == (int(row["macs_exact"]), int(row["weights_exact"]))


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        ({}, [1, 1, 18]),
        ({"min_keep": 0.25}, [3, 2, 15]),
        ({"max_cut": 0.75}, [3, 2, 15]),
        ({"min_keep": 4}, [4, 4, 12]),
        ({"min_keep": 4, "max_cut": 0.5}, [5, 4, 11]),
        ({"min_keep": 0.25, "round_to": 2}, [4, 2, 14]),
    ],
)
def test_no_group_falls_below_its_floor_in_a_ranking_of_all(options, widths):
    """Layers of 10, 8 and 22 units, half of all kept; only the last one's scores are worth anything."""
    groups = [group("a", 10), group("b", 8), group("c", 22)]
    scores = {"a": torch.full((10,), 1e-3), "b": torch.full((8,), 1e-3), "c": torch.ones(22)}
    plan = select(groups, scores, keep=0.5, scope="global", normalize="none", **options)
    assert [cut.new_size for cut in plan.cuts] == widths
