"""Statistics: oracles are the document's tables, sums worked out by hand, full enumeration, and statsmodels."""

from __future__ import annotations

import csv
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from filterfold.bench import stats
from filterfold.bench.stats import tests
from filterfold.errors import ConfigError


@pytest.fixture(scope="module")
def figures(reference: Path) -> dict[str, dict[str, list[float]]]:
    """Column → group → values of the document's 35 trials."""
    with (reference / "figures_4_5.csv").open() as file:
        rows = list(csv.DictReader(file))
    columns = {"time": "inference_seconds", "top1": "top1_percent", "top5": "top5_percent"}
    groups: dict[str, dict[str, list[float]]] = {name: {} for name in columns}
    for row in rows:
        group = "original" if row["method"] == "original" else f"k={row['clusters']}"
        for name, column in columns.items():
            groups[name].setdefault(group, []).append(float(row[column]))
    return groups


KS = [5, 10, 15, 20, 25, 30]


@pytest.mark.parametrize(
    ("column", "statistic", "p"), [("time", 13.699, 0.03318), ("top1", 8.592, 0.19788), ("top5", 2.466, 0.87222)]
)
def test_kruskal_wallis_of_the_document(figures, column, statistic, p):
    result = stats.kruskal_wallis(figures[column])
    assert result.p == pytest.approx(p, abs=5e-6)
    assert result.statistic == pytest.approx(statistic, abs=5e-4)
    assert result.n == (5,) * 7
    assert result.notes == ()


@pytest.mark.parametrize(
    ("adjust", "expected"),
    [
        ("holm", [0.0610, 0.3302, 0.0640, 0.3231, 0.0384, 0.2050]),
        (None, [0.0031, 0.0206, 0.0034, 0.0190, 0.0018, 0.0114]),
    ],
)
def test_dunn_of_the_document(figures, adjust, expected):
    pairs = stats.dunn(figures["time"], adjust=adjust)
    assert [round(pairs.p("original", f"k={k}"), 4) for k in KS] == expected
    assert pairs.p("k=5", "original") == pairs.p("original", "k=5")
    assert pairs.p("k=5", "k=5") == 1


def test_mann_whitney_of_the_pools(figures):
    pooled = [value for name, values in figures["top1"].items() if name != "original" for value in values]
    result = stats.mann_whitney(figures["top1"]["original"], pooled)
    assert round(result.p, 4) == 0.0222
    assert stats.mean_difference(pooled, figures["top1"]["original"]).value == pytest.approx(-0.698, abs=5e-4)


def test_kruskal_wallis_by_hand():
    # Ranks 1 3 5 | 2 4 6, rank sums 9 and 12: H = 12/(6·7)·(9²/3 + 12²/3) - 3·7 = 2/7·75 - 21 = 3/7.
    result = stats.kruskal_wallis({"a": [10, 30, 50], "b": [20, 40, 60]})
    assert result.statistic == pytest.approx(3 / 7)
    # χ² with one degree of freedom: p = erfc(√(H/2)).
    assert result.p == pytest.approx(math.erfc(math.sqrt(3 / 14)))
    assert result.notes == ("groups under 5 trials, so the p-value is rough: a (3), b (3)",)


def test_dunn_by_hand():
    # Ranks 1 2 | 3 4 | 5 6: mean ranks 1.5, 3.5, 5.5; variance of a difference 6·7/12·(1/2 + 1/2) = 3.5.
    groups = {"z": [1, 2], "a": [3, 4], "m": [5, 6]}
    raw = stats.dunn(groups, adjust=None)
    near, far = (math.erfc(gap / math.sqrt(3.5) / math.sqrt(2)) for gap in (2, 4))
    assert raw.names == ("z", "a", "m")
    assert raw.p("z", "m") == pytest.approx(far)
    assert raw.p("a", "m") == pytest.approx(near)
    corrected = stats.dunn(groups)
    assert corrected.p("z", "m") == pytest.approx(3 * far)
    assert corrected.p("z", "a") == pytest.approx(2 * near)


def test_dunn_is_weak_between_neighbours():
    groups = {name: [10 * step + trial for trial in range(5)] for step, name in enumerate("abcd")}
    assert round(stats.dunn(groups, adjust=None).p("a", "b"), 2) == 0.18


def test_cliffs_delta_by_hand():
    # Pairs: 1 beats nothing (0 larger, 2 smaller), 4 beats both: (2 - 2) / 4; then 5 ties one, beats one.
    assert stats.cliffs_delta([1, 4], [2, 3]) == stats.Effect(0.0, "negligible")
    assert stats.cliffs_delta([5, 5], [5, 4]) == stats.Effect(0.5, "large")
    assert stats.cliffs_delta([1, 2], [3, 4]).delta == -1
    assert stats.cliffs_delta([3, 1, 1, 1, 1], [1]).size == "small"


def _enumerate(x: list[float], y: list[float]) -> float:
    together, hits, total = [round(v * 1e6) for v in [*x, *y]], 0, 0
    observed = abs(len(y) * sum(together[: len(x)]) - len(x) * sum(together[len(x) :]))
    for pick in itertools.combinations(range(len(together)), len(x)):
        inside = sum(together[i] for i in pick)
        hits += abs(len(y) * inside - len(x) * (sum(together) - inside)) >= observed
        total += 1
    return hits / total


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([89.24, 89.44, 90.12, 88.27, 89.44], [88.53, 88.34, 88.71, 89.03, 88.76]),
        ([0.1, 0.2, 0.3], [0.3, 0.2, 0.1]),
        ([1.0, 2.0], [1.5, 2.5, 3.5, 0.1]),
        ([0.1, 0.1, 0.4], [0.2, 0.3, 0.1, 0.6, 0.7]),
    ],
)
def test_permutation_against_enumeration_in_whole_numbers(x, y):
    result = stats.permutation(x, y)
    assert result.p == pytest.approx(_enumerate(x, y), abs=1e-12)
    assert result.exact


def test_paired_permutation_by_hand():
    # Differences 1 2 3: of the 8 sign patterns only +++ and --- reach a sum of 6.
    assert stats.permutation([2, 4, 6], [1, 2, 3], paired=True).p == 2 / 8
    # Differences 1 2 -3 sum to 0, which every pattern reaches.
    assert stats.permutation([2, 4, 0], [1, 2, 3], paired=True).p == 1


@pytest.mark.parametrize(("n", "m", "least"), [(1, 3, "0.25"), (2, 2, "0.333"), (3, 3, "0.1"), (2, 3, "0.1")])
def test_the_least_p_that_permutation_names_is_reached(n, m, least):
    found = stats.permutation([100.0 + i for i in range(n)], [float(i) for i in range(m)])
    assert found.notes == (f"with {n} against {m} trials no p-value under {least} is possible",)
    assert f"{found.p:.3g}" == least


def test_permutation_says_what_n_can_not_show():
    assert stats.permutation([1, 2, 3], [4, 5, 6]).notes == (
        "with 3 against 3 trials no p-value under 0.1 is possible",
    )


@pytest.mark.parametrize(("paired", "draws"), [(False, 5000), (True, 250)])
def test_random_regroupings_come_near_the_exact_p(monkeypatch, paired, draws):
    x, y = [1.0, 2.0, 3.5, 4.0, 5.5, 2.5, 3.0, 4.1], [3.0, 4.5, 6.0, 7.0, 5.0, 2.0, 6.5, 4.0]
    exact = stats.permutation(x, y, paired=paired)
    monkeypatch.setattr(tests, "RESAMPLES", draws)
    drawn = stats.permutation(x, y, paired=paired)
    assert (exact.exact, drawn.exact) == (True, False)
    assert "random" in drawn.notes[-1]
    # three standard errors of a share
    assert drawn.p == pytest.approx(exact.p, abs=3 * math.sqrt(exact.p * (1 - exact.p) / draws))
    assert stats.permutation(x, y, paired=paired).p == drawn.p


@pytest.mark.parametrize(("x", "y"), [([1.0], [2.0, 3.0, 4.0]), ([2.0, 3.0, 9.0, 1.0], [3.0]), ([1.0], [2.0])])
def test_permutation_of_a_single_trial(x, y):
    assert stats.permutation(x, y).p == pytest.approx(_enumerate(x, y))
    assert stats.permutation(x[:1], y[:1], paired=True).p == 1


def test_holm_by_hand():
    assert stats.holm([0.02, None, 0.01, 0.5]) == pytest.approx((0.04, None, 0.03, 0.5))
    assert stats.holm([0.9, 0.8]) == (1, 1)
    assert stats.holm([None]) == (None,)


def test_holm_is_that_of_statsmodels():
    from statsmodels.stats.multitest import multipletests

    p = np.random.default_rng(1).uniform(size=30) ** 3
    p[5] = p[6]
    assert stats.holm(p.tolist()) == pytest.approx(multipletests(p, method="holm")[1])


@pytest.fixture(scope="module")
def tables(figures, reference) -> list[dict[str, list[float]]]:
    """Label → values: the document's three columns, and top-1, top-5 and time of the ablation's trials."""
    found = list(figures.values())
    for measure in ("top1", "top5", "inference_seconds"):
        groups: dict[str, list[float]] = {}
        for path in sorted((reference.parent / "results" / "ablation" / "records").glob("*.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            groups.setdefault(record["label"], []).append(record["result"][measure])
        found.append(groups)
    assert [len(groups) for groups in found] == [7, 7, 7, 19, 19, 19]
    return found


@pytest.mark.parametrize("adjust", ["holm", None])
def test_dunn_is_that_of_scikit_posthocs_on_our_tables(tables, adjust):
    import scikit_posthocs

    for groups in tables:
        theirs = scikit_posthocs.posthoc_dunn(list(groups.values()), p_adjust=adjust).to_numpy()
        assert np.array(stats.dunn(groups, adjust).matrix) == pytest.approx(theirs)


def test_permutation_is_full_enumeration_on_our_tables(tables):
    for groups in tables:
        control, *others = groups.values()
        for values in others:
            assert stats.permutation(values, control).p == pytest.approx(_enumerate(values, control), abs=1e-12)


def test_tost_is_that_of_statsmodels_on_our_tables(tables):
    from statsmodels.stats.weightstats import ttost_ind

    for groups in tables:
        control, *others = groups.values()
        for values in (v for v in others if len(v) > 1):
            p, lower, upper = ttost_ind(values, control, -0.5, 0.5, usevar="unequal")
            found = stats.equivalence(values, control)
            assert (found.p, found.p_not_worse, found.p_not_better) == pytest.approx((p, lower[1], upper[1]))


def test_welch_by_hand():
    # Variances 1 and 4, n = 3: standard error √(5/3), ν = (5/3)² / ((1/3)²/2 + (4/3)²/2) = 2.9412.
    found = stats.mean_difference([1, 2, 3], [2, 4, 6], confidence=0.9)
    from scipy.special import stdtrit

    half = stdtrit(50 / 17, 0.95) * math.sqrt(5 / 3)
    assert (found.value, found.low, found.high) == pytest.approx((-2, -2 - half, -2 + half))
    # Paired: differences 1 2 3, standard error 1/√3, t(.975, 2) = 4.302653.
    paired = stats.mean_difference([2, 4, 6], [1, 2, 3], paired=True)
    assert (paired.value, paired.high) == pytest.approx((2, 2 + 4.302653 / math.sqrt(3)))


@pytest.mark.parametrize(("n", "half"), [(3, 0.26), (5, 0.18), (10, 0.12)])
def test_interval_width_of_the_fact_sheet(n, half):
    values = np.linspace(-1, 1, n)
    values *= 0.15 / values.std(ddof=1)
    found = stats.equivalence(90 + values, 90 + values)
    assert found.high == pytest.approx(half, abs=0.006)


@pytest.mark.parametrize("margin", [0.2, 0.5, 1.5])
def test_tost_is_that_of_statsmodels(figures, margin):
    from statsmodels.stats.weightstats import ttost_ind, ttost_paired

    x, y = np.array(figures["top1"]["k=15"]), np.array(figures["top1"]["original"])
    for paired in (False, True):
        p, lower, upper = (
            ttost_paired(x, y, -margin, margin) if paired else ttost_ind(x, y, -margin, margin, usevar="unequal")
        )
        found = stats.equivalence(x, y, margin=margin, paired=paired)
        assert (found.p, found.p_not_worse, found.p_not_better) == pytest.approx((p, lower[1], upper[1]))
        # The interval and the tests are two sides of one coin.
        assert found.equivalent == (found.low > -margin and found.high < margin)
        assert found.not_worse == (found.low > -margin)


def test_ratio_is_geometric():
    found = stats.mean_ratio([1, 4], [4, 16])
    assert found.value == pytest.approx(0.25)
    assert found.low < 0.25 < found.high
    with pytest.raises(ConfigError, match="above 0, but one is 0"):
        stats.mean_ratio([0, 1], [1, 2])


def test_resolvable_difference_by_simulation():
    size = stats.resolvable_difference(5, 5, 0.2)
    random = np.random.default_rng(7)
    from scipy.stats import ttest_ind

    x = random.normal(0, 0.2, (4000, 5))
    y = random.normal(size, 0.2, (4000, 5))
    share = (ttest_ind(x, y, axis=1).pvalue < 0.05).mean()
    assert share == pytest.approx(0.8, abs=0.03)
    assert stats.resolvable_difference(1, 5, 0.2) == math.inf
    assert stats.resolvable_difference(5, 5, 0.2, paired=True) < size


@pytest.mark.parametrize("n", [3, 5, 10])
def test_power_is_that_of_statsmodels(n):
    from statsmodels.stats.power import TTestIndPower, TTestPower

    found = stats.resolvable_difference(n, n + 1, 1.0)
    assert TTestIndPower().power(found, n, 0.05, ratio=(n + 1) / n) == pytest.approx(0.8)
    assert TTestPower().power(stats.resolvable_difference(n, n, 1.0, paired=True), n, 0.05) == pytest.approx(0.8)


def test_power_of_very_few_trials_is_a_number():
    # two pairs: the critical t is 12.7; statsmodels gives NaN over much of the way there
    size = stats.resolvable_difference(2, 2, 1.0, paired=True)
    random = np.random.default_rng(5)
    from scipy.stats import ttest_1samp

    share = (ttest_1samp(random.normal(size, 1.0, (20_000, 2)), 0, axis=1).pvalue < 0.05).mean()
    assert share == pytest.approx(0.8, abs=0.02)


def test_trials_needed_by_simulation():
    from scipy.stats import ttest_ind

    n = stats.trials_needed(0.4, 0.5)
    random = np.random.default_rng(3)
    shares = []
    for trials in (n - 1, n):
        x, y = random.normal(0, 0.4, (2, 6000, trials))
        shares.append((ttest_ind(x + 0.5, y, axis=1, alternative="greater").pvalue < 0.05).mean())
    assert shares[0] < 0.82
    assert shares[1] > 0.78


def test_degenerate_groups_say_so():
    same = {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    assert stats.kruskal_wallis(same).p == 1
    assert stats.dunn(same).p("a", "b") == 1
    assert stats.dunn(same).notes == ("all values are equal",)
    assert stats.mann_whitney([1, 1], [1, 1]).p == 1
    assert stats.permutation([1, 1], [1, 1]).p == 1
    assert stats.equivalence([1, 1], [1, 1]).p is None
    assert not stats.equivalence([1, 1], [1, 1]).equivalent
    single = stats.mean_difference([90.0], [91.0, 92.0])
    assert (single.value, single.low, single.p) == (-1.5, None, None)
    assert single.notes[0].startswith("one trial has no spread")
    assert "differences" in stats.mean_difference([90.1, 91.1], [90.0, 91.0], paired=True).notes[0]
    # One side without spread: Welch's ν is that of the other side, here one, and t(.975, 1) = 12.7062.
    still = stats.mean_difference([90.0, 90.0, 90.0], [91.0, 92.0])
    assert still.low == pytest.approx(-1.5 - 12.7062 * 0.5, abs=1e-4)
    assert stats.summarise([3.0]).sd is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.kruskal_wallis({"a": [1.0]}), "1 groups given; a comparison needs at least 2"),
        (lambda: stats.dunn({"a": [1.0], "b": []}), "group 'b' has shape (0,)"),
        (lambda: stats.cliffs_delta([1, math.nan], [1]), "the sample holds nan"),
        (lambda: stats.permutation([1, 2], [1], paired=True), "2 values against 1 can't be paired"),
        (lambda: stats.equivalence([1, 2], [1, 2], margin=0), "margin is 0"),
        (lambda: stats.mean_difference([1, 2], [1, 2], confidence=95), "confidence is 95"),
        (lambda: stats.trials_needed(0.1, -1), "margin is -1"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ConfigError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("hits", "n"), [(0, 20), (9, 10), (359, 359), (4321, 10_000)])
def test_wilsons_interval_of_a_share(hits, n):
    from statsmodels.stats import proportion as statsmodels

    expected = statsmodels.proportion_confint(hits, n, method="wilson")
    assert stats.proportion_interval(hits / n, n) == pytest.approx(expected, abs=1e-12)
