"""The least-squares problem of one layer: its inputs, its Gram matrix, its solution."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .calibration import is_tracked, run

_ELEMENTS = 2**23
"""Unfolded inputs are taken in pieces of at most so many float64 elements (64 MiB)."""


RIDGES = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 10.0, inf)
"""Ridges that `Sums.best_ridge` tries; the last leaves the kernels as they are."""


class Sums:
    """Normal equations of one layer, added up in float64: X inputs, R = wanted - output, for every group.

    Every second example counts for one half, the others for the other, so that a ridge found on one can be judged on
    the other.
    """

    def __init__(self) -> None:
        self.halves = (_Totals(), _Totals())
        self._examples = 0

    def add(self, module: nn.Module, groups: int, data: Tensor, output: Tensor, wanted: Tensor) -> None:
        """Add one batch."""
        batched = data.dim() > (1 if isinstance(module, nn.Linear) else spatial(module) + 1)
        examples = len(data) if batched else 1
        step = min(2, examples)
        for start in range(step):
            half = self.halves[(self._examples + start) % 2]
            half.add(module, groups, *(value[start::step] for value in (data, output, wanted)))
        self._examples += examples

    def best_ridge(self, *, centred: bool) -> float:
        """The ridge of `RIDGES` whose kernels, solved on one half, leave the least error on the other.

        The smallest where there is one example only, and so nothing to judge by.
        """
        problems = [half.problem(centred) for half in self.halves if half.count]
        if len(problems) < 2:
            return RIDGES[0]

        def error(ridge: float) -> float:
            return sum(other.error(one.shift(ridge)) for one, other in (problems, problems[::-1]))

        return min(RIDGES, key=error)

    def solve(self, ridge: float, *, centred: bool, bias: Tensor | None) -> tuple[Tensor, Tensor, float, float]:
        """Change of the kernels `(groups, inputs, outputs)` and biases, and the relative error before and after."""
        both = self._both()
        _gram, _cross, x, r, r2, t, t2 = both.totals
        n, problem = both.count, both.problem(centred)
        shift = problem.shift(ridge)
        offset = torch.zeros_like(r) if bias is None else (r - (x[:, :, None] * shift).sum(1)) / n
        size = float((t2 - t.square() / n).sum()) if centred and bias is None else float(t2.sum())
        before = problem.left if bias is None else float(r2.sum())
        return shift, offset, _root(before, size), _root(problem.error(shift), size)

    def moments(self, kernels: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance of the outputs that the kernels give."""
        both = self._both()
        gram, x, n = both.totals[0], both.totals[2], both.count
        mean = (x[:, :, None] * kernels).sum(1) / n
        square = (kernels * (gram @ kernels)).sum(1)
        var = (square - n * mean.square()).clamp_min(0) / max(n - 1, 1)
        return mean.flatten() + (0 if bias is None else bias), var.flatten()

    def _both(self) -> _Totals:
        """The totals over all examples."""
        one, other = self.halves
        if not other.count or not one.count:
            return one if one.count else other
        both = _Totals()
        both.count = one.count + other.count
        both.totals = [a + b for a, b in zip(one.totals, other.totals, strict=True)]
        return both


class _Totals:
    """What `Sums` adds up over one half of the examples."""

    def __init__(self) -> None:
        self.count = 0
        self.totals: list[Tensor] = []

    def add(self, module: nn.Module, groups: int, data: Tensor, output: Tensor, wanted: Tensor) -> None:
        """Add some examples."""
        for x, y, t in rows(module, groups, exact(data), output, wanted):
            r = t - y
            new = [x.mT @ x, x.mT @ r, *(v.sum(1) for v in (x, r, r.square(), t, t.square()))]
            self.totals = [old + value for old, value in zip(self.totals, new, strict=True)] if self.totals else new
            self.count += x.shape[1]

    def problem(self, centred: bool) -> _Problem:
        """The least-squares problem, of the centred inputs where means are free."""
        gram, cross, x, r, r2, _t, _t2 = self.totals
        if not centred:
            return _Problem(gram, cross, float(r2.sum()))
        n = self.count
        return _Problem(
            gram - x[:, :, None] * x[:, None, :] / n,
            cross - x[:, :, None] * r[:, None, :] / n,
            float((r2 - r.square() / n).sum()),
        )


@dataclass(frozen=True, slots=True)
class _Problem:
    """min ‖R - X Δ‖²: XᵀX, XᵀR and ‖R‖²."""

    gram: Tensor
    cross: Tensor
    left: float

    def shift(self, ridge: float) -> Tensor:
        """Δ for a ridge; nothing for an infinite one."""
        if ridge == inf:
            return torch.zeros_like(self.cross)
        return torch.cholesky_solve(self.cross, torch.linalg.cholesky(ridged(self.gram, ridge)))

    def error(self, shift: Tensor) -> float:
        """‖R - X Δ‖² for any Δ."""
        return self.left - float(2 * (shift * self.cross).sum() - (shift * (self.gram @ shift)).sum())


def rows(module: Any, groups: int, data: Tensor, *outputs: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Unfolded inputs, and tensors of the outputs' shape, piece by piece, as `(groups, positions, features)`."""
    if isinstance(module, nn.Linear):
        flat = [value.reshape(1, -1, value.shape[-1]) for value in (data, *outputs)]
        step = max(1, _ELEMENTS // flat[0].shape[-1])
        for start in range(0, flat[0].shape[1], step):
            yield tuple(value[:, start : start + step] for value in flat)
        return
    if data.dim() == spatial(module) + 1:  # no batch axis
        data, outputs = data[None], tuple(value[None] for value in outputs)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    data = functional.pad(data, module._reversed_padding_repeated_twice, mode=mode)
    sizes = [tuple(size) for size in (module.kernel_size, module.dilation, module.stride)]
    if spatial(module) == 1:
        data, sizes = data[:, :, None], [(1, *size) for size in sizes]
    kernel, dilation, stride = sizes
    space = zip(data.shape[2:], kernel, dilation, stride, strict=True)
    positions = prod((size - d * (k - 1) - 1) // s + 1 for size, k, d, s in space)
    step = max(1, _ELEMENTS // max(1, positions * module.weight[0].numel() * groups))
    for start in range(0, len(data), step):
        columns = functional.unfold(data[start : start + step], kernel, dilation, stride=stride)
        yield tuple(
            value.reshape(len(value), groups, -1, positions).permute(1, 0, 3, 2).flatten(1, 2)
            for value in (columns, *(value[start : start + step] for value in outputs))
        )


def ridged(gram: Tensor, ridge: float) -> Tensor:
    """XᵀX of every group with `ridge` times its mean diagonal added to the diagonal."""
    scale = gram.diagonal(dim1=1, dim2=2).mean(1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # inputs that are never on: nothing to solve
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    return gram + (ridge * scale)[:, None, None] * eye


def spatial(module: nn.Module) -> int:
    """Number of a convolution's spatial axes."""
    return 1 if isinstance(module, nn.Conv1d) else 2


def exact(tensor: Tensor) -> Tensor:
    """The values in float64."""
    device = torch.device("cpu") if tensor.device.type == "mps" else tensor.device  # which has no float64
    return tensor.detach().to(device, torch.float64)


def _root(error: float, size: float) -> float:
    return (max(error, 0.0) / size) ** 0.5 if size > 0 else 0.0


class Inputs:
    """The inputs X of one layer over all images: XᵀX and their sums, in float64, for every group.

    `centred` says whether the layer's mean output is free, because it has a bias or a batch norm takes it away.
    """

    def __init__(self) -> None:
        self.count = 0
        self.centred = False
        self._products: Tensor | None = None
        self._sums: Tensor | None = None

    def add(self, module: nn.Module, data: Tensor) -> None:
        """Add one batch."""
        for (x,) in rows(module, getattr(module, "groups", 1), exact(data)):
            new = (x.mT @ x, x.sum(1))
            self._products = new[0] if self._products is None else self._products.add_(new[0])
            self._sums = new[1] if self._sums is None else self._sums.add_(new[1])
            self.count += x.shape[1]

    def gram(self) -> Tensor:
        """XᵀX, of the centred inputs where means are free: shape `(groups, inputs, inputs)`."""
        assert self._products is not None
        assert self._sums is not None
        if not self.centred:
            return self._products.clone()
        return self._products - self._sums[:, :, None] * self._sums[:, None, :] / self.count

    def kernels(self, module: Any) -> Tensor:
        """The layer's kernels as a matrix for each group: shape `(groups, inputs, outputs)`."""
        groups = getattr(module, "groups", 1)
        return exact(module.weight).reshape(groups, module.weight.shape[0] // groups, -1).mT.contiguous()


@contextmanager
def observed(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Inputs]]:
    """While this is open, add up what the modules read when the model runs; those that don't run are not there."""
    found: dict[str, Inputs] = {}
    made: dict[str, Any] = {}

    def reader(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
            inputs = found.setdefault(name, Inputs())
            inputs.centred |= module.bias is not None
            inputs.add(module, args[0] if args else kwargs["input"])
            made[name] = weakref.ref(output)

        return hook

    def norm(_module: nn.Module, args: Any) -> None:
        for name, output in made.items():
            found[name].centred |= bool(args) and args[0] is output()

    handles = [module.register_forward_hook(reader(name), with_kwargs=True) for name, module in modules.items()]
    handles += [module.register_forward_pre_hook(norm) for module in model.modules() if is_tracked(module)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def unsolvable(module: nn.Module, leaf: str, model: nn.Module) -> str | None:
    """Why a layer can't be solved, or None."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Linear)
    if not any(type(module).forward is kind.forward for kind in kinds):
        return f"{type(module).__name__} is no plain convolution or linear layer"
    if leaf != "weight" or "weight" not in module._parameters:
        return "its weight is computed from others"
    names = [name for name, value in model.named_parameters(remove_duplicate=False) if value is module.weight]
    return f"its weight is shared: {', '.join(names)}" if len(names) > 1 else None


def watched(model: nn.Module, modules: Mapping[str, nn.Module], inputs: Any) -> tuple[list[str], dict[str, nn.Module]]:
    """The layers' names in the order in which they run, and the batch norms that read their outputs directly."""
    calls: list[str] = []
    norms: dict[str, nn.Module] = {}
    made: list[tuple[str, Any]] = []

    def layer(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            calls.append(name)
            made.append((name, output))

        return hook

    def norm(module: nn.Module, args: Any) -> None:
        norms.update({name: module for name, output in made if args and args[0] is output})

    handles = [module.register_forward_hook(layer(name)) for name, module in modules.items()]
    found = [module for module in model.modules() if is_tracked(module)]
    handles += [module.register_forward_pre_hook(norm) for module in found]
    try:
        run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls, norms
