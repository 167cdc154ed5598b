"""Running somebody's model for a test: with values that show mistakes, and everything given back.

Freshly initialised networks hide wrong cuts: where a batch norm's scale is 0 or a layer scale is
1e-6 nobody sees what happens behind it, and where all entries are equal nobody sees their order.
`borrowed` puts generic values there for as long as a test takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .modes import call, undisturbed
from .structure import named_tensors

TINY = 1e-3
"""Parameters below this hide what they scale: float32 outputs agree to 1e-4 whatever lies behind them."""


@contextmanager
def borrowed(model: nn.Module, *, dtype: torch.dtype | None = None, generic: bool = False) -> Iterator[None]:
    """Put a model into eval mode, without gradients, for the length of a `with` block.

    On leaving, every tensor has its old data, every gradient is back, and caches that modules keep in
    attributes are as they were.

    **Arguments:**

    - `dtype`: if given, all floating-point parameters and buffers have this type inside.
    - `generic`: if true, constant and tiny parameters get seeded random values inside.

    >>> net = nn.BatchNorm2d(4)
    >>> with borrowed(net, dtype=torch.float64, generic=True):
    ...     net.weight.dtype, bool(net.weight.std() > 0)
    (torch.float64, True)
    >>> net.weight.tolist(), net.weight.dtype, net.training
    ([1.0, 1.0, 1.0, 1.0], torch.float32, True)
    """
    tensors = {id(tensor): (name, tensor) for name, tensor in named_tensors(model)}
    before = [(tensor, tensor.data, tensor.grad if tensor.is_leaf else None) for _, tensor in tensors.values()]
    generator = torch.Generator().manual_seed(0)
    with undisturbed(model):
        try:
            for name, tensor in tensors.values():
                if tensor.is_leaf:
                    tensor.grad = None
                if tensor.is_floating_point():
                    data = _generic(name, tensor, generator) if generic else tensor.data
                    tensor.data = data if dtype is None else data.to(dtype)
            yield
        finally:
            for tensor, data, grad in before:
                if tensor.is_leaf:
                    tensor.grad = None
                tensor.data = data
                if grad is not None:
                    tensor.grad = grad


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """All tensors in what the model returns, whatever it returns them in, without touching random state.

    >>> [tuple(value.shape) for value in outputs(nn.Linear(2, 3), torch.zeros(1, 2))]
    [(1, 3)]
    """
    devices: list[int] = []
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        devices = sorted({tensor.device.index for _, tensor in named_tensors(model) if tensor.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.inference_mode():
        # Not torch.manual_seed, which would seed every device there is.
        for generator in (torch.default_generator, *(torch.cuda.default_generators[index] for index in devices)):
            generator.manual_seed(0)
        return list(leaves(call(model, inputs)))


def leaves(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """The tensors inside tuples, lists, mappings, dataclasses and plain objects.

    >>> list(leaves({"a": [torch.tensor(1)], "b": None}))
    [tensor(1)]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from leaves(item, depth)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from leaves(item, depth)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for entry in dataclasses.fields(value):
            yield from leaves(getattr(value, entry.name), depth + 1)
    elif hasattr(value, "__dict__") and not isinstance(value, type | nn.Module) and depth < 3:
        for item in vars(value).values():
            yield from leaves(item, depth + 1)


def difference(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    """Largest max|a - b| / max|a| over the outputs; infinite where shapes or non-finite places differ.

    >>> difference([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.5])])
    0.25
    """
    if len(expected) != len(actual):
        return float("inf")
    return max((_relative(a, b) for a, b in zip(expected, actual, strict=True)), default=0.0)


def _relative(expected: Tensor, actual: Tensor) -> float:
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(expected, actual) else 1.0
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(actual)):
        return float("inf")
    exact = torch.complex128 if expected.is_complex() else torch.float64
    expected, actual = (value[finite].cpu().to(exact) for value in (expected, actual))
    if expected.numel() == 0:
        return 0.0
    scale = float(expected.abs().max())
    return float((expected - actual).abs().max()) / (scale or 1.0)


def telling(inputs: Any, dtype: torch.dtype | None = None) -> Any:
    """Example inputs that can tell networks apart: constant floating-point tensors become seeded noise.

    >>> telling((torch.ones(2, 2), 3))[0].std() > 0
    tensor(True)
    """
    generator = torch.Generator().manual_seed(1)

    def turn(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        constant = value.numel() > 1 and bool(value.min() == value.max())
        if constant:
            value = torch.randn(value.shape, generator=generator).to(value)
        return value.detach() if dtype is None else value.detach().to(dtype)

    return tree_map(turn, inputs)


def _generic(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """The tensor's data, or random data where it is constant or tiny."""
    data = tensor.data
    kind = name.rpartition(".")[2]
    if data.numel() == 0 or not (isinstance(tensor, nn.Parameter) or kind in ("running_mean", "running_var")):
        return data
    vector = data.numel() == max(data.shape, default=1)
    first, last = data[(0,) * data.dim()], data[(-1,) * data.dim()]
    if bool(first != last) and not (vector and abs(float(first)) < TINY):
        return data  # neither constant nor tiny, and that without a look at all of it
    low, high = (float(bound) for bound in torch.aminmax(data))
    constant, size = low == high and data.numel() > 1, max(abs(low), abs(high))

    def uniform(start: float, end: float) -> Tensor:
        return torch.empty(data.shape).uniform_(start, end, generator=generator).to(data)

    if vector and size < TINY and kind != "running_var":
        return uniform(0.1, 0.5)
    if constant and size >= TINY:
        return data * uniform(0.75, 1.25)
    if constant and not vector:
        inputs = data[0].numel()
        noise: Tensor = torch.randn(data.shape, generator=generator) / inputs**0.5
        return noise.to(data)
    return data
