"""Results of the tests, with their caveats in words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Summary:
    """Size, mean, standard deviation (n - 1; None for one trial), median and extremes of one group."""

    n: int
    mean: float
    sd: float | None
    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Significance:
    """A test's statistic and p-value, with its caveats.

    `exact` says that the p-value comes from full enumeration rather than from an approximation.
    """

    statistic: float
    p: float
    n: tuple[int, ...]
    exact: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Pairwise:
    """p-values of all pairs of groups; look one up with `result.p("a", "b")`, in either order."""

    names: tuple[str, ...]
    matrix: tuple[tuple[float, ...], ...]
    notes: tuple[str, ...] = ()

    def p(self, first: str, second: str) -> float:
        """The p-value of one pair."""
        return self.matrix[self.names.index(first)][self.names.index(second)]


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean of the first sample minus mean of the second (control), with a two-sided interval.

    `p` is that of Welch's or the paired t-test; interval and p are None where a sample has no spread to reckon with.
    """

    value: float
    low: float | None
    high: float | None
    p: float | None
    n: tuple[int, int]
    notes: tuple[str, ...] = ()


EFFECTS = ("negligible", "small", "medium", "large")


@dataclass(frozen=True, slots=True)
class Effect:
    """Cliff's δ in -1 … 1 and its size, one of `EFFECTS`."""

    delta: float
    size: str


@dataclass(frozen=True, slots=True)
class Equivalence(Difference):
    """A difference with two one-sided tests against a margin.

    `p_not_worse` tests "the loss is the margin or more", `p_not_better` the other side; `p`, the larger of the two, is
    the p-value of equivalence (TOST). `low` and `high` bound the difference with confidence 1 - 2·alpha, the interval
    that belongs to these tests.
    """

    alpha: float = 0.05
    p_not_worse: float | None = None
    p_not_better: float | None = None

    @property
    def not_worse(self) -> bool:
        """Whether a loss of the margin or more is ruled out (non-inferiority)."""
        return self.p_not_worse is not None and self.p_not_worse < self.alpha

    @property
    def equivalent(self) -> bool:
        """Whether a difference of the margin or more, either way, is ruled out."""
        return self.p is not None and self.p < self.alpha
