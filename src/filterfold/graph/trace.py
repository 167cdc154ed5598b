"""Tracing: from a model and example inputs to its channel groups."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TraceError, one_line, pass_on_exhaustion
from ..plan import ChannelGroup
from ..profiling.macs import Cost, Counting, measure
from ..utils.arguments import typed
from ..utils.inputs import batch_of, call, check_inputs
from ..utils.model_state import preserved, random_state_preserved
from ..utils.modules import leaves, refuse_script
from .assemble import Assembly, assemble
from .dispatch import Recorder, SizedLayout, Split, Step, TensorLabels, Tracer, module_stack
from .labels import FIXED, OUTPUT, Tie
from .rules import RULES, indexing, layers, math, recurrent, shape

_LOG = logging.getLogger(__name__)


def _heads(split: Split) -> int:
    """Of (heads, size of a head) the heads."""
    return sorted(split.options)[-2]


# Which part of a split axis could shrink instead of the best guess, in the order in which they are tried.
_PREFERENCES: tuple[Callable[[Split], int], ...] = (
    lambda split: split.options[(split.options.index(split.chosen) + 1) % len(split.options)],
    _heads,
    lambda split: max(split.options),
)


_WHOLE = (nn.MultiheadAttention, nn.RNNBase, nn.EmbeddingBag)
"""Layers of whose own sizes surgery changes none (see `filterfold.surgery.layer_attributes.refresh_attributes`)."""


_READING = ("k_proj_weight", "v_proj_weight", "weight_ih_l0", "weight_ih_l0_reverse")
"""Weights in such layers of which the columns, which read what other layers make, can go."""


_RULE_FILES = (layers, math, indexing, recurrent, shape)  # importing them fills RULES


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """The shapes and labels of every operation's results: what is needed to predict sizes after a cut.

    `received`, `returned`: the same of what each module receives first and of what it returns, by its name, once for
    each of its calls in evaluation mode. `splits`: reshapes that split an axis so that either part could shrink.
    """

    steps: tuple[Step, ...]
    assembly: Assembly
    received: Mapping[str, Sequence[SizedLayout]]
    returned: Mapping[str, Sequence[SizedLayout]]
    splits: tuple[Split, ...]


class Traced(tuple[ChannelGroup, ...]):
    """The channel groups of a model, in the order in which the model registers their first layers.

    A tuple of `ChannelGroup` that can also be asked by name: `groups.by_name["layer1.0.conv1"]`.
    `unmet` names the parameters that the example inputs never reached, in evaluation or training mode.
    """

    by_name: Mapping[str, ChannelGroup]
    sizes: Sizes
    unmet: tuple[str, ...]

    def __new__(cls, groups: Iterable[ChannelGroup], sizes: Sizes, unmet: Iterable[str]) -> Traced:
        """Build from groups."""
        traced = super().__new__(cls, groups)
        traced.by_name = {group.name: group for group in traced}
        traced.sizes = sizes
        traced.unmet = tuple(unmet)
        return traced

    def __reduce__(self) -> tuple[Any, ...]:
        """For copy and pickle, which know only a tuple's items."""
        return Traced, (tuple(self), self.sizes, self.unmet)


@typed
def trace(model: nn.Module, example_inputs: Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]) -> Traced:
    """Find all channels of a network that can be removed, and everything that must go with each.

    Runs the model once on the example inputs, in evaluation mode (and once more in training mode if
    that left parameters unused), and leaves nothing behind: modes, buffers, gradients, random state.

    **Arguments:**

    - `model`: any module; convolutions, linear layers, raw parameters and functional calls are followed.
    - `example_inputs`: a tensor, a tuple of positional arguments, or a dictionary of keyword arguments,
      on the model's device. One example is enough.

    **Returns:** the groups as a `Traced` tuple; groups that can't be cut say why in `frozen`.

    **Raises:** `TraceError` if the model does not run on the inputs.

    ```python
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    >>> groups = trace(net, torch.zeros(1, 3, 8, 8))
    >>> [(group.name, group.size, group.frozen) for group in groups]
    [('0', 8, None), ('3', 4, "reaches the model's output")]
    >>> [part.tensor for part in groups[0].producers]
    ['0.weight', '0.bias', '1.weight', '1.bias', '1.running_mean', '1.running_var']
    >>> [(part.tensor, part.axis) for part in groups[0].consumers]
    [('3.weight', 1)]

    ```
    """
    return _trace(model, example_inputs, nullcontext())


def trace_and_measure(model: nn.Module, example_inputs: Any) -> tuple[Traced, Cost]:
    """`trace`, and the cost (`filterfold.profiling.macs.measure`): in one run, if the inputs are one example."""
    if batch_of(example_inputs) != 1:
        cost = measure(model, example_inputs)
        return trace(model, example_inputs), cost
    counting = Counting(model)
    return _trace(model, example_inputs, counting), counting.cost()


def whole_heads(model: nn.Module, example_inputs: Any, traced: Traced, failed: Iterable[str]) -> Traced | None:
    """Another trace, in which whole heads of attention go where some group can't be cut within the heads.

    **Arguments:** the model and its inputs, its groups, and the names of those that can't be cut.

    **Returns:** the groups, or None if no axis of those groups is split into heads.
    """
    choices = _other_choices(traced, _heads, lambda group: group.name in set(failed), wide=True)
    return _trace_once(model, example_inputs, choices, nullcontext()) if choices else None


def tied(model: nn.Module, example_inputs: Any, traced: Traced, ties: Iterable[Tie]) -> Traced:
    """The same trace, with more labels that go together (see `UnrepairableError`)."""
    choices = {place: split.chosen for place, split in enumerate(traced.sizes.splits)}
    return _trace_once(model, example_inputs, choices, nullcontext(), ties)


def _trace(model: nn.Module, example_inputs: Any, watch: AbstractContextManager[Any]) -> Traced:
    refuse_script(model)
    check_inputs(example_inputs)
    traced = _trace_once(model, example_inputs, {}, watch)
    tried: list[dict[int, int]] = []
    for wide in (False, True):
        for prefer in _PREFERENCES:
            choices = _other_choices(traced, prefer, lambda group: group.frozen not in (None, OUTPUT), wide=wide)
            if choices and choices not in tried:
                tried.append(choices)
                again = _trace_once(model, example_inputs, choices, nullcontext())
                if locked(again) < locked(traced):
                    traced = again
    if traced.unmet:
        _LOG.info("never reached by the example inputs: %s", ", ".join(traced.unmet))
    return traced


def _trace_once(
    model: nn.Module,
    example_inputs: Any,
    choices: Mapping[int, int],
    watch: AbstractContextManager[Any],
    ties: Iterable[Tie] = (),
) -> Traced:
    """One trace, with `watch` around its run in evaluation mode."""
    tracer = Tracer(RULES, choices)
    names = _register(model, tracer)
    with preserved(model) as added, random_state_preserved(model):
        with watch:
            _run(model, tracer, example_inputs)
        for tensor in added():
            tracer.freeze(tracer.layout(tensor), "kept by the model from one call to the next")
        unmet = [name for key, name in names.items() if key not in tracer.met]
        steps = tuple(tracer.steps)
        received, returned = (
            {name: tuple(calls) for name, calls in kind.items()} for kind in (tracer.received, tracer.returned)
        )
        if unmet:
            unmet = _train_pass(model, tracer, names, example_inputs)
    tracer.table.joins += ties
    assembly = assemble(tracer.table)
    return Traced(assembly.groups, Sizes(steps, assembly, received, returned, tuple(tracer.splits)), unmet)


def locked(groups: Iterable[ChannelGroup]) -> int:
    """How many units are frozen without reaching the output."""
    return sum(group.size for group in groups if group.frozen not in (None, OUTPUT))


def _other_choices(
    traced: Traced, prefer: Callable[[Split], int], is_locked: Callable[[ChannelGroup], bool], *, wide: bool
) -> dict[int, int]:
    """For every reshape whose labels can't be cut, another part of the axis that could shrink instead.

    Attention with a head size that fixes the scale is the usual case: there, whole heads can go. `wide`: the same for
    all reshapes in that module, since queries, keys and values must go together.
    """
    splits, group_of = traced.sizes.splits, traced.sizes.assembly.group_of
    stuck = [any(is_locked(traced[g]) for g in set(group_of[split.labels].tolist()) - {-1}) for split in splits]
    where = {split.where for split, is_stuck in zip(splits, stuck, strict=True) if is_stuck and wide}
    choices = [
        prefer(split) if is_stuck or split.where in where else split.chosen
        for split, is_stuck in zip(splits, stuck, strict=True)
    ]
    return dict(enumerate(choices)) if choices != [split.chosen for split in splits] else {}


def _register(model: nn.Module, tracer: Tracer) -> dict[int, str]:
    """Give labels to every parameter and buffer; returns the names of the parameters by identity."""
    names = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise TraceError(f"{name} has no shape yet: run the model once before tracing it")
        tracer.know(tensor, TensorLabels(tracer.table.add(name, tensor.shape), weight=True))
        if isinstance(tensor, nn.Parameter):
            names[id(tensor)] = name
    for module in model.modules():
        if isinstance(module, _WHOLE):
            for name, tensor in module.named_parameters(recurse=False):
                layout = tracer.known[id(tensor)][1].layout
                fixed = layout[:1] if name in _READING else layout
                tracer.freeze(fixed, f"belongs to a {type(module).__name__}, which stays whole")
        if isinstance(module, nn.RNNCellBase):  # its first state may be zeros that it makes itself
            rows, columns = tracer.known[id(module.weight_hh)][1].layout
            for states, gates in zip(columns or (), rows or (), strict=True):
                tracer.table.join(states[None], gates.reshape(-1, len(states)))
    return names


def _run(model: nn.Module, tracer: Tracer, inputs: Any) -> None:
    """One forward pass under the recorder; what comes out of the model is frozen."""
    for tensor in leaves(inputs):
        tracer.know(tensor, TensorLabels((FIXED,) * tensor.ndim))
    try:
        with torch.inference_mode(), module_stack(model, tracer) as tracer.stack, Recorder(tracer):
            outputs = call(model, inputs)
    except TraceError:
        raise
    except Exception as error:
        pass_on_exhaustion(error)
        raise TraceError(f"the model does not run on the example inputs: {one_line(error)}") from error
    for tensor in leaves(outputs):
        tracer.freeze(tracer.layout(tensor), OUTPUT)


def _train_pass(model: nn.Module, tracer: Tracer, names: dict[int, str], inputs: Any) -> list[str]:
    """Run again in training mode, for branches that exist only there; norms and dropout stay in evaluation mode."""
    before = len(tracer.met)
    for module in model.modules():
        if not isinstance(module, nn.modules.batchnorm._NormBase | nn.modules.dropout._DropoutNd):
            module.training = True
    try:
        _run(model, tracer, inputs)
    except TraceError as error:
        _LOG.warning("training mode could not be traced, branches that exist only there are unknown: %s", error)
    _LOG.debug("training mode met %d more tensors", len(tracer.met) - before)
    return [name for key, name in names.items() if key not in tracer.met]
