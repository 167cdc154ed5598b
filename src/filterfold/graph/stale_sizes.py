"""Sizes written into user code: found by comparing a pruned network with its forecast, and rewritten.

A module may keep a channel count in an attribute of its own (`self.width`, a list of split sizes)
and use it in a view, a slice, or a functional call. After a cut such a number is out of date. The
forecast says what it should be; the pruned network is run with every wrong number put right on the
way, and for each the attribute that it came from is looked for in the modules that were running.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TraceError
from ..plan import AttributeChange, Plan
from ..utils.dispatch import Function, OperationMode, signature, tensors_in
from ..utils.inputs import call
from ..utils.model_state import preserved, random_state_preserved
from ..utils.modules import like
from .dispatch import Step, find_rule, module_stack, numbers_in
from .predicted_sizes import PredictedSizes, replaced, settled
from .rules import RULES
from .trace import Traced

_ROUNDS = 24


_LARGEST_FACTOR = 16
"""How many times smaller or larger than the attribute the number may be: `self.width // 2`, `4 * self.width`."""


_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
"""Layers whose attributes surgery has set already."""


_WHOLE, _PART = 2, 4
"""Ranks of candidates: up to `_WHOLE` the attribute holds the number itself, up to `_PART` a multiple or a fraction.
The latter are tried only when none of the former is left: fixing those often explains the rest (`self.a + self.b`)."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One operation of the pruned network that was called with a number that is out of date."""

    place: int
    op: str
    stack: tuple[str, ...]
    given: Any
    wanted: Any

    @property
    def key(self) -> tuple[int, str]:
        """What stays the same from run to run."""
        return self.place, self.op


@dataclass(slots=True)
class Run:
    """What one run of the pruned network showed: findings, and where it stopped, if it did."""

    findings: list[Finding] = field(default_factory=list)
    place: int = 0
    error: str | None = None
    stack: tuple[str, ...] = ()


class _Mismatch(Exception):
    pass


def rewrite_stale_sizes(
    model: nn.Module, plan: Plan, traced: Traced, example_inputs: Any
) -> tuple[AttributeChange, ...]:
    """Rewrite the sizes that a pruned model's own code keeps in attributes.

    **Arguments:**

    - `model`: the model after surgery; changed in place, or left as it was if an error is raised.
    - `plan`: the cut that was applied.
    - `traced`: the groups of the model before surgery.
    - `example_inputs`: the inputs that it was traced with (any floating-point type).

    **Returns:** the changes made; empty where everything already has the sizes that it should have.

    **Raises:** `TraceError` naming the operation, its module and the groups, if a size can't be put right.
    """
    search = _Search(model, PredictedSizes(traced.sizes.assembly, plan), traced, example_inputs)
    try:
        return search.go()
    except BaseException:
        search.undo()
        raise


class _Checker(OperationMode):
    """Runs the operations of the pruned network beside the forecast, putting numbers right on the way."""

    def __init__(self, forecast: PredictedSizes, steps: Sequence[Step], stack: list[str], run: Run) -> None:
        super().__init__()
        self.forecast, self.steps, self.stack, self.progress = forecast, steps, stack, run

    def rule_for(self, func: Function) -> Any:
        """The tracing rule: what had none when tracing was decomposed there, too."""
        return find_rule(func, RULES)[1]

    def run(self, func: Function, rule: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ARG002
        """Run the operation with the numbers that the forecast wants, and note those that were wrong."""
        run, op = self.progress, find_rule(func, RULES)[0]
        run.stack = tuple(self.stack)
        step = self.steps[run.place] if run.place < len(self.steps) else None
        if step is not None and (op, step.op) == ("alias", "slice"):
            # Python indexing leaves a slice out when it takes everything, as a bound that is out of date may do now.
            func, op = torch.ops.aten.slice.Tensor, "slice"
            args = (args[0], *(step.numbers.get(name) for name in ("dim", "start", "end", "step")))
        if step is None or (step.op != op and (op, step.op) != ("slice", "alias")):
            raise _Mismatch(f"{op} is called where the unpruned network called something else")
        wanted = self.forecast.numbers(step)
        bound = signature(func).bind(args, kwargs)
        given = numbers_in(bound)
        for name, value in ((name, settled(given.get(name), value)) for name, value in wanted.items()):
            if name in given and given[name] != value and not _same_end(step, name, given[name], value):
                run.findings.append(Finding(run.place, op, run.stack, given[name], value))
                bound[name] = list(value) if isinstance(value, tuple) else value
        self.save_written(func, bound, lambda tensor: not tensor.is_inference())
        if run.findings and run.findings[-1].place == run.place:
            args, kwargs = signature(func).spread(bound)
        out = func(*args, **kwargs)
        for tensor, expected in zip(tensors_in([out]), step.outputs, strict=False):
            shape = tuple(tensor.shape)
            if len(shape) != len(expected.shape) or replaced(shape, self.forecast.shape(expected)):
                raise _Mismatch(f"{op} gives {list(shape)} instead of {list(self.forecast.shape(expected))}")
        run.place += 1
        return out


def _same_end(step: Step, name: str, given: Any, wanted: Any) -> bool:
    """A slice that runs to the end of an axis may name any larger number as its end."""
    if step.op != "slice" or name != "end" or step.source is None:
        return False
    size = step.source.shape[step.numbers.get("dim", 0)]
    return bool(step.numbers["end"] >= size and given >= wanted)


class _Search:
    """The search for attributes: a first guess for every finding at once, then the next guess for what is left."""

    def __init__(self, model: nn.Module, forecast: PredictedSizes, traced: Traced, example_inputs: Any) -> None:
        self.model, self.forecast, self.traced, self.inputs = model, forecast, traced, example_inputs
        self.modules = dict(model.named_modules())
        self.changes: dict[tuple[str, str], AttributeChange] = {}
        self.originals: dict[tuple[str, str], Any] = {}
        self.tried: dict[tuple[int, str], set[tuple[str, str]]] = {}
        self.wrong: dict[tuple[int, str], int] = {}
        self.first: dict[tuple[int, str], Finding] = {}
        self.good: set[tuple[str, str]] = set()
        self.banned: set[tuple[str, str]] = set()
        self.stuck: dict[tuple[int, str], Finding] = {}
        self.made: dict[tuple[int, str], tuple[str, str]] = {}

    def go(self) -> tuple[AttributeChange, ...]:
        """Guess, run, and guess again for what is still wrong."""
        run = self.run()
        for _ in range(_ROUNDS):
            open_ = [finding for finding in run.findings if finding.key not in self.stuck]
            if open_:
                self.guess(open_)
            elif self.stuck:
                raise self.failure(list(self.stuck.values()), None)
            elif run.error is not None:
                run = self.creep(run)
                continue
            else:
                return tuple(self.changes.values())
            run = self.after_guessing(run)
        raise self.failure(run.findings, run)

    def after_guessing(self, before: Run) -> Run:
        """Run again; if guesses made the network fail, find out which, and never make them again."""
        run = self.run()
        if not _worse(run, before):
            return run
        guesses = [self.changes[key] for key in list(self.changes) if key not in self.good]
        for change in guesses:
            self.take_back((change.module, change.attribute))
        for change in guesses:
            self.change(change)
            run = self.run()
            if _worse(run, before):
                self.take_back((change.module, change.attribute))
                self.banned.add((change.module, change.attribute))
        return self.run()

    def guess(self, findings: Sequence[Finding]) -> None:
        """Try the next candidate for every finding, taking back those that did not help."""
        for finding in findings:
            self.first.setdefault(finding.key, finding)
            before, wrong = self.made.pop(finding.key, None), len(replaced(finding.given, finding.wanted))
            if wrong < self.wrong.get(finding.key, wrong):
                self.tried[finding.key] = set()
            elif before is not None and before in self.changes:
                self.take_back(before)
            self.wrong[finding.key] = wrong
        self.good = set(self.changes)
        made_before = self.good | self.banned
        lists = [_candidates(self.modules, f.stack, f.given, f.wanted) for f in findings]
        lists = [[c for c in ranked if (c[1].module, c[1].attribute) not in made_before] for ranked in lists]
        for weakest in (_WHOLE, _PART):
            taken = [self.take(finding, ranked, weakest) for finding, ranked in zip(findings, lists, strict=True)]
            if any(taken):
                return
        self.stuck.update({finding.key: self.first[finding.key] for finding in findings})

    def take(self, finding: Finding, ranked: Sequence[tuple[int, AttributeChange]], weakest: int) -> bool:
        """Make the next change for a finding, unless another finding of this round has just made the same."""
        tried = self.tried.setdefault(finding.key, set())
        for rank, candidate in ranked:
            key = candidate.module, candidate.attribute
            present = self.changes.get(key)
            if rank > weakest or key in tried or (present is not None and present.new != candidate.new):
                continue
            if present is None:
                self.change(candidate)
                self.made[finding.key] = key
            tried.add(key)
            return True
        return False

    def creep(self, run: Run) -> Run:
        """The run stopped although all numbers were right: try attributes until it gets further."""
        step = self.traced.sizes.steps[min(run.place, len(self.traced.sizes.steps) - 1)]
        pairs = []
        for tensor in (*self._nearby(run), *((step.source,) if step.source else ()), *step.outputs):
            pairs += replaced(tensor.shape, self.forecast.shape(tensor))
        for old, new in dict.fromkeys(pairs):
            for _, change in _candidates(self.modules, run.stack, old, new):
                if (change.module, change.attribute) in self.changes:
                    continue
                self.change(change)
                again = self.run()
                if again.error is None or again.place > run.place:
                    return again
                self.take_back((change.module, change.attribute))
        raise self.failure([], run)

    def _nearby(self, run: Run) -> Iterator[Any]:
        """What the innermost module's operations so far resulted in."""
        for step in reversed(self.traced.sizes.steps[max(0, run.place - 64) : run.place]):
            if step.stack == run.stack:
                yield from step.outputs

    def change(self, change: AttributeChange) -> None:
        module, key = self.modules[change.module], (change.module, change.attribute)
        self.originals[key] = getattr(module, change.attribute)
        setattr(module, change.attribute, like(self.originals[key], change.new))
        self.changes[key] = change

    def take_back(self, key: tuple[str, str]) -> None:
        del self.changes[key]
        setattr(self.modules[key[0]], key[1], self.originals.pop(key))

    def undo(self) -> None:
        """Put every attribute back."""
        for key in list(self.changes):
            self.take_back(key)

    def run(self) -> Run:
        """Run the pruned network once beside the forecast."""
        run, stack = Run(), list[str]()
        with preserved(self.model), random_state_preserved(self.model):
            checker = _Checker(self.forecast, self.traced.sizes.steps, stack, run)
            try:
                with torch.inference_mode(), module_stack(self.model, stack), checker:
                    call(self.model, self.inputs)
            except Exception as error:
                run.error = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return run

    def failure(self, findings: Sequence[Finding], run: Run | None) -> TraceError:
        """The error that names the first operation, and every group that the sizes depend on."""
        steps = self.traced.sizes.steps
        last = min(run.place, len(steps) - 1) if run is not None else 0
        places = [finding.place for finding in findings] or [last]
        names: dict[str, None] = {}
        for step in (steps[place] for place in places):
            for tensor in (*((step.source,) if step.source else ()), *step.outputs):
                for axis, old in zip(tensor.layout, tensor.shape, strict=True):
                    if self.forecast.size(axis, old) not in (old, None):
                        names.update(dict.fromkeys(self.forecast.groups_of(axis)))
        for finding in findings:
            stale = {given for given, _ in replaced(finding.given, finding.wanted)}
            names.update(dict.fromkeys(self._groups_of_size(stale, steps[finding.place].stack)))
        step = steps[places[0]]
        where = f"{step.op} in {step.stack[-1]!r}" if step.stack and step.stack[-1] else step.op
        what = str(run and run.error)
        if findings:
            what = f"uses {findings[0].given} where {findings[0].wanted} is right"
        error = UnrepairableError(
            f"a size in the model's own code does not follow the cut: {where}: {what}; "
            f"leave {', '.join(names) or 'its groups'} out (ignore=)"
        )
        error.groups = tuple(names)
        return error

    def _groups_of_size(self, sizes: set[int], stack: tuple[str, ...]) -> Iterator[str]:
        """Groups that have one of these sizes after the cut, somewhere in a running module."""
        for step in self.traced.sizes.steps:
            if step.stack[: len(stack)] == stack and step.source is not None:
                for axis, old in zip(step.source.layout, step.source.shape, strict=True):
                    if axis and self.forecast.size(axis, old) in sizes - {old}:
                        yield from self.forecast.groups_of(axis)


class UnrepairableError(TraceError):
    """A size in user code that does not follow the cut; `groups` names those that it depends on."""

    groups: tuple[str, ...] = ()


def _worse(after: Run, before: Run) -> bool:
    return after.error is not None and (before.error is None or after.place < before.place)


def _candidates(
    modules: Mapping[str, nn.Module], stack: Sequence[str], given: Any, wanted: Any
) -> list[tuple[int, AttributeChange]]:
    """Attributes that the number may have come from, likeliest first.

    The same value comes before one inside of a sequence, and that before a multiple or a fraction; the
    innermost module comes first, and those inside of it, which may have been used without being called, last.
    """
    ranked: list[tuple[int, int, AttributeChange]] = []
    pairs = dict(replaced(given, wanted))
    running = list(reversed(list(dict.fromkeys(stack))))
    inner = f"{running[0]}." if running and running[0] else ""
    helpers = [name for name in modules if name.startswith(inner) and name not in running] if running else []
    for depth, name in enumerate([*running, *helpers]):
        if isinstance(modules[name], _LAYERS):
            continue
        for attribute, value in vars(modules[name]).items():
            if attribute.startswith("_") or isinstance(value, bool | Tensor):
                continue
            found = _rewrite(value, given, wanted, pairs)
            if found is not None:
                new, rank = found
                ranked.append((rank, depth, AttributeChange(name, attribute, value, new)))
    return [(rank, change) for rank, _, change in sorted(ranked, key=lambda entry: entry[:2])]


def _rewrite(value: Any, given: Any, wanted: Any, pairs: Mapping[int, int]) -> tuple[Any, int] | None:
    """An attribute's new value, and how unlikely it is that this attribute is meant."""
    if isinstance(value, list | tuple):
        if tuple(value) == given:
            return type(value)(wanted), 0
        if value and all(type(item) is int for item in value) and any(item in pairs for item in value):
            return type(value)(pairs.get(item, item) for item in value), 2
        return None
    if type(value) is not int or value < 2:
        return None
    if value in pairs:
        return pairs[value], 1
    if isinstance(given, tuple) and min(given) >= 0 and value == sum(given):
        return sum(wanted), 2
    for old, new in pairs.items():
        if old > 1 and value % old == 0 and value // old <= _LARGEST_FACTOR:
            return value // old * new, 3
        if old % value == 0 and old // value <= _LARGEST_FACTOR and new % (old // value) == 0:
            return new // (old // value), 4
    return None
