"""Layers that read cut channels: which can be solved, and what they are given to read."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .calibration import run
from .equations import exact, rows
from .norms import is_tracked


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
