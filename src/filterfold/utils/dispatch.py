"""Watching the operations of a network one by one: the base class, and their arguments by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .model_state import ONE_AT_A_TIME

Function = torch._ops.OpOverload
"""An operation as PyTorch's dispatcher knows it, such as `torch.ops.aten.conv2d.default`."""


@dataclass(frozen=True, slots=True)
class Signature:
    """What an operation's schema says about its arguments.

    `written`: names of the arguments that it writes to; `keyword_only`: those that must be given by name.
    """

    names: tuple[str, ...]
    defaults: tuple[Any, ...]
    written: tuple[str, ...]
    keyword_only: frozenset[str]

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name, defaults filled in."""
        bound = dict(zip(self.names, args, strict=False))
        for place in range(len(args), len(self.names)):
            name = self.names[place]
            bound[name] = kwargs.get(name, self.defaults[place])
        return bound

    def spread(self, bound: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Bound arguments as positional and keyword arguments."""
        positional = tuple(bound[name] for name in self.names if name not in self.keyword_only)
        return positional, {name: bound[name] for name in self.keyword_only}


@cache
def signature(func: Function) -> Signature:
    """The signature of an operation.

    >>> signature(torch.ops.aten.add_.Tensor)
    Signature(names=('self', 'other', 'alpha'), defaults=(None, None, 1), written=('self',), keyword_only=...)
    """
    arguments = func._schema.arguments
    return Signature(
        names=tuple(argument.name for argument in arguments),
        defaults=tuple(argument.default_value for argument in arguments),
        written=tuple(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write),
        keyword_only=frozenset(argument.name for argument in arguments if argument.kwarg_only),
    )


def tensors_in(values: Any) -> Iterator[Tensor]:
    """All tensors among an operation's arguments or results, which may be nested lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


class OperationMode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # the base class has no annotations
    """Sees every operation inside a `with` block, in the form in which the user's code called it.

    To be entered together with `torch.inference_mode()`: only there PyTorch hands over `conv2d`, `flatten` or a `view`
    with its -1 before autograd takes them apart. `nn.MultiheadAttention` runs in steps meanwhile, not as one opaque
    operation. An operation for which the subclass has no rule is decomposed, where PyTorch can do so, and its parts
    come one by one instead.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and the default imports torch._dynamo (over a second)

    def __init_subclass__(cls) -> None:  # typed, so that subclasses need not ignore that PyTorch's is not
        super().__init_subclass__()  # type: ignore[no-untyped-call]

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._depth = 0
        self._fast_attention = True
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}

    def rule_for(self, func: Function) -> Any:
        """The rule for an operation, or None."""
        raise NotImplementedError

    def run(self, func: Function, rule: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation and return its result; `rule` is None where there is none and it can't be decomposed."""
        raise NotImplementedError

    def save_written(self, func: Function, bound: Mapping[str, Any]) -> None:
        """Before an operation runs: copy what it will write to, so that it is given back at the end of the block.

        Inference tensors are left out: they were made inside.
        """
        names = signature(func).written
        if func._schema.name in _WRITES_STATISTICS and bound.get("training", bound.get("use_input_stats")):
            names = (*names, "running_mean", "running_var")  # which the schema doesn't say
        for tensor in (bound.get(name) for name in names):
            if isinstance(tensor, Tensor) and id(tensor) not in self._saved and not tensor.is_inference():
                self._saved[id(tensor)] = (tensor, tensor.clone())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by PyTorch for every operation."""
        kwargs = kwargs or {}
        rule = self.rule_for(func)
        if rule is None:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return self.run(func, rule, args, kwargs)

    def __enter__(self) -> Any:
        if self._depth == 0:
            ONE_AT_A_TIME.acquire()
            self._fast_attention = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        self._depth += 1  # once more for what an operation is decomposed into
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        self._depth -= 1
        if self._depth == 0:
            try:
                torch.backends.mha.set_fastpath_enabled(self._fast_attention)
                while self._saved:
                    tensor, value = self._saved.popitem()[1]
                    with torch.no_grad():
                        tensor.copy_(value)
            finally:
                ONE_AT_A_TIME.release()


_WRITES_STATISTICS = frozenset({"aten::batch_norm", "aten::instance_norm", "aten::cudnn_batch_norm"})
