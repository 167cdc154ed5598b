"""Samples on their way in: checked, in order, and the reasons why a test is impossible or rough."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigError

Samples = Mapping[str, ArrayLike]
"""Group name → one value for each trial, in the order in which the groups are to be shown."""

Array = NDArray[np.float64]

ENOUGH = 5
"""Trials a group from which the χ² approximation of Kruskal–Wallis is usable (SciPy's documentation)."""


def check_sample(values: ArrayLike, name: str = "a sample") -> Array:
    """Values as float64 of shape `(n,)`, n ≥ 1, all finite; refused by `name` otherwise."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x):
        raise ConfigError(f"{name} has shape {x.shape}; give one value or more, in one dimension")
    if not np.isfinite(x).all():
        raise ConfigError(f"{name} holds {x[~np.isfinite(x)][0]}; leave out trials without a result")
    return x


def check_groups(groups: Samples, least: int) -> dict[str, Array]:
    """Every group checked, in the order given; refused if there are fewer than `least`."""
    if len(groups) < least:
        raise ConfigError(f"{len(groups)} groups given; a comparison needs at least {least}")
    return {name: check_sample(values, f"group {name!r}") for name, values in groups.items()}


def check_pair(sample: ArrayLike, control: ArrayLike, paired: bool) -> tuple[Array, Array]:
    """Sample and control checked; refused if `paired` and of unequal length."""
    x, y = check_sample(sample, "the sample"), check_sample(control, "the control")
    if paired and len(x) != len(y):
        raise ConfigError(f"{len(x)} values against {len(y)} can't be paired; give one control for each")
    return x, y


def no_spread(x: Array, y: Array, paired: bool) -> str | None:
    """Why no t-test is possible, or None."""
    if min(len(x), len(y)) < 2:
        return "one trial has no spread: an interval needs at least two trials a side"
    # Values that are equal on paper differ in their last bits once they have been subtracted.
    scale = 1e-12 * max(float(np.abs(np.concatenate([x, y])).max()), 1e-300)
    if paired and float(np.ptp(x - y)) <= scale:
        return "all differences are equal: there is no spread to test against"
    if not paired and max(float(np.ptp(x)), float(np.ptp(y))) <= scale:
        return "both groups are without spread: there is nothing to test against"
    return None


def small_groups(samples: Mapping[str, Array]) -> tuple[str, ...]:
    """A note that names the groups under `ENOUGH` trials, if there are any."""
    small = [f"{name} ({len(x)})" for name, x in samples.items() if len(x) < ENOUGH]
    if not small:
        return ()
    return (f"groups under {ENOUGH} trials, so the p-value is rough: {', '.join(small)}",)
