"""Surgery: a plan becomes a smaller model, together with everything that hangs on its tensors.

Three steps. All new tensors are computed first (`axes.py` says what each axis becomes); then they are
swapped in, keeping every `Parameter` object; then the layers' attributes follow. A journal undoes any
part of it bit for bit.

What folding does to the state of training is chosen so that cutting and then stepping equals
stepping and then cutting, as far as an optimizer is linear:

- gradients and momentum (`momentum_buffer`, `exp_avg`, …) move the parameters, so they are folded
  like the parameters: producers blended, consumers summed with their gain;
- second moments and step sizes (`exp_avg_sq`, `sum`, `step_size`, …) only scale a step, so they are
  averaged with the absolute blend or gain as weights, and never get negative;
- `running_var` is averaged and multiplied by (Σ blend)², so that scaled copies stay exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import FilterfoldError, PlanError, SurgeryError, one_line, out_of_memory
from ..plan import AttributeChange, Plan
from ..utils.arguments import typed
from ..utils.modules import like, named_tensors, refuse_script, unwrap
from ..utils.size_slots import get_slot, plain_sizes, set_slot, size_slots
from .cut_cache import CutCache
from .index_maps import Edit, Kind, cut_tensor, edits_of
from .layer_attributes import check_lengths, refresh_attributes
from .weight_norms import normed_weights

MOMENTS = frozenset(
    {
        "exp_avg_sq", "max_exp_avg_sq",  # Adam, AdamW, NAdam, RAdam
        "exp_inf",  # Adamax
        "sum",  # Adagrad
        "square_avg", "acc_delta",  # RMSprop, Adadelta
        "step_size",  # Rprop
        "row_var", "col_var", "variance",  # Adafactor
    }
)  # fmt: skip
"""Optimizer state that is non-negative by meaning."""


class _Journal:
    """Undo actions, run backwards."""

    def __init__(self) -> None:
        self._actions: list[Callable[[], None]] = []

    def add(self, action: Callable[[], None]) -> None:
        self._actions.append(action)

    def undo(self) -> None:
        while self._actions:
            self._actions.pop()()


@dataclass(frozen=True)
class Receipt:
    """What a cut did, and the way back.

    **Arguments:**

    - `tensors`: names of the parameters and buffers that changed.
    - `attributes`: the size attributes that changed, first model only.
    """

    tensors: tuple[str, ...]
    attributes: tuple[AttributeChange, ...]
    _journal: _Journal

    def rollback(self) -> None:
        """Put back every tensor, gradient, optimizer state and attribute that the cut replaced, bit for bit.

        The very same tensor objects come back. A second call does nothing.
        """
        self._journal.undo()


@typed
def apply(
    plan: Plan,
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    averaged: nn.Module | Sequence[nn.Module] = (),
    cache: CutCache | None = None,
) -> Receipt:
    """Cut a model in place, with its gradients, optimizer state and averaged copies, as one transaction.

    `Parameter` objects stay the same, so optimizers, hooks and references go on working.

    **Arguments:**

    - `plan`: what to cut, with the tensor names of the unwrapped model.
    - `model`: the model, bare or wrapped by torch.compile, `DataParallel` or Lightning Fabric. A
      `DistributedDataParallel` is refused: cut the model inside and wrap it again.
    - `optimizer`: the optimizer or optimizers whose state is cut alike.
    - `averaged`: copies of the same structure (an EMA, an `AveragedModel`) that are cut alike.
    - `cache`: what a rehearsal of the same plan on the same model has cut already.

    **Returns:** a `Receipt`, whose `rollback` undoes everything.

    **Raises:** `PlanError` if the plan doesn't fit, `SurgeryError` if the cut can't be made; the model is
    then as before.

    ```python
    >>> from filterfold.plan import Cut, Slice
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> made, read = Slice("0.weight", 0, (0, 1, 2), "filter"), Slice("1.weight", 1, (0, 1, 2), "kernel")
    >>> bias = Slice("0.bias", 0, (0, 1, 2), "bias")
    >>> receipt = apply(Plan((Cut("0", (0, -1, 1), (made, bias), (read,)),)), net)
    >>> net
    Sequential(
      (0): Linear(in_features=2, out_features=2, bias=True)
      (1): Linear(in_features=2, out_features=1, bias=True)
    )
    >>> receipt.rollback(); net[0].out_features
    3

    ```
    """
    if type(model).__name__ == "DistributedDataParallel":
        raise SurgeryError("DDP's buckets would keep the old sizes: apply the plan to ddp.module and wrap it again")
    refuse_script(model)
    cache = cache or CutCache()
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer or ())
    copies = [averaged] if isinstance(averaged, nn.Module) else list(averaged)
    modules = [unwrap(target) for target in (model, *copies)]
    if len({id(module) for module in modules}) < len(modules):
        raise SurgeryError("averaged: a network can't be an averaged copy of itself, nor be given twice")
    tensors = [dict(named_tensors(module)) for module in modules]
    # Inside inference_mode, new parameters would be inference tensors, of no use for training.
    with torch.inference_mode(False), torch.no_grad():
        edits = cache.edits(plan, tensors[0])
        changes = _new_tensors(edits, modules[0], tensors[0], cache)
        for module, named in zip(modules[1:], tensors[1:], strict=True):
            changes += _new_tensors(edits_of(plan, named), module, named, CutCache())
        by_id = {id(tensors[0][name]): (name, edit) for name, edit in edits.items()}
        states = [change for entry in optimizers for change in _new_states(entry, by_id, tensors[0])]
        journal = _Journal()
        try:
            for tensor, new, grad in changes:
                _swap(tensor, new, grad, journal)
            for state, values in states:
                _update(state, values, journal)
            changed = [_set_attributes(plan, module, edits, journal) for module in modules]
        except BaseException as error:
            journal.undo()
            if isinstance(error, FilterfoldError) or not isinstance(error, Exception) or out_of_memory(error):
                raise
            raise SurgeryError(f"the cut failed and was undone: {one_line(error)}") from error
    return Receipt(tuple(edits), tuple(changed[0]), journal)


class Rewrite(Protocol):
    """Rewrites, in place, the sizes in a model's own code after surgery, and returns the changes.

    Raises a `FilterfoldError` and leaves them if that can't be done. `among`: only these changes come into question.
    See `filterfold.graph.rewrite_stale_sizes`.
    """

    def __call__(
        self, model: nn.Module, plan: Plan, inputs: Any, /, *, among: Sequence[AttributeChange] | None = None
    ) -> tuple[AttributeChange, ...]:
        """Make the changes."""


def apply_with_sizes(
    plan: Plan,
    model: nn.Module,
    example_inputs: Any,
    rewrite: Rewrite | None,
    *,
    among: Sequence[AttributeChange] | None = None,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    averaged: nn.Module | Sequence[nn.Module] = (),
    cache: CutCache | None = None,
) -> tuple[Plan, Receipt]:
    """`apply` a plan, and let the sizes in the model's own code follow, in one transaction.

    What has to change is known only after the cut. So the model is cut, the sizes are found, the cut is taken back,
    and the plan with these sizes is applied: then averaged copies get them too, and one rollback undoes everything.

    **Arguments:** as for `apply`, and

    - `example_inputs`: given to `rewrite`.
    - `rewrite`: finds the sizes; None: there are none to find. `among`: the only changes that come into question.

    **Returns:** the plan with the changed sizes, and the receipt of applying it.

    **Raises:** as `apply` and `rewrite` do; the model is then as before.
    """
    receipt = apply(plan, model, optimizer=optimizer, averaged=averaged, cache=cache)
    if rewrite is None:
        return plan, receipt
    try:
        changes = rewrite(unwrap(model), plan, example_inputs, among=among)
    except BaseException:
        receipt.rollback()
        raise
    if not changes:
        return plan, receipt
    _put_back(changes, unwrap(model))  # the receipt knows nothing of them
    receipt.rollback()
    plan = replace(plan, attributes=(*plan.attributes, *changes))
    return plan, apply(plan, model, optimizer=optimizer, averaged=averaged, cache=cache)


def _new_tensors(
    edits: Mapping[str, Edit], model: nn.Module, tensors: Mapping[str, Tensor], cache: CutCache
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """(tensor, its new data, its new gradient) for everything that changes."""
    changes = {}
    for name, edit in edits.items():
        tensor = tensors[name]
        kind: Kind = "variance" if name.rpartition(".")[2] == "running_var" else "value"
        grad = tensor.grad if tensor.is_leaf else None
        if grad is not None and grad.layout != torch.strided:
            raise SurgeryError(f"{name} has a sparse gradient: call optimizer.zero_grad() before cutting")
        new = cache.cut(name, tensor, edit, kind)
        changes[name] = (tensor, new, None if grad is None else cut_tensor(grad, edit))
    for norm in normed_weights(model, edits):
        if not edits.keys().isdisjoint(norm.names):
            after = {**tensors, **{name: entry[1] for name, entry in changes.items()}}
            before = dict(tensors)
            if norm.left is None:  # lengths of rows: of those that stay
                rows = {axis: cut for axis, cut in edits.get(norm.weight, {}).items() if axis == norm.dim}
                before[norm.weight] = cut_tensor(tensors[norm.weight], rows)
            factor, target = norm.factor(norm.length(before), norm.length(after)), tensors[norm.target]
            grad = changes[norm.target][2] if norm.target in changes else target.grad
            changes[norm.target] = (target, after[norm.target] * factor, grad)
    return list(changes.values())


def _new_states(
    optimizer: torch.optim.Optimizer, edits: Mapping[int, tuple[str, Edit]], tensors: Mapping[str, Tensor]
) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    """(a parameter's state, its new entries) for every parameter of the optimizer that changes."""
    members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not {id(parameter) for parameter in members} & {id(tensor) for tensor in tensors.values()}:
        raise SurgeryError(
            f"{type(optimizer).__name__} holds no parameter of this model: was it built for another one?"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise SurgeryError("LBFGS keeps its history as flat vectors over all parameters: cut without it, or before it")
    changes = []
    for parameter in members:
        name, edit = edits.get(id(parameter), ("", {}))
        state = optimizer.state.get(parameter)
        if edit and state:
            changes.append((state, _new_state(optimizer, parameter, state, name, edit)))
    return changes


def _new_state(
    optimizer: torch.optim.Optimizer, parameter: Tensor, state: Mapping[str, Any], name: str, edit: Edit
) -> dict[str, Tensor]:
    values = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        fits = value.dim() == parameter.dim() and all(
            have in (1, want) for have, want in zip(value.shape, parameter.shape, strict=True)
        )
        if not fits:
            raise SurgeryError(
                f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for {name} of shape "
                f"{tuple(parameter.shape)}: no rule says how to cut it"
            )
        values[key] = cut_tensor(value, edit, "moment" if key in MOMENTS else "value")
    return values


def _swap(tensor: Tensor, new: Tensor, grad: Tensor | None, journal: _Journal) -> None:
    """Give a tensor new data and gradient under its old identity.

    A graph that is still alive (the last `loss`) keeps the tensor's gradient accumulator with its old
    shape; passing through another dtype makes autograd build a new accumulator.
    """
    old, old_grad = tensor.data, tensor.grad if tensor.is_leaf else None

    def put(data: Tensor, gradient: Tensor | None) -> None:
        if tensor.is_leaf:
            tensor.grad = None
        other = torch.float64 if data.dtype != torch.float64 else torch.float32
        tensor.data = torch.empty(0, dtype=other, device=data.device)
        tensor.data = data
        if gradient is not None:
            tensor.grad = gradient

    journal.add(lambda: put(old, old_grad))
    put(new, grad)


def _update(state: dict[str, Any], values: Mapping[str, Tensor], journal: _Journal) -> None:
    before = dict(state)

    def restore() -> None:
        state.clear()
        state.update(before)

    journal.add(restore)
    state.update(values)


def _set_attributes(plan: Plan, model: nn.Module, edits: Iterable[str], journal: _Journal) -> list[AttributeChange]:
    """Let every layer's attributes follow its tensors, then rewrite the sizes that the plan names."""
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = _owners(model, edits)
    for change in plan.attributes:
        if change.module not in modules:
            raise PlanError(f"the model has no module {change.module!r}, whose {change.attribute} the plan changes")
    touched = {change.module for change in plan.attributes} | owners
    before = {name: size_slots(modules[name]) for name in sorted(touched)}

    def restore() -> None:
        for name, slots in before.items():
            for path, value in slots.items():
                if get_slot(modules[name], path) is not value:
                    set_slot(modules[name], path, value)

    journal.add(restore)
    for name in owners:
        try:
            refresh_attributes(modules[name])
            check_lengths(modules[name])
        except SurgeryError as error:
            raise SurgeryError(f"{name}: {error}") from error
    for change in plan.attributes:
        _rewrite(modules[change.module], change, plain_sizes(before[change.module].get(change.attribute)))
    present = {(name, path): get_slot(modules[name], path) for name, slots in before.items() for path in slots}
    return [
        AttributeChange(name, path, old, plain_sizes(present[name, path]))
        for name, slots in before.items()
        for path, old in slots.items()
        if present[name, path] is not old and plain_sizes(present[name, path]) != plain_sizes(old)
    ]


def _rewrite(module: nn.Module, change: AttributeChange, before: Any) -> None:
    """Set one size; `before` is its value before the layers' own attributes were refreshed."""
    present = get_slot(module, change.attribute)
    if "." in change.attribute and plain_sizes(present) == plain_sizes(change.new):
        return  # in an object that two models share
    if plain_sizes(change.old) not in (before, plain_sizes(present)) or before is None:
        raise PlanError(
            f"{change.module or 'the model'}.{change.attribute} is {before}, the plan expects {change.old}: "
            "was it applied already?"
        )
    set_slot(module, change.attribute, like(present, plain_sizes(change.new)))


def _put_back(changes: Sequence[AttributeChange], model: nn.Module) -> None:
    for change in reversed(changes):
        module = model.get_submodule(change.module)
        set_slot(module, change.attribute, like(get_slot(module, change.attribute), plain_sizes(change.old)))


def _owners(model: nn.Module, tensors: Iterable[str]) -> set[str]:
    """Names of the modules whose tensors changed, under all names; a parametrised tensor counts for its layer."""
    changed = set(tensors)
    named = dict(named_tensors(model))
    ids = {id(named[name]) for name in changed}
    return {
        name.split(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
        for name, tensor in named.items()
        if id(tensor) in ids
    }
