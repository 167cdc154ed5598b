"""Inputs and outputs of a model: calling it, taking single examples, making noise, comparing outputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from ..errors import ConfigError, ModelError
from .model_state import buffers_preserved, random_state_preserved, random_states
from .modules import leaves
from .same_choices import SteadyDraws


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: a tuple is spread over the former, a mapping over the latter.

    >>> arguments((1, 2)), arguments({"a": 1}), arguments([1, 2])
    (((1, 2), {}), ((), {'a': 1}), (([1, 2],), {}))
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def check_inputs(inputs: Any, *, with_data: bool = False) -> None:
    """Refuse example inputs with which nothing can be compared; `with_data`: those on the meta device, too.

    >>> try: check_inputs(torch.tensor([float("nan")]))
    ... except ConfigError as error: print(error)
    example_inputs: NaN or infinity among the values, with which no output can be compared
    """
    if batch_of(inputs) == 0:
        raise ConfigError("example_inputs: an empty batch; give one example at least")
    for tensor in leaves(inputs):
        if tensor.is_meta and with_data:
            raise ConfigError("example_inputs lie on the meta device, where nothing is computed")
        if tensor.is_floating_point() and not tensor.is_meta and bool((tensor.isnan() | tensor.isposinf()).any()):
            raise ConfigError("example_inputs: NaN or infinity among the values, with which no output can be compared")


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model on a copy of example inputs: they are the caller's, whatever the model does with its own.

    >>> call(nn.Identity(), (3,))
    3
    """
    return call_as_is(model, copied(inputs))


def call_as_is(model: nn.Module, inputs: Any) -> Any:
    """Call a model on the inputs themselves, where a copy would cost time that is measured."""
    positional, keywords = arguments(inputs)
    try:
        if isinstance(model, fx.GraphModule):  # whose own way of being called prints a traceback where it fails
            return nn.Module.__call__(model, *positional, **keywords)
        return model(*positional, **keywords)
    except SystemExit as error:  # else the process would end, and with 0 as if all were well
        raise ModelError(f"{type(model).__name__} ends the process in its forward (SystemExit {error.code})") from error


def copied(inputs: Any) -> Any:
    """Example inputs that a model may consume or write to: tensors, containers and objects are copies.

    >>> inputs = {"x": [torch.zeros(1)]}
    >>> copied(inputs)["x"].pop().add_(1), inputs
    (tensor([1.]), {'x': [tensor([0.])]})
    """
    with _disable_current_modes():  # a copy is no operation of the model
        memo: dict[int, Any] = {id(tensor): tensor.clone() for tensor in leaves(inputs)}

    def turn(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return value
        if type(value) in (list, set):
            return type(value)(map(turn, value))
        if type(value) is dict:
            return {key: turn(item) for key, item in value.items()}
        if isinstance(value, tuple):
            items = list(map(turn, value))
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        try:
            return copy.deepcopy(value, memo)
        except Exception:  # a generator, a lock: what can't be copied is given as it is
            return value

    return turn(inputs)


def examples(inputs: Any, count: int = 1) -> Any:
    """The first example of a batch, repeated; the batch is the first axis of the first tensor.

    Tensors whose first axis has another length, and what is no tensor, are left as they are.

    >>> import torch
    >>> examples((torch.zeros(4, 3), {"x": torch.zeros(4), "y": torch.ones(2)}, "name"), 5)[1]["x"].shape
    torch.Size([5])
    """
    batch = batch_of(inputs)

    def turn(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.dim() == 0 or value.shape[0] != batch:
                return value
            return value[:1] if count == 1 else value[:1].repeat(count, *[1] * (value.dim() - 1))
        if type(value) in (tuple, list):
            return type(value)(map(turn, value))
        return {key: turn(item) for key, item in value.items()} if isinstance(value, Mapping) else value

    return inputs if batch is None else turn(inputs)


def batch_of(inputs: Any) -> int | None:
    """How many examples the inputs are: the length of the first axis of the first tensor; None without one.

    A list of tensors with three axes holds images of any size, as detectors take them, and no batch.

    >>> import torch
    >>> batch_of({"x": torch.zeros(4, 3)}), batch_of([torch.zeros(3, 8, 8)])
    (4, None)
    """
    if isinstance(inputs, Tensor):
        return inputs.shape[0] if inputs.dim() > 0 else None
    items = list(inputs.values()) if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple | list) else ()
    if isinstance(items, list) and all(isinstance(item, Tensor) and item.dim() == 3 for item in items):
        return None
    return next((found for found in map(batch_of, items) if found is not None), None)


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """All tensors in what the model returns, whatever it returns them in, without touching random state.

    A model that draws random numbers is run again with steady ones (`SteadyDraws`), so that it can be compared.

    >>> [tuple(value.shape) for value in outputs(nn.Linear(2, 3), torch.zeros(1, 2))]
    [(1, 3)]
    """
    with random_state_preserved(model, seed=0), torch.inference_mode():
        before = random_states(model)
        with buffers_preserved(model):
            found = call(model, inputs)
        if all(map(torch.equal, before, random_states(model))):
            return list(leaves(found))
        with buffers_preserved(model), SteadyDraws():
            return list(leaves(call(model, inputs)))


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


def difference(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    """Largest max|a - b| / max|a| over the outputs; infinite where shapes, types or non-finite places differ.

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
