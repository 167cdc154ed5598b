"""Running a pruned network beside the predicted sizes, to see which numbers in its code are out of date."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import one_line, pass_on_exhaustion
from ..utils.dispatch import Function, OperationMode, signature, tensors_in
from ..utils.inputs import call
from ..utils.model_state import preserved, random_state_preserved
from .dispatch import NO_STEP, Step, find_rule, module_stack, numbers_in, scalars_in
from .predicted_sizes import PredictedSizes, replaced, settled
from .rules import RULES


@dataclass(frozen=True, slots=True)
class WrongNumber:
    """An operation of the pruned network that was called with a number (or several) out of date.

    `place`: which step of the run it is; `stack`: the running modules; `given`, `wanted`: an integer or a tuple.
    """

    place: int
    op: str
    stack: tuple[str, ...]
    given: Any
    wanted: Any

    @property
    def key(self) -> tuple[int, str]:
        """What stays the same from run to run."""
        return self.place, self.op


@dataclass(frozen=True, slots=True)
class ChangedScalar:
    """A number that an operation computes with, and that is another one after the cut: it depends on a width."""

    place: int
    before: float
    after: float


@dataclass(slots=True)
class Attempt:
    """One run of the pruned network: the wrong numbers, how many steps it got through, and why it stopped, if it did.

    `stack`: the modules that were running at the end. `changed`: numbers that are no sizes and follow from one.
    """

    changed: list[ChangedScalar] = field(default_factory=list)
    wrong: list[WrongNumber] = field(default_factory=list)
    place: int = 0
    error: str | None = None
    stack: tuple[str, ...] = ()

    def worse_than(self, other: Attempt) -> bool:
        """Whether it failed where the other did not, or earlier."""
        return self.error is not None and (other.error is None or self.place < other.place)


def attempt(model: nn.Module, inputs: Any, steps: Sequence[Step], predicted: PredictedSizes) -> Attempt:
    """Run a pruned network with every wrong number put right on the way, and list them.

    **Arguments:**

    - `model`: the pruned network; it is given back as it was.
    - `inputs`: those that it was traced with.
    - `steps`: of the unpruned network.
    - `predicted`: the sizes after the cut.
    """
    with preserved(model), random_state_preserved(model), module_stack(model) as stack:
        checker = _Checker(steps, predicted, stack)
        try:
            with torch.inference_mode(), checker:
                call(model, inputs)
        except Exception as error:
            pass_on_exhaustion(error)
            checker.found.error = one_line(error)
    return checker.found


class _MismatchError(Exception):
    """The network does something else than the unpruned one did."""


class _Checker(OperationMode):
    """Compares each operation with the same step of the unpruned network.

    A wrong number is noted and replaced before the operation runs. So one run finds all of them, though the network
    as it is would stop at the first. `found`: what the run showed so far.
    """

    def __init__(self, steps: Sequence[Step], predicted: PredictedSizes, stack: list[str]) -> None:
        super().__init__()
        self.steps, self.predicted, self.stack, self.found = steps, predicted, stack, Attempt()

    def rule_for(self, func: Function) -> Any:
        """The tracing rule: what had none while tracing was decomposed there, too."""
        return find_rule(func, RULES)[1]

    def run(self, func: Function, rule: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ARG002
        """Run the operation with the numbers that it should have, and check the size of the result."""
        found, op = self.found, find_rule(func, RULES)[0]
        if op in NO_STEP:
            return func(*args, **kwargs)
        found.stack = tuple(self.stack)
        step = self.steps[found.place] if found.place < len(self.steps) else None
        if step is not None and (op, step.op) == ("alias", "slice"):
            # Python indexing leaves a slice out when it takes everything, as a bound that is out of date may do now.
            func, op = torch.ops.aten.slice.Tensor, "slice"
            args = (args[0], *(step.numbers.get(name) for name in ("dim", "start", "end", "step")))
        if step is None or (step.op != op and (op, step.op) != ("slice", "alias")):
            raise _MismatchError(f"{op} is called where the unpruned network called something else")
        bound = signature(func).bind(args, kwargs)
        self.save_written(func, bound)
        if self._put_right(op, step, bound):
            args, kwargs = signature(func).spread(bound)
        out = func(*args, **kwargs)
        present = scalars_in(op, bound, out)
        found.changed += [
            ChangedScalar(found.place, before, present[name])
            for name, before in step.scalars.items()
            if name in present and present[name] != before and not math.isnan(before)
        ]
        for tensor, expected in zip(tensors_in([out]), step.outputs, strict=False):
            shape = tuple(tensor.shape)
            if len(shape) != len(expected.shape) or replaced(shape, self.predicted.shape(expected)):
                raise _MismatchError(f"{op} gives {list(shape)} instead of {list(self.predicted.shape(expected))}")
        found.place += 1
        return out

    def _put_right(self, op: str, step: Step, bound: dict[str, Any]) -> bool:
        """Replace wrong numbers among the arguments; returns whether there were any."""
        given, wrong = numbers_in(bound), False
        for name, predicted in self.predicted.numbers(step).items():
            value = settled(given.get(name), predicted)
            if name in given and given[name] != value and not _same_end(step, name, given[name], value):
                self.found.wrong.append(WrongNumber(self.found.place, op, self.found.stack, given[name], value))
                bound[name] = list(value) if isinstance(value, tuple) else value
                wrong = True
        return wrong


def _same_end(step: Step, name: str, given: Any, wanted: Any) -> bool:
    """A slice that runs to the end of an axis may name any larger number as its end."""
    if step.op != "slice" or name != "end" or step.source is None:
        return False
    size = step.source.shape[step.numbers.get("dim", 0)]
    return bool(step.numbers["end"] >= size and given >= wanted)
