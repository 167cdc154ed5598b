"""The least-squares problem of one layer: its sums, its ridge, its solution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

RIDGES = (inf, 100.0, 10.0, 1.0, 0.3, 0.1, 3e-2, 1e-2, 1e-3)
"""Ridges that `best_ridge` tries, the strongest first; that leaves the kernels as they are."""


Rows = tuple[Tensor, Tensor, Tensor]
"""Inputs, residuals and wanted outputs of some rows."""


class Equations:
    """Normal equations of one layer, added up in float64: X inputs, R = wanted - output, for every group.

    Rows of the second half of the examples are added up apart, so that a ridge found on one half can be judged on the
    other. Where there are fewer rows than inputs, X is replaced by its coordinates in the space that its rows span:
    kernels outside of it change nothing and stay as they are.

    **Arguments:**

    - `features`: number of inputs of a group.
    - `rows`: how many rows there will be.
    """

    def __init__(self, features: int, rows: int) -> None:
        self._features = features
        self._few: tuple[list[Rows], list[Rows]] | None = ([], []) if rows < features else None
        self._basis: Tensor | None = None
        self._halves = (_Totals(), _Totals())

    def add(self, x: Tensor, residual: Tensor, wanted: Tensor, *, second: bool) -> None:
        """Add rows of one half: of shape `(groups, rows, inputs)`, and twice `(groups, rows, outputs)`."""
        if self._few is None:
            self._halves[second].add(x, residual, wanted)
        else:
            self._few[second].append((x, residual, wanted))

    def problems(self, *, centred: bool) -> list[Problem]:
        """The problem of each half of the examples that has rows."""
        self._finish()
        return [half.problem(centred, self._features) for half in self._halves if half.count]

    def error(self, *, centred: bool) -> float:
        """Relative error of the outputs as they are."""
        self._finish()
        both = self._both()
        return _root(both.problem(centred, self._features).left, both.size(centred))

    def solve(self, ridge: float, *, centred: bool, bias: bool) -> tuple[Tensor, Tensor, float, float]:
        """Change of the kernels `(groups, inputs, outputs)` and biases, and the relative error before and after."""
        self._finish()
        both = self._both()
        problem = both.problem(centred, self._features)
        shift = problem.shift(ridge)
        _gram, _cross, x, r, _t, r2, _t2 = both.sums
        offset = (r - (x[:, :, None] * shift).sum(1)) / both.count if bias else torch.zeros_like(r)
        size = both.size(centred and not bias)
        before, after = float(r2.sum()) if bias else problem.left, problem.error(shift)
        shift = shift if self._basis is None else self._basis @ shift
        return shift, offset, _root(before, size), _root(after, size)

    def _finish(self) -> None:
        """Find the coordinates of few rows, and add them up."""
        if self._few is None:
            return
        halves, self._few = self._few, None
        self._basis, triangle = torch.linalg.qr(torch.cat([x for half in halves for x, _, _ in half], 1).mT)
        start = 0
        for second, half in enumerate(halves):
            for x, residual, wanted in half:
                self.add(triangle.mT[:, start : start + x.shape[1]], residual, wanted, second=bool(second))
                start += x.shape[1]

    def _both(self) -> _Totals:
        """The totals over all examples."""
        one, other = self._halves
        if not other.count or not one.count:
            return one if one.count else other
        both = _Totals()
        both.count = one.count + other.count
        both.sums = [a + b for a, b in zip(one.sums, other.sums, strict=True)]
        return both


class _Totals:
    """What `Equations` adds up over one half of the examples."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[Tensor] = []

    def add(self, x: Tensor, r: Tensor, t: Tensor) -> None:
        """Add some rows."""
        squares = (torch.linalg.vector_norm(v, dim=1).square() for v in (r, t))
        new = [x.mT @ x, x.mT @ r, x.sum(1), r.sum(1), t.sum(1), *squares]
        self.sums = [old.add_(value) for old, value in zip(self.sums, new, strict=True)] if self.sums else new
        self.count += x.shape[1]

    def problem(self, centred: bool, features: int) -> Problem:
        """The least-squares problem, of the centred inputs where means are free."""
        gram, cross, x, r, _t, r2, _t2 = self.sums
        if not centred:
            return Problem(gram, cross, float(r2.sum()), features)
        n = self.count
        return Problem(
            gram - x[:, :, None] * x[:, None, :] / n,
            cross - x[:, :, None] * r[:, None, :] / n,
            float((r2 - r.square() / n).sum()),
            features,
        )

    def size(self, centred: bool) -> float:
        """Sum of squares of what is wanted, from its mean where that is free."""
        *_, t, _r2, t2 = self.sums
        return float((t2 - t.square() / self.count).sum()) if centred else float(t2.sum())


@dataclass(frozen=True, slots=True)
class Problem:
    """min ‖R - X Δ‖²: XᵀX, XᵀR, ‖R‖², and the number of inputs before X was replaced by coordinates."""

    gram: Tensor
    cross: Tensor
    left: float
    features: int

    def shift(self, ridge: float) -> Tensor:
        """Δ for a ridge; nothing for an infinite one."""
        if ridge == inf:
            return torch.zeros_like(self.cross)
        return torch.cholesky_solve(self.cross, torch.linalg.cholesky(ridged(self.gram, ridge, self.features)))

    def error(self, shift: Tensor) -> float:
        """‖R - X Δ‖² for any Δ."""
        return self.left - float(2 * (shift * self.cross).sum() - (shift * (self.gram @ shift)).sum())


def best_ridge(problems: Sequence[Problem]) -> float:
    """The ridge of `RIDGES` whose kernels, solved on one half of the examples, leave the least error on the other.

    They are tried from the strongest on, until one is worse than the one before. With one half alone there is nothing
    to judge by, and the kernels stay as they are.
    """
    best, least = inf, sum(problem.left for problem in problems)
    if len(problems) < 2:
        return best
    for ridge in RIDGES[1:]:
        error = sum(other.error(one.shift(ridge)) for one, other in (problems, problems[::-1]))
        if error >= least:
            break
        best, least = ridge, error
    return best


def ridged(gram: Tensor, ridge: float, features: int) -> Tensor:
    """XᵀX of every group with `ridge` times the mean square of its `features` inputs added to the diagonal."""
    scale = gram.diagonal(dim1=1, dim2=2).sum(1) / features
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # inputs that are never on: nothing to solve
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    return gram + (ridge * scale)[:, None, None] * eye


def exact(tensor: Tensor) -> Tensor:
    """The values in float64."""
    device = torch.device("cpu") if tensor.device.type == "mps" else tensor.device  # which has no float64
    return tensor.detach().to(device, torch.float64)


def _root(error: float, size: float) -> float:
    return (max(error, 0.0) / size) ** 0.5 if size > 0 else 0.0
