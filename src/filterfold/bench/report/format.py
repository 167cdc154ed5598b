"""Numbers as text: few digits, the same everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .. import stats
from .study import Measure

MISSING = "–"


def number(x: float | None, kind: str = "number") -> str:
    """One number in its kind's form.

    >>> number(89.304, "percent"), number(313_201_664, "count"), number(0.01234, "seconds"), number(None)
    ('89.30', '313 M', '0.0123', '–')
    """
    if x is None or math.isnan(x):
        return MISSING
    if kind == "percent":
        return f"{x:.2f}"
    if kind == "count":
        factor, unit = _scale(x)
        return f"{x:.0f}" if factor == 1 else f"{significant(x / factor, 3)}{unit}"
    return f"{x:.0f}" if kind == "seconds" and abs(x) >= 100 else significant(x, 3)


def mean_sd(values: Sequence[float], measure: Measure) -> str:
    """Mean ± standard deviation; the mean alone where all values agree or there is only one.

    >>> mean_sd([89.0, 90.0], Measure("top1", "Top-1", "%", "percent"))
    '89.50 ± 0.71'
    """
    if not values:
        return MISSING
    found = stats.summarise(values)
    if found.sd is None or found.low == found.high:
        return number(found.mean, measure.kind)
    if measure.kind == "count":
        # Both in the mean's unit: "1.20 ± 0.05 M" reads better than "1.20 M ± 50.0 k".
        factor, unit = _scale(found.mean)
        return f"{significant(found.mean / factor, 3)} ± {significant(found.sd / factor, 2)}{unit}"
    places = 2 if measure.kind == "percent" else max(0, min(_place(found.sd, 2), _place(found.mean, 4)))
    return f"{found.mean:.{places}f} ± {found.sd:.{places}f}"


def p_value(p: float | None) -> str:
    """A p-value to four places, as the reference tables have them.

    >>> p_value(0.03318), p_value(0.00001), p_value(1.0)
    ('.0332', '< .0001', '1')
    """
    if p is None:
        return MISSING
    if p < 0.0001:
        return "< .0001"
    return "1" if p > 0.99995 else f"{p:.4f}"[1:]


def p_words(p: float | None) -> str:
    """A p-value with its sign, for sentences; it does not break over lines.

    >>> p_words(0.03318).split(), p_words(0.00001).split()
    (['p', '=', '.0332'], ['p', '<', '.0001'])
    """
    text = p_value(p)
    return (f"p {text}" if text.startswith("<") else f"p = {text}").replace(" ", "\u00a0")


def signed(x: float | None, digits: int = 2) -> str:
    """A difference with its sign; a true minus, so that columns line up.

    >>> signed(-0.698), signed(0.5)
    ('−0.70', '+0.50')
    """
    if x is None:
        return MISSING
    text = f"{x:+.{digits}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{digits}f}"


def interval(low: float | None, high: float | None, digits: int = 2) -> str:
    """Two bounds of a difference; it does not break over lines.

    >>> interval(-1.2, 0.3).split()
    ['−1.20', '…', '+0.30']
    """
    return MISSING if low is None or high is None else f"{signed(low, digits)}\u00a0…\u00a0{signed(high, digits)}"


def times(ratio: float | None) -> str:
    """A ratio.

    >>> times(3.9512), times(12.3)
    ('3.95×', '12.3×')
    """
    return MISSING if ratio is None else f"{significant(ratio, 3)}×"


def ratio_interval(found: stats.Difference) -> str:
    """The bounds of a ratio; it does not break over lines."""
    return MISSING if found.low is None else f"{times(found.low)}\u00a0…\u00a0{times(found.high)}"


def tick(x: float) -> str:
    """A count beside an axis: without the zeros that line up columns.

    >>> tick(50_000_000), tick(1.25e15), tick(0)
    ('50 M', '1.25 P', '0')
    """
    factor, unit = _scale(x)
    return f"{float(f'{x / factor:.3g}'):g}{unit}"


def points(x: float) -> str:
    """A margin with its unit, without trailing zeros.

    >>> points(0.5), points(1)
    ('0.5 points', '1 point')
    """
    return f"{x:g} point" + ("" if x == 1 else "s")


def plural(count: int, noun: str, many: str | None = None) -> str:
    """A count with its noun.

    >>> plural(1, "trial"), plural(2, "trial"), plural(3, "child", "children")
    ('1 trial', '2 trials', '3 children')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {many or f'{noun}s'}"


def significant(x: float, digits: int) -> str:
    """So many significant digits, never in scientific notation unless tiny."""
    if x == 0:
        return "0"
    places = _place(x, digits)
    if places > 8:
        return f"{x:.{digits - 1}e}"
    return f"{x:.{max(places, 0)}f}"


def _place(x: float, digits: int) -> int:
    """Decimal places that show so many significant digits; negative for large numbers."""
    return digits - 1 - (math.floor(math.log10(abs(x))) if x else 0)


def _scale(x: float) -> tuple[float, str]:
    for factor, unit in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(x) >= factor:
            return factor, unit
    return 1.0, ""
