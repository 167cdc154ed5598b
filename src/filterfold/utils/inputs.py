"""Inputs and outputs of any shape: calling a model with them, making them larger, finding the tensors in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .modules import named_tensors


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model on example inputs: a tuple is spread over the arguments, a mapping over the keywords.

    >>> call(nn.Identity(), (3,))
    3
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(inputs)


def examples(inputs: Any, count: int = 1) -> Any:
    """The first example of a batch, repeated; the batch is the first axis of the first tensor.

    Tensors whose first axis has another length, and what is no tensor, are left as they are.

    >>> import torch
    >>> examples((torch.zeros(4, 3), torch.ones(2), "name"), 5)[0].shape
    torch.Size([5, 3])
    """
    values, batch = _values(inputs), batch_of(inputs)

    def repeated(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != batch:
            return value
        return value[:1] if count == 1 else value[:1].repeat(count, *[1] * (value.dim() - 1))

    values = [repeated(value) for value in values]
    if isinstance(inputs, Mapping):
        return dict(zip(inputs, values, strict=True))
    return tuple(values) if isinstance(inputs, tuple) else values[0]


def batch_of(inputs: Any) -> int | None:
    """How many examples the inputs are: the length of the first axis of the first tensor; None without one."""
    return next((value.shape[0] for value in _values(inputs) if isinstance(value, Tensor) and value.dim() > 0), None)


def _values(inputs: Any) -> list[Any]:
    if isinstance(inputs, Mapping):
        return list(inputs.values())
    return list(inputs) if isinstance(inputs, tuple) else [inputs]


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


def informative_inputs(inputs: Any, dtype: torch.dtype | None = None) -> Any:
    """Example inputs that can tell networks apart: constant floating-point tensors become seeded noise.

    >>> informative_inputs((torch.ones(2, 2), 3))[0].std() > 0
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
