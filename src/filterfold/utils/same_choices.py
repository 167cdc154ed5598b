"""Two networks that must compute the same are made to draw the same random numbers, and to take the same decisions.

A cut network draws other random numbers than the uncut one, for it draws fewer. And where scores tie, a difference of
rounding size decides for another box, another entry of a codebook, and the outputs jump. Neither says that a cut is
wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import Function, OperationMode, signature, tensors_in

Arguments = dict[str, Any]

_DRAW = 0.37
"""What every random number is."""


def _name(func: Function) -> str:
    return func._schema.name.removeprefix("aten::").removesuffix("_")


def _filled(result: Tensor, args: Arguments) -> Tensor:
    if result.is_floating_point():
        mean, std = args.get("mean"), args.get("std")
        centre = mean if isinstance(mean, Tensor) else 0.0
        spread = std if isinstance(std, Tensor) else 1.0
        return result.copy_(torch.as_tensor(centre + spread * _DRAW))
    return result.fill_(args.get("low") or 0)


def _counted(result: Tensor, args: Arguments) -> Tensor:  # noqa: ARG001
    return result.copy_(torch.arange(result.shape[-1], device=result.device).expand_as(result))


_DRAWS: dict[str, Callable[[Any, Arguments], Any]] = {
    **dict.fromkeys(("rand", "randn", "rand_like", "randn_like", "normal", "uniform", "exponential"), _filled),
    **dict.fromkeys(("log_normal", "cauchy", "geometric", "randint", "randint_like", "random"), _filled),
    **dict.fromkeys(("bernoulli",), lambda result, _: result.fill_(1)),
    **dict.fromkeys(("randperm", "multinomial"), _counted),
}


_DROPS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")


class SteadyDraws(OperationMode):
    """Inside, every random number is the same, and dropout drops nothing.

    >>> with torch.inference_mode(), SteadyDraws():
    ...     torch.rand(2), torch.dropout(torch.ones(2), 0.5, True), torch.randperm(3)
    (tensor([0.3700, 0.3700]), tensor([1., 1.]), tensor([0, 1, 2]))
    """

    def rule_for(self, func: Function) -> Any:
        """How to steady a draw; False for what draws nothing."""
        name = _name(func)
        return name in _DROPS or _DRAWS.get(name, False)

    def run(self, func: Function, rule: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the operation, and replace what it drew."""
        if rule is True:
            x = args[0]
            return x if func._schema.name.endswith("_") else x.clone()
        result = func(*args, **kwargs)
        return rule(result, signature(func).bind(args, kwargs)) if rule else result


_PICKS = ("topk", "sort", "max", "min", "median", "nanmedian", "kthvalue", "mode", "cummax", "cummin")
"""Operations that give values and where these are."""


_DECIDES = (
    "argmax", "argmin", "argsort", "gt", "ge", "lt", "le", "eq", "ne", "round", "floor", "ceil", "trunc", "sign", "sgn",
    "bucketize", "searchsorted", "heaviside", "floor_divide", "_to_copy", "to", "nonzero", "torchvision::nms",
)  # fmt: skip
"""Operations whose results jump where their inputs change by little."""


class Decisions:
    """The decisions of one run, to be taken again in another: with equal inputs within rounding they must be the same.

    `inputs`: for every decision that was taken again, what it was taken on in both runs, to be compared.

    >>> decisions, x = Decisions(), torch.tensor([1.0, 1.0 + 1e-7])
    >>> with torch.inference_mode(), decisions.taken():
    ...     first = x.argmax()
    >>> with torch.inference_mode(), decisions.taken_again():
    ...     second = x.flip(0).argmax()
    >>> int(first), int(second), len(decisions.inputs)
    (1, 1, 1)
    """

    def __init__(self) -> None:
        self._made: list[tuple[str, list[Tensor], Any]] = []
        self.inputs: list[tuple[Tensor, Tensor]] = []

    def taken(self) -> OperationMode:
        """A context in which decisions are taken down."""
        self._made = []
        return _Deciding(self._made, None)

    def taken_again(self) -> OperationMode:
        """A context in which the decisions that were taken down are taken again."""
        self.inputs = []
        return _Deciding(self._made, self.inputs)


class _Deciding(OperationMode):
    """Takes decisions down (`pairs` is None), or takes them again."""

    def __init__(self, made: list[tuple[str, list[Tensor], Any]], pairs: list[tuple[Tensor, Tensor]] | None) -> None:
        super().__init__()
        self._made, self._pairs, self._place = made, pairs, 0

    def rule_for(self, func: Function) -> Any:
        """Whether the operation decides."""
        name = _name(func)
        return name in _DECIDES or name in _PICKS

    def run(self, func: Function, rule: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the operation; where it decides from floating-point numbers, take it down or take it as before."""
        reads = (
            [tensor for tensor in tensors_in((*args, *kwargs.values())) if tensor.is_floating_point()] if rule else []
        )
        result = func(*args, **kwargs)
        if not reads or not _jumps(func, result):
            return result
        if self._pairs is None:
            self._made.append((_name(func), [tensor.clone() for tensor in reads], result))
            return result
        name, before, decided = self._made[self._place] if self._place < len(self._made) else ("", [], None)
        self._place += 1
        if name != _name(func) or [tensor.shape for tensor in before] != [tensor.shape for tensor in reads]:
            return result
        self._pairs += zip(before, reads, strict=True)
        return _again(signature(func).bind(args, kwargs), result, decided)


def _jumps(func: Function, result: Any) -> bool:
    """Not so the largest of all, a value without a place, and a change of type between floating-point numbers."""
    if _name(func) in _PICKS:
        return isinstance(result, Sequence) and len(result) == 2
    return isinstance(result, Tensor) and not (_name(func) in ("to", "_to_copy") and result.is_floating_point())


def _again(args: Arguments, result: Any, decided: Any) -> Any:
    """The result with the decision of the other run; values are those of this run at the places of the other."""
    if isinstance(result, Tensor):
        return decided.clone()
    x, places = args["self"], decided[1]
    dim = (args["dim"] if args.get("dim") is not None else -1) % max(x.dim(), 1)
    flat = places.dim() < x.dim()
    values = x.gather(dim, places.unsqueeze(dim) if flat else places)
    return type(result)((values.squeeze(dim) if flat else values, places.clone()))
