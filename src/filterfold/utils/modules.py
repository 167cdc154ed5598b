"""Finding tensors: in models, inside their wrappers, and in nested values; and their order in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..errors import ModelError

WRAPPERS = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
    "_FabricModule": "_original_module",  # Lightning Fabric
}
"""Class name of a wrapper → where it keeps the user's module."""


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers (persistent or not) under all their names: tied ones come twice.

    The same as PyTorch's `named_parameters` and `named_buffers` without removing duplicates, but faster.
    """
    modules: list[tuple[str, nn.Module]] = []

    def visit(prefix: str, module: nn.Module) -> None:
        modules.append((prefix, module))
        for name, child in module._modules.items():
            if child is not None:
                visit(f"{prefix}{name}.", child)

    visit("", model)
    for kind in ("_parameters", "_buffers"):
        for prefix, module in modules:
            for name, tensor in getattr(module, kind).items():
                if tensor is not None:
                    yield f"{prefix}{name}", tensor


def leaves(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """The tensors inside tuples, lists, sets, mappings, dataclasses and plain objects.

    >>> list(leaves({"a": [torch.tensor(1)], "b": None}))
    [tensor(1)]
    """
    if isinstance(value, Tensor):
        yield value
        return
    items: Iterable[Any] = ()
    if isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, list | tuple | set):
        items = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [getattr(value, entry.name) for entry in dataclasses.fields(value)]
    elif hasattr(value, "__dict__") and not isinstance(value, type | nn.Module) and depth < 8:
        items = vars(value).values()
    for item in items:
        yield from leaves(item, depth + 1)


def memory_order(tensor: Tensor) -> list[int]:
    """The axes of a dense tensor from the outermost in memory to the innermost.

    >>> memory_order(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last))
    [0, 2, 3, 1]
    """
    return sorted(range(tensor.dim()), key=lambda dim: (tensor.stride(dim), tensor.shape[dim]), reverse=True)


def in_memory_order(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """A copy of the tensor with its axes laid out in the given order.

    >>> in_memory_order(torch.zeros(2, 3), [1, 0]).stride()
    (1, 2)
    """
    # clone, since contiguous() leaves the strides of axes of size 1 alone and kernels dispatch on them
    ordered = tensor.permute(tuple(order)).clone(memory_format=torch.contiguous_format)
    return ordered.permute(sorted(range(len(order)), key=order.__getitem__))


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside torch.compile, DDP, AveragedModel and Lightning Fabric wrappers.

    >>> inner = nn.Linear(2, 2)
    >>> unwrap(torch.optim.swa_utils.AveragedModel(inner))
    Linear(in_features=2, out_features=2, bias=True)
    """
    while type(model).__name__ in WRAPPERS:
        model = getattr(model, WRAPPERS[type(model).__name__])
    return model


def refuse_script(model: nn.Module) -> None:
    """**Raises:** `ModelError` for a network that TorchScript has compiled, whole or in part: its sizes are fixed."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(f"{name or 'the network'} is compiled by TorchScript: use the network it was made from")


def classifier(model: nn.Module, classes: int | None = None) -> str | None:
    """The name of the last linear layer or convolution, of those with so many outputs; None if there is none.

    >>> classifier(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 10), nn.ReLU()), 10)
    '2'
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | _ConvNd)}
    return next((name for name in reversed(layers) if classes in (None, len(layers[name].weight))), None)


def like(old: Any, new: Any) -> Any:
    """`new` (int or nested tuple) with the sequence types of `old`, so that a list stays a list.

    >>> like([1, (2,)], (3, (4,)))
    [3, (4,)]
    """
    if not isinstance(new, tuple | list):
        return new
    parts = old if isinstance(old, tuple | list) and len(old) == len(new) else [None] * len(new)
    items = [like(part, item) for part, item in zip(parts, new, strict=True)]
    if isinstance(old, list):
        return items
    if isinstance(old, tuple) and hasattr(old, "_fields"):
        return type(old)(*items)
    return type(old)(items) if isinstance(old, tuple) else tuple(items)
