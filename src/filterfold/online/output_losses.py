"""How a student's outputs are compared with the teacher's, whatever they come in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ConfigError, ModelError

Kind = Literal["kl", "binary", "mse"]
"""How two tensors of outputs are compared; see `Distillation`."""

OutputLoss = Kind | Callable[[Any, Any], Tensor]
"""A built-in loss, or a function of the student's and the teacher's output that returns a scalar."""


def compared(loss: Any, student: Any, teacher: Any, temperature: float, where: str = "") -> Tensor:
    """How far the student's outputs are from the teacher's: a scalar.

    **Arguments:**

    - `loss`: the `losses` of `Distillation`.
    - `temperature`: T.
    - `where`: the place of these outputs among all, for messages.

    **Raises:** `ModelError` naming an output that is missing, of another shape, or that the loss can't compare.

    ```python
    >>> compared({"b": "mse"}, {"b": torch.ones(2)}, {"b": torch.zeros(2)}, 1.0)
    tensor(1.)

    ```
    """
    if isinstance(loss, Mapping):
        parts = [
            compared(
                part,
                _pick(student, key, where, "student"),
                _pick(teacher, key, where, "teacher"),
                temperature,
                f"{where}[{key!r}]",
            )
            for key, part in loss.items()
        ]
        return torch.stack(parts).sum()
    if callable(loss):
        value = loss(student, teacher)
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise ModelError(f"losses: the function for output{where} must return a scalar tensor")
        return value
    pairs = _pairs(student, teacher, where)
    if loss is None and (not isinstance(student, Tensor) or student.dim() < 2 or student.shape[1] < 2):
        found = ", ".join(f"output{place} {tuple(one.shape)}" for place, one, _ in pairs) or "no tensors"
        raise ModelError(
            f"the network returns {found}: not one tensor of class scores (b, classes, ...). Say how to compare it:"
            ' losses="mse", "kl" or "binary", a function, or one for each output as in losses={"logits": "kl"}'
        )
    if not pairs:
        raise ModelError(f"output{where} has no floating-point tensor to compare")
    values = [_between(loss or "kl", wide(one), wide(other), temperature, place) for place, one, other in pairs]
    return torch.stack(values).mean()


def _between(kind: Kind, student: Tensor, teacher: Tensor, heat: float, where: str) -> Tensor:
    """One tensor's loss."""
    if kind == "mse":
        return functional.mse_loss(student, teacher)
    if kind == "binary":
        share = (teacher / heat).sigmoid()
        least = functional.binary_cross_entropy_with_logits(teacher / heat, share)
        return heat**2 * (functional.binary_cross_entropy_with_logits(student / heat, share) - least)
    if student.dim() < 2 or student.shape[1] < 2:
        raise ModelError(
            f"output{where} {tuple(student.shape)} has no two classes along axis 1: compare by another loss"
        )
    wanted, said = (functional.log_softmax(logits / heat, dim=1) for logits in (teacher, student))
    total = functional.kl_div(said, wanted, reduction="sum", log_target=True)
    return heat**2 * total / (student.numel() // student.shape[1])


def wide(value: Tensor) -> Tensor:
    """At least float32, so that losses keep their digits under autocast."""
    return value if value.dtype == torch.float64 else value.float()


def check_losses(losses: Any, where: str = "losses") -> None:
    """Raise `ConfigError` if this is no way to compare outputs."""
    if isinstance(losses, Mapping):
        if not losses:
            raise ConfigError(f"{where}: an empty mapping compares nothing")
        for key, part in losses.items():
            check_losses(part, f"{where}[{key!r}]")
    elif (losses is not None or where != "losses") and losses not in ("kl", "binary", "mse") and not callable(losses):
        raise ConfigError(f"{where}={losses!r}: must be 'kl', 'binary', 'mse', a function or a mapping of these")


def _pick(output: Any, key: Any, where: str, whose: str) -> Any:
    """One of several outputs, by key, index or attribute."""
    try:
        return getattr(output, key) if isinstance(key, str) and not isinstance(output, Mapping) else output[key]
    except (AttributeError, KeyError, IndexError, TypeError):
        there = [place for place, _ in _named(output, where)]
        raise ModelError(
            f"losses: the {whose}'s output{where} has no {key!r}; it has {', '.join(there) or 'no tensors'}"
        ) from None


def _named(value: Any, where: str) -> Iterator[tuple[str, Tensor]]:
    """Where each floating-point tensor stands in tuples, lists, mappings and dataclasses, and the tensor."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield where, value
        return
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    for key, item in items:
        yield from _named(item, f"{where}[{key!r}]")


def _pairs(student: Any, teacher: Any, where: str) -> list[tuple[str, Tensor, Tensor]]:
    """The floating-point tensors of two outputs side by side; refuses outputs that differ in structure or shape."""
    ours, theirs = dict(_named(student, where)), dict(_named(teacher, where))
    for place in [*ours, *theirs]:
        if place not in ours or place not in theirs:
            raise ModelError(
                f"only the {'student' if place in ours else 'teacher'} returns output{place}: if a module returns"
                " something else in eval mode, the teacher's, name it in in_training; or pick outputs by losses={...}"
            )
        if ours[place].shape != theirs[place].shape:
            raise ModelError(
                f"output{place} has shape {tuple(ours[place].shape)} in the student, {tuple(theirs[place].shape)} in"
                " the teacher: was the head replaced after the copy was made?"
            )
    return [(place, ours[place], theirs[place]) for place in ours]
