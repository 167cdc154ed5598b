"""The one verb: trace, score, select, rehearse, cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, FilterfoldError
from ..graph import locked
from ..surgery.cut_cache import CutCache
from ..utils.arguments import typed
from ..utils.modules import named_tensors, unwrap
from .budgets import Budget, LatencyBudget, Selection
from .budgets.patterns import merged
from .budgets.solver import Scope
from .criteria import Criterion
from .scored import Optimizers, PruneResult, Rules, Scoring, scored


@typed
@torch.inference_mode(mode=False)  # else new tensors could never be trained
def prune(
    model: nn.Module,
    example_inputs: Any,
    *,
    criterion: str | Criterion | Callable[..., Tensor] = "l1",
    keep: float | Mapping[str, float] | None = None,
    macs: float | None = None,
    parameters: float | None = None,
    latency: float | LatencyBudget | None = None,
    scope: Scope = "layer",
    round_to: int | None = 1,
    min_keep: float = 1,
    max_cut: float = 1.0,
    ignore: Sequence[str] = (),
    optimizer: Optimizers = None,
    averaged: nn.Module | Sequence[nn.Module] = (),
    loader: Iterable[Any] | None = None,
    selection: Selection | None = None,
    scoring: Scoring | None = None,
    verify: bool = True,
    strict: bool = False,
) -> PruneResult:
    """Make a model smaller, in place, and prove it.

    Traces the channel groups, scores their units, selects those that fit the budget, rehearses the
    cut (see `filterfold.surgery.verify.rehearse`), and makes it: on the parameters, gradients, buffers,
    module attributes, optimizer state and averaged copies, as one transaction. By default this is
    Li et al. (2017): the filters of smallest L1 norm go.

    **Arguments:**

    - `model`: any module. Modes, hooks, gradients, `requires_grad` and random state are kept.
    - `example_inputs`: a tensor, a tuple of arguments, or a dictionary of keyword arguments.
    - `criterion`, `loader`: see `score`. `scoring`: how the criterion is applied, with its seed.
    - `keep` | `macs` and/or `parameters`: how much may remain, see `select`.
    - `latency`: instead of those, the share of the *measured* time that may remain, on the model's device: a number,
      or a `LatencyBudget` with batch size, mode and threads; see `select_for_latency`. What was predicted and
      measured is in `plan.notes["latency"]`.
    - `scope`, `round_to`, `min_keep`, `max_cut`, `ignore`, and for the rest `selection`: which units may stay, see
      `Selection`.
    - `optimizer`, `averaged`: see `apply`.
    - `verify`: whether to rehearse.
    - `strict`: whether groups whose cut turns out wrong are an error that names them. By default they are left whole
      with a warning in the log and their reasons in the result's `frozen`, and the others are cut.

    **Returns:** a `PruneResult`.

    **Raises:** `TraceError`, `SelectionError`, `SurgeryError`, or (`strict`) `VerificationError` naming the groups
    whose cut would be wrong; the model is then as before.

    ```python
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    >>> result = prune(net, torch.zeros(1, 3, 8, 8), keep=0.5)
    >>> print(result)
                before  after   left
    MACs         8,928  4,464  50.0%
    parameters     260    132  50.8%
    units            8      4  50.0%
    the cut network equals the masked one to ...
    >>> net[0].out_channels
    4

    ```
    """
    budget = Budget(keep, macs, parameters, latency)
    direct = {"scope": scope, "round_to": round_to, "min_keep": min_keep, "max_cut": max_cut, "ignore": ignore}
    selection = merged(selection or Selection(), **direct)
    rules = Rules(criterion, selection, scoring or Scoring(), verify, strict)
    rules.check(budget)
    inner = unwrap(model)
    check_optimizers(optimizer, inner)
    check_averaged(averaged, inner)
    cache = CutCache()
    network = scored(inner, example_inputs, rules, loader)
    planned = network.planned(budget, cache)
    for other in network.alternatives(planned, loader):
        fresh = CutCache()
        with suppress(FilterfoldError):
            better = other.planned(budget, fresh)
            if locked(better.groups) < locked(planned.groups):
                network, planned, cache = other, better, fresh
    return network.cut(planned, model, optimizer=optimizer, averaged=averaged, cache=cache)


def check_optimizers(optimizer: Optimizers, model: nn.Module) -> None:
    """Refuse an optimizer that holds none of a network's parameters: it was made for another one."""
    own = {id(parameter) for parameter in model.parameters()}
    for entry in optimizer if isinstance(optimizer, Sequence) else [] if optimizer is None else [optimizer]:
        if not isinstance(entry, torch.optim.Optimizer):
            raise ConfigError(f"optimizer={type(entry).__name__}: must be a torch.optim.Optimizer, or several")
        if not any(id(parameter) in own for group in entry.param_groups for parameter in group["params"]):
            raise ConfigError(f"{type(entry).__name__} holds no parameter of this model: was it built for another one?")


def check_averaged(averaged: nn.Module | Sequence[nn.Module], model: nn.Module) -> None:
    """Refuse an averaged copy that is none: another network, or the network itself."""
    for entry in [averaged] if isinstance(averaged, nn.Module) else averaged:
        copy = unwrap(entry)
        if copy is model or _shapes(copy) != _shapes(model):
            raise ConfigError(f"averaged: {type(copy).__name__} is no copy of the network, with tensors as it has them")


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: () if nn.parameter.is_lazy(tensor) else tuple(tensor.shape) for n, tensor in named_tensors(model)}
