"""What verification found: errors of a cut network, the tolerances, and the verdict in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..plan import AttributeChange
from ..profiling.macs import Cost

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest relative error by type: about √ε, loose enough for reordered sums in deep networks, and far below
what a wrong channel does (over 1e-2 with generic values)."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What verification found; true in a boolean context if the cut is right.

    **Arguments:**

    - `ok`: whether both errors are within the tolerance and nothing failed.
    - `masking_error`: relative error against the masked network; None if it could not be computed.
    - `permutation_error`: relative error under permutation; None if no changed group needs that comparison.
    - `inexact`: names of the changed groups to which neither masking nor the test with dead units can be applied.
    - `message`: all of that in one line.
    - `attributes`: sizes in the model's own code that must change with the plan.
    - `suspects`: groups that the failed search for such sizes names as the reason.
    - `causes`: groups that are known to be the reason, with what their cut does.
    - `cost`: what the cut network costs, if that was asked for and could be counted while it ran.
    """

    ok: bool
    masking_error: float | None
    permutation_error: float | None
    inexact: tuple[str, ...]
    message: str
    attributes: tuple[AttributeChange, ...] = ()
    suspects: tuple[str, ...] = ()
    causes: Mapping[str, str] = field(default_factory=dict)
    cost: Cost | None = field(default=None, repr=False, compare=False)

    def __bool__(self) -> bool:
        """`ok`."""
        return self.ok

    def __str__(self) -> str:
        """The message."""
        return self.message


@dataclass(frozen=True, slots=True)
class Errors:
    """Both errors of a cut network, where they are known, and why it failed, if it did."""

    masking: float | None
    permutation: float | None
    failure: str | None = None

    @property
    def worst(self) -> float:
        """The larger error; infinite after a failure."""
        known = [error for error in (self.masking, self.permutation) if error is not None]
        return float("inf") if self.failure else max(known, default=0.0)


def describe(errors: Errors, limit: float, dtype: torch.dtype, inexact: Sequence[str]) -> str:
    """The verdict in one line.

    >>> describe(Errors(3e-6, None), 1e-4, torch.float32, ())
    'the cut network equals the masked one to 3.0e-06 (float32)'
    """
    kind = str(dtype).removeprefix("torch.")
    masking, permutation, names = errors.masking, errors.permutation, listed(inexact)
    if errors.failure:
        return f"the cut network fails: {errors.failure}"
    # `not error <= limit`, since the error may be NaN
    if masking is not None and not masking <= limit:
        text = f"the cut network differs from the masked one by {masking:.1e} (allowed {limit:.0e}, {kind})"
    elif permutation is not None and not permutation <= limit:
        text = f"permuting {names} changes the network by {permutation:.1e} (allowed {limit:.0e})"
    elif masking is None:
        text = f"the cut network runs, but {names} can't be compared with a masked one"
    else:
        text = f"the cut network equals the masked one to {masking:.1e} ({kind})"
    if not inexact or not errors.worst <= limit:
        return text
    how = "not compared at all" if permutation is None else f"permutation error {permutation:.1e}"
    return f"{text} ({how})" if masking is None else f"{text}; not mask-exact: {names} ({how})"


def listed(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
