"""Sizes that a model's own code keeps in attributes: found after a cut, and rewritten.

A module may keep a channel count in an attribute (`self.width`, a list of split sizes) and use it in a view, a slice,
or a functional call. After a cut that number is out of date. `size_check.py` says which operations are called with
wrong numbers, but not where a number comes from. So attributes that hold it, or a multiple or a part of it, are
changed one after another, in the order of `_candidates`, and the network run again, until no number is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import TraceError
from ..plan import AttributeChange, Plan, shrinks
from ..utils.modules import like
from ..utils.size_slots import GRAPH, get_slot, graph_calls, set_slot, size_slots
from .dispatch import SizedLayout, Step
from .labels import Axis, Tie
from .predicted_sizes import PredictedSizes, replaced
from .size_check import Attempt, WrongNumber, attempt
from .trace import Traced

_ROUNDS = 24


_NEARBY = 64
"""How many steps back a size may come from that makes the network stop."""


_LARGEST_FACTOR = 16
"""How many times smaller or larger than the attribute the number may be: `self.width // 2`, `4 * self.width`."""


_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
"""Layers whose attributes surgery has set already."""


_HOLDS, _RELATED = 2, 4
"""Ranks of candidates: up to `_HOLDS` the attribute holds the number itself, up to `_RELATED` a multiple or a part.
The latter are tried only when none of the former is left: fixing those often explains the rest (`self.a + self.b`)."""


class UnrepairableError(TraceError):
    """A size in the model's own code does not follow the cut.

    `groups` names those that it depends on; `ties` are pairs of labels: had these been cut together, the size, which
    the code takes from a shape, would be right (`x.split((x.shape[1], x.shape[1], 3), 1)`).
    """

    groups: tuple[str, ...] = ()
    ties: tuple[Tie, ...] = ()


def rewrite_stale_sizes(
    model: nn.Module,
    plan: Plan,
    traced: Traced,
    example_inputs: Any,
    *,
    among: Sequence[AttributeChange] | None = None,
) -> tuple[AttributeChange, ...]:
    """Rewrite the sizes that a pruned model's own code keeps in attributes.

    **Arguments:**

    - `model`: the model after surgery; changed in place, or left as it was if an error is raised.
    - `plan`: the cut that was applied.
    - `traced`: the groups of the model before surgery.
    - `example_inputs`: the inputs that it was traced with (any floating-point type).
    - `among`: the only changes that come into question, if that is known; of a sequence any part may change.

    **Returns:** the changes made; empty where everything already has the sizes that it should have.

    **Raises:** `UnrepairableError` naming the operation, its module and the groups, if a size can't be put right.
    """
    search = _Search(model, PredictedSizes(traced.sizes.assembly, plan), traced.sizes.steps, example_inputs)
    search.among = None if among is None else {_key(change): change.new for change in among}
    try:
        return search.search()
    except BaseException:
        for key in list(search.changes):
            search.take_back(key)
        raise


def groups_behind_numbers(model: nn.Module, plan: Plan, traced: Traced, example_inputs: Any) -> dict[str, str]:
    """Groups on whose size a number depends that the network computes with: group name → what happens to the number.

    The temperature of an attention that is taken from the number of its channels, say: cutting them changes the
    softmax, though every tensor has the right size.

    **Arguments:** as for `rewrite_stale_sizes`, whose changes have been made already.
    """
    predicted, steps = PredictedSizes(traced.sizes.assembly, plan), traced.sizes.steps
    found: dict[str, str] = {}
    for number in attempt(model, example_inputs, steps, predicted).changed:
        step = steps[number.place]
        groups = predicted.cut_groups(_tensors_of(step))
        for earlier in reversed(steps[: number.place] if not groups else ()):
            source = predicted.cut_groups((earlier.source,) if earlier.source else ())
            left = predicted.cut_groups(earlier.outputs)
            groups = {name: None for name in source if name not in left}  # summed over there
            if groups:
                break
        where = f"{step.op} in {step.stack[-1]}" if step.stack and step.stack[-1] else step.op
        reason = f"a number follows from how many there are: {where} uses {number.after:.4g}, was {number.before:.4g}"
        for group in groups:
            found.setdefault(group, reason)
    return found


Key = tuple[str, str]
"""A module's name and an attribute's."""


@dataclass(slots=True)
class _Guesses:
    """What was tried for one wrong number.

    `first`: as it was at the beginning; `wrong`: how many of its values were wrong last time; `tried`: attributes
    that were changed for it since then; `last`: the latest of them; `given_up`: whether none is left.
    """

    first: WrongNumber
    wrong: int
    tried: set[Key] = field(default_factory=set)
    last: Key | None = None
    given_up: bool = False


class _Search:
    """The search for attributes: in every round one guess for each wrong number, then a run with all of them.

    Guessing for all numbers at once keeps the runs few: a network of 24 blocks with a width each takes two.
    """

    def __init__(self, model: nn.Module, predicted: PredictedSizes, steps: Sequence[Step], inputs: Any) -> None:
        self.model, self.predicted, self.steps, self.inputs = model, predicted, steps, inputs
        self.modules = dict(model.named_modules())
        self.changes: dict[Key, AttributeChange] = {}
        self.originals: dict[Key, Any] = {}
        self.guesses: dict[tuple[int, str], _Guesses] = {}
        self.among: dict[Key, Any] | None = None
        self.kept: set[Key] = set()  # changes from before this round
        self.harmful: set[Key] = set()  # changes that made the network fail

    def search(self) -> tuple[AttributeChange, ...]:
        """Guess, run, and guess again for what is still wrong."""
        found = self.run()
        for _ in range(_ROUNDS):
            given_up = [guesses.first for guesses in self.guesses.values() if guesses.given_up]
            wrong = [one for one in found.wrong if one.key not in {first.key for first in given_up}]
            if wrong:
                self.guess(wrong)
                found = self.run_without_harm(found)
            elif given_up:
                raise self.failure(given_up, None)
            elif found.error is not None:
                found = self.get_further(found)
            else:
                return tuple(self.changes.values())
        raise self.failure(found.wrong, found)

    def guess(self, wrong: Sequence[WrongNumber]) -> None:
        """Change the next candidate for every wrong number; take back the last one if it did not help."""
        for one in wrong:
            left = len(replaced(one.given, one.wanted))
            guesses = self.guesses.setdefault(one.key, _Guesses(one, left))
            if left < guesses.wrong:
                guesses.tried = set()  # some of its values are right now: the others may be in the same attribute
            elif guesses.last in self.changes:
                self.take_back(guesses.last)
            guesses.wrong, guesses.last = left, None
        self.kept = set(self.changes)
        excluded = self.kept | self.harmful
        lists = [[c for c in self.candidates(one) if _key(c[1]) not in excluded] for one in wrong]
        for weakest in (_HOLDS, _RELATED):
            made = [self.try_next(one, ranked, weakest) for one, ranked in zip(wrong, lists, strict=True)]
            if any(made):
                return
        for one in wrong:
            self.guesses[one.key].given_up = True

    def candidates(self, one: WrongNumber) -> list[tuple[int, AttributeChange]]:
        """`_candidates`; in a graph's own code the node that makes this very call comes first."""
        found = self.ranked(one.stack, one.given, one.wanted)
        where = one.stack[-1] if one.stack else ""
        calls = list(graph_calls(self.modules[where], one.op))
        number = sum(step.op == one.op and step.stack == one.stack for step in self.steps[: one.place])
        if number < len(calls):
            found.sort(key=lambda entry: _key(entry[1]) != (where, calls[number]))
        return found

    def ranked(self, stack: Sequence[str], given: Any, wanted: Any) -> list[tuple[int, AttributeChange]]:
        """`_candidates`, as far as they come into question."""
        found, among = _candidates(self.modules, stack, given, wanted), self.among
        if among is None:
            return found
        missing = object()
        return [
            (rank, change)
            for rank, change in found
            if (new := among.get(_key(change), missing)) == change.new or isinstance(new, tuple | list)
        ]

    def try_next(self, one: WrongNumber, ranked: Sequence[tuple[int, AttributeChange]], weakest: int) -> bool:
        """Make the next change for a wrong number, unless another one of this round has just made the same."""
        guesses = self.guesses[one.key]
        for rank, candidate in ranked:
            key = _key(candidate)
            present = self.changes.get(key)
            if rank > weakest or key in guesses.tried or (present is not None and present.new != candidate.new):
                continue
            if present is None:
                self.change(candidate)
                guesses.last = key
            guesses.tried.add(key)
            return True
        return False

    def run_without_harm(self, before: Attempt) -> Attempt:
        """Run again; if this round's guesses made the network fail, find out which, and never make them again."""
        found = self.run()
        if not found.worse_than(before):
            return found
        guesses = [change for key, change in self.changes.items() if key not in self.kept]
        for change in guesses:
            self.take_back(_key(change))
        for change in guesses:
            self.change(change)
            if self.run().worse_than(before):
                self.take_back(_key(change))
                self.harmful.add(_key(change))
        return self.run()

    def get_further(self, stopped: Attempt) -> Attempt:
        """The network stops although all numbers are right (`if x.shape[1] != self.width: raise`).

        Nothing says which number is meant: try attributes that hold any size from nearby, until a run gets further.
        """
        step = self.steps[min(stopped.place, len(self.steps) - 1)]
        pairs = []
        for tensor in (*self._recent(stopped), *_tensors_of(step)):
            pairs += replaced(tensor.shape, self.predicted.shape(tensor))
        stack = dict.fromkeys((*stopped.stack, *step.stack))  # those of the last operation, and those of the next
        for old, new in dict.fromkeys(pairs):
            for _, change in self.ranked(tuple(stack), old, new):
                if _key(change) in self.changes:
                    continue
                self.change(change)
                found = self.run()
                if found.error is None or found.place > stopped.place:
                    return found
                self.take_back(_key(change))
        raise self.failure([], stopped)

    def _recent(self, stopped: Attempt) -> Iterator[SizedLayout]:
        """What the last operations of the innermost module resulted in."""
        for step in reversed(self.steps[max(0, stopped.place - _NEARBY) : stopped.place]):
            if step.stack == stopped.stack:
                yield from step.outputs

    def change(self, change: AttributeChange) -> None:
        module, key = self.modules[change.module], _key(change)
        self.originals[key] = get_slot(module, change.attribute)
        set_slot(module, change.attribute, like(self.originals[key], change.new))
        self.changes[key] = change

    def take_back(self, key: Key) -> None:
        del self.changes[key]
        set_slot(self.modules[key[0]], key[1], self.originals.pop(key))

    def run(self) -> Attempt:
        return attempt(self.model, self.inputs, self.steps, self.predicted)

    def failure(self, wrong: Sequence[WrongNumber], stopped: Attempt | None) -> UnrepairableError:
        """The error that names the first operation, and every group that the sizes depend on."""
        last = min(stopped.place, len(self.steps) - 1) if stopped is not None else 0
        places = [one.place for one in wrong] or [last]
        names: dict[str, None] = {}
        tensors = [tensor for place in places for tensor in _tensors_of(self.steps[place])]
        names.update(self.predicted.cut_groups(tensors))
        for one in wrong:
            stale = {given for given, _ in replaced(one.given, one.wanted)}
            names.update(dict.fromkeys(self._groups_of_size(stale, self.steps[one.place].stack)))
        step = self.steps[places[0]]
        where = f"{step.op} in {step.stack[-1]!r}" if step.stack and step.stack[-1] else step.op
        what = f"uses {wrong[0].given} where {wrong[0].wanted} is right" if wrong else str(stopped and stopped.error)
        error = UnrepairableError(
            f"a size in the model's own code does not follow the cut: {where}: {what}; "
            f"leave {', '.join(names) or 'its groups'} out (ignore=)"
        )
        error.groups = tuple(names)
        error.ties = tuple(tie for one in wrong for tie in self._ties(one))
        return error

    def _ties(self, one: WrongNumber) -> Iterator[Tie]:
        """For every wrong size the labels that it belongs to, with those of an axis nearby that has this size now."""
        step = self.steps[one.place]
        given = one.given if isinstance(one.given, tuple) else (one.given,) * len(step.outputs)
        for number, (axis, old) in zip(given, _sized_axes(step), strict=False):
            if not axis or len(axis) > 1 or self.predicted.size(axis, old) == number:
                continue
            for earlier in reversed(self.steps[: one.place]):
                source = earlier.source if earlier.stack == one.stack else None
                for other, size in zip(source.layout, source.shape, strict=True) if source else ():
                    if other and len(other) == 1 and size == old and self.predicted.size(other, size) == number:
                        yield other[0], axis[0]
                        break
                else:
                    continue
                break

    def _groups_of_size(self, sizes: set[int], stack: tuple[str, ...]) -> Iterator[str]:
        """Groups that have one of these sizes after the cut, somewhere in a running module."""
        for step in self.steps:
            if step.stack[: len(stack)] == stack and step.source is not None:
                for axis, old in zip(step.source.layout, step.source.shape, strict=True):
                    if axis and self.predicted.size(axis, old) in sizes - {old}:
                        yield from self.predicted.groups_of(axis)


def _sized_axes(step: Step) -> list[tuple[Axis, int]]:
    """The axes that an operation's sizes speak of: of each piece of a split, of a reshape's result."""
    if "split" in step.op and step.source is not None:
        dim = step.numbers.get("dim", 0) % len(step.source.shape)
        return [(piece.layout[dim], piece.shape[dim]) for piece in step.outputs]
    return list(zip(step.outputs[0].layout, step.outputs[0].shape, strict=True)) if step.outputs else []


def _key(change: AttributeChange) -> Key:
    return change.module, change.attribute


def _tensors_of(step: Step) -> tuple[SizedLayout, ...]:
    return (*((step.source,) if step.source else ()), *step.outputs)


def _candidates(
    modules: Mapping[str, nn.Module], stack: Sequence[str], given: Any, wanted: Any
) -> list[tuple[int, AttributeChange]]:
    """Attributes that the number may have come from, likeliest first, with their ranks.

    The same value comes before one inside of a sequence, and that before a multiple or a part; the
    innermost module comes first, and those inside of it, which may have been used without being called, last.
    """
    ranked: list[tuple[int, int, AttributeChange]] = []
    pairs = dict(replaced(given, wanted))
    running = list(reversed(list(dict.fromkeys(stack))))
    inner = f"{running[0]}." if running and running[0] else ""
    helpers = [name for name in modules if name.startswith(inner) and name not in running] if running else []
    seen: set[int] = set()
    for depth, name in enumerate([*running, *helpers]):
        if isinstance(modules[name], _LAYERS):
            continue
        for attribute, value in size_slots(modules[name], seen).items():
            found = None if attribute.startswith("_") else _rewritten(value, given, wanted, pairs)
            if found is None or not shrinks(value, found[0]):
                continue
            new, rank = found
            if "." not in attribute or attribute.startswith(GRAPH):
                ranked.append((rank, depth, AttributeChange(name, attribute, value, new)))
            elif rank <= _HOLDS:  # a configuration holds many numbers, for all modules: of those only the very same
                owner = _owner(modules, modules[name], attribute)
                ranked.append((rank, depth + len(modules), AttributeChange(owner, attribute, value, new)))
    return [(rank, change) for rank, _, change in sorted(ranked, key=lambda entry: entry[:2])]


def _owner(modules: Mapping[str, nn.Module], module: nn.Module, slot: str) -> str:
    """The first module that holds the object that a slot lies in: one name for what many modules share."""
    name = slot.partition(".")[0]
    held = vars(module)[name]
    return next(other for other, holder in modules.items() if vars(holder).get(name) is held)


def _rewritten(value: Any, given: Any, wanted: Any, pairs: Mapping[int, int]) -> tuple[Any, int] | None:
    """An attribute's new value, and its rank: how unlikely it is that this attribute is meant."""
    if isinstance(value, list | tuple):
        if tuple(value) == given:
            return wanted, 0
        if value and all(type(item) is int for item in value) and any(item in pairs for item in value):
            return tuple(pairs.get(item, item) for item in value), 2
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
        if old > 0 and old % value == 0 and old // value <= _LARGEST_FACTOR and new % (old // value) == 0:
            return new // (old // value), 4
    return None
