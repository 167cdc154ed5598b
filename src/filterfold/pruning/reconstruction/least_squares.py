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
        return [half.problem(centred, self._features, self._basis) for half in self._halves if half.count]

    def problem(self, *, centred: bool) -> Problem:
        """The problem of all examples."""
        self._finish()
        return self._both().problem(centred, self._features, self._basis)

    def offset(self, shift: Tensor) -> Tensor:
        """Change of the biases, `(groups, outputs)`, that goes with a change of the kernels, in coordinates."""
        both = self._both()
        _gram, _cross, x, r, *_ = both.sums
        return (r - (x[:, :, None] * shift).sum(1)) / both.count

    def errors(self, shift: Tensor, *, centred: bool, bias: bool) -> tuple[float, float]:
        """The relative error before and after a change of the kernels, in coordinates, and of the biases."""
        problem, both = self.problem(centred=centred), self._both()
        size = both.size(centred and not bias)
        before = float(both.sums[5].sum()) if bias else problem.left
        return _root(before, size), _root(problem.error(shift), size)

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

    def problem(self, centred: bool, features: int, basis: Tensor | None) -> Problem:
        """The least-squares problem, of the centred inputs where means are free."""
        gram, cross, x, r, _t, r2, _t2 = self.sums
        if not centred:
            return Problem(gram, cross, float(r2.sum()), features, basis)
        n = self.count
        return Problem(
            gram - x[:, :, None] * x[:, None, :] / n,
            cross - x[:, :, None] * r[:, None, :] / n,
            float((r2 - r.square() / n).sum()),
            features,
            basis,
        )

    def size(self, centred: bool) -> float:
        """Sum of squares of what is wanted, from its mean where that is free."""
        *_, t, _r2, t2 = self.sums
        return float((t2 - t.square() / self.count).sum()) if centred else float(t2.sum())


@dataclass(frozen=True, slots=True)
class Problem:
    """min ‖R - X Δ‖²: XᵀX, XᵀR, ‖R‖², the number of inputs, and the basis where X was replaced by coordinates in it."""

    gram: Tensor
    cross: Tensor
    left: float
    features: int
    basis: Tensor | None = None

    def shift(self, ridge: float) -> Tensor:
        """Δ for a ridge, in coordinates; nothing for an infinite one."""
        if ridge == inf:
            return torch.zeros_like(self.cross)
        return torch.cholesky_solve(self.cross, torch.linalg.cholesky(ridged(self.gram, ridge, self.features)))

    def coordinates(self, kernels: Tensor) -> Tensor:
        """Kernels of shape `(groups, inputs, outputs)` in coordinates."""
        return kernels if self.basis is None else self.basis.mT @ kernels

    def whole(self, shift: Tensor) -> Tensor:
        """A change of the kernels, given in coordinates, in the shape `(groups, inputs, outputs)`."""
        return shift if self.basis is None else self.basis @ shift

    def error(self, shift: Tensor) -> float:
        """‖R - X Δ‖² for any Δ, in coordinates."""
        return self.left - float(2 * (shift * self.cross).sum() - (shift * (self.gram @ shift)).sum())

    def loss(self, kernels: Tensor, ridge: float) -> Tensor:
        """‖R - X Δ‖² + λ ‖Δ‖² as a share of ‖R‖², up to a constant, for Δ of shape `(groups, inputs, outputs)`."""
        shift = self.coordinates(kernels)
        bend = (shift * (self.gram @ shift - 2 * self.cross)).sum()
        pull = ridge * (mean_square(self.gram, self.features) * kernels.square().sum((1, 2))).sum()
        return (bend + pull) / (self.left or 1.0)

    def clone(self) -> Problem:
        """A copy that autograd can read, of one made in inference mode."""
        basis = None if self.basis is None else self.basis.clone()
        return Problem(self.gram.clone(), self.cross.clone(), self.left, self.features, basis)


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
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    return gram + (ridge * mean_square(gram, features))[:, None, None] * eye


def mean_square(gram: Tensor, features: int) -> Tensor:
    """Sum over the rows of the inputs' squares, in the mean over the inputs: shape `(groups,)`."""
    scale = gram.diagonal(dim1=1, dim2=2).sum(1) / features
    return torch.where(scale > 0, scale, torch.ones_like(scale))  # inputs that are never on: nothing to solve


def exact(tensor: Tensor) -> Tensor:
    """The values in float64."""
    device = torch.device("cpu") if tensor.device.type == "mps" else tensor.device  # which has no float64
    return tensor.detach().to(device, torch.float64)


def _root(error: float, size: float) -> float:
    return (max(error, 0.0) / size) ** 0.5 if size > 0 else 0.0
