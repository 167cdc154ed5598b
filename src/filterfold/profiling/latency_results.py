"""Results of timing: medians, intervals, ratios, and warnings about them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import comb
from typing import Any

CONTROL = "A/A control"


UNSTEADY = 0.03
"""An A/A control further than this from 1.00 makes differences of that size meaningless."""


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """A confidence interval of the median without an assumption on the distribution: two order statistics.

    With fewer than 6 values no two of them cover 95 %: then it is the smallest and the largest, and
    covers less.

    **Arguments:**

    - `values`: shape `(n,)`, independent.
    - `level`: least coverage.

    **Returns:** lower and upper end. See Conover, Practical Nonparametric Statistics, section 3.2.

    >>> median_interval(range(1, 21))
    (6, 15)
    """
    ordered, count = sorted(values), len(values)
    outside, tail = 0, 1 / 2**count  # P(at most `outside` values below the median)
    while tail <= (1 - level) / 2:
        outside += 1
        tail += comb(count, outside) / 2**count
    first = max(outside - 1, 0)
    return ordered[first], ordered[count - 1 - first]


@dataclass(frozen=True, slots=True)
class Latency:
    """The time of one network at one batch size.

    **Arguments:**

    - `model`: its name.
    - `batch_size`: examples per call.
    - `seconds`: one entry per repeat: mean seconds per call within the repeat.
    """

    model: str
    batch_size: int
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds per call."""
        return statistics.median(self.seconds)

    @property
    def p90(self) -> float:
        """Nearest-rank 90th percentile of the seconds per call."""
        return sorted(self.seconds)[-(-9 * len(self.seconds) // 10) - 1]

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the median (see `median_interval`)."""
        return median_interval(self.seconds)

    @property
    def throughput(self) -> float:
        """Examples per second at the median."""
        return self.batch_size / self.median


@dataclass(frozen=True, slots=True)
class LatencyComparison:
    """Latencies of several networks; the first one is the reference.

    **Arguments:**

    - `rows`: one entry per batch size and network, the reference's control (`"A/A control"`) last.
    - `conditions`: device, threads, data type, mode, version of PyTorch, load average.
    - `macs`: network → multiply-accumulates per example, where they were counted.
    """

    rows: tuple[Latency, ...]
    conditions: Mapping[str, str | int | float | None]
    macs: Mapping[str, int] = field(default_factory=dict)

    def row(self, model: str, batch_size: int) -> Latency:
        """The entry of a network at a batch size."""
        return next(row for row in self.rows if (row.model, row.batch_size) == (model, batch_size))

    def speedup(self, model: str, batch_size: int) -> float:
        """Median over the repeats of reference time / time, both taken in the same repeat."""
        return statistics.median(self._ratios(model, batch_size))

    def speedup_interval(self, model: str, batch_size: int) -> tuple[float, float]:
        """95 % confidence interval of the speed-up (see `median_interval`)."""
        return median_interval(self._ratios(model, batch_size))

    def macs_ratio(self, model: str) -> float | None:
        """Reference MACs / MACs: what the speed-up would be if nothing else took time; None if not counted."""
        mine, reference = self.macs.get(model), self.macs.get(self.rows[0].model)
        return reference / mine if mine and reference else None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What makes the figures doubtful, one sentence each."""
        found = []
        for row in self.rows:
            ratio = self.speedup(row.model, row.batch_size)
            fewer = self.macs_ratio(row.model)
            if row.model == CONTROL and abs(ratio - 1) > UNSTEADY:
                found.append(
                    f"batch {row.batch_size}: the A/A control gives {ratio:.2f}x; the machine is too unsteady for "
                    f"differences below {abs(ratio - 1):.0%}"
                )
            if fewer is not None and self.speedup_interval(row.model, row.batch_size)[0] > fewer:
                found.append(
                    f"{row.model}, batch {row.batch_size}: {ratio:.2f}x as fast with only {fewer:.2f}x fewer MACs; "
                    f"look for the mistake first"
                )
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values; seconds per call, with all repeats."""
        return {
            "reference": self.rows[0].model,
            "conditions": dict(self.conditions),
            "rows": [
                {
                    "model": row.model,
                    "batch_size": row.batch_size,
                    "median": row.median,
                    "p90": row.p90,
                    "interval": row.interval,
                    "throughput": row.throughput,
                    "speedup": self.speedup(row.model, row.batch_size),
                    "speedup_interval": self.speedup_interval(row.model, row.batch_size),
                    "macs": self.macs.get(row.model),
                    "macs_ratio": self.macs_ratio(row.model),
                    "repeats": len(row.seconds),
                    "seconds": row.seconds,
                }
                for row in self.rows
            ],
            "warnings": self.warnings,
        }

    def table(self) -> list[tuple[str, ...]]:
        """Heading and one line a network and batch size, as texts."""
        lines: list[tuple[str, ...]] = [
            ("model", "batch", "speed-up", "95 %", "MACs", "median ms", "95 % interval", "p90 ms", "examples/s")
        ]
        for row in self.rows:
            (low, high), (slow, fast) = row.interval, self.speedup_interval(row.model, row.batch_size)
            fewer = self.macs_ratio(row.model)
            lines.append(
                (
                    row.model,
                    str(row.batch_size),
                    f"{self.speedup(row.model, row.batch_size):.2f}x",
                    f"{slow:.2f}-{fast:.2f}",
                    "" if fewer is None else f"{fewer:.2f}x",
                    f"{1e3 * row.median:.3f}",
                    f"{1e3 * low:.3f}-{1e3 * high:.3f}",
                    f"{1e3 * row.p90:.3f}",
                    f"{row.throughput:,.0f}",
                )
            )
        return lines

    def __str__(self) -> str:
        """A plain-text table, the conditions, and the warnings."""
        table = self.table()
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        ]
        conditions = ", ".join(f"{key} {value}" for key, value in self.conditions.items() if value is not None)
        return "\n".join([*(line.rstrip() for line in lines), conditions, *self.warnings])

    def _ratios(self, model: str, batch_size: int) -> list[float]:
        reference, other = self.row(self.rows[0].model, batch_size), self.row(model, batch_size)
        return [a / b for a, b in zip(reference.seconds, other.seconds, strict=True)]
