"""Kernels solved once more, layer by layer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError, ModelError, PlanError
from ...plan import Plan
from ...surgery.index_maps import AxisCut, edits_of
from ...utils.model_state import preserved, random_state_preserved
from ...utils.modules import named_tensors, unwrap
from ...utils.progress import track
from .calibration import ReachedError, gathered, measure_norms, run
from .least_squares import Sums, exact, spatial, unsolvable, watched

_LOG = logging.getLogger("filterfold.pruning.reconstruction")


@dataclass(frozen=True, slots=True)
class RepairedLayer:
    """One layer's error ‖output - wanted‖ / ‖wanted‖ on the calibration images, with its inputs from the cut network.

    **Arguments:**

    - `name`: qualified name.
    - `before`, `after`: the error with the kernels that the cut left, and with the new ones. In front of a batch norm
      outputs are taken without their means, which the batch norm takes away.
    """

    name: str
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Repair:
    """What `repair` did.

    **Arguments:**

    - `layers`: the layers solved, in the order in which they run.
    - `skipped`: layer name → why its kernels were left as they are.
    """

    layers: tuple[RepairedLayer, ...]
    skipped: Mapping[str, str]

    def __str__(self) -> str:
        """One line for logs."""
        if not self.layers:
            return f"no layer repaired, {len(self.skipped)} skipped"
        before, after = (sum(getattr(row, side) for row in self.layers) / len(self.layers) for side in _SIDES)
        return (
            f"{len(self.layers)} layers repaired, {len(self.skipped)} skipped: "
            f"mean relative error {before:.3g} -> {after:.3g}"
        )


_SIDES = ("before", "after")


def repair(
    pruned: nn.Module,
    original: nn.Module,
    plan: Plan,
    loader: Iterable[Any],
    *,
    batches: int = 8,
    ridge: float | None = None,
) -> Repair:
    """Solve the layers that read cut channels once more, so that their outputs match the uncut network's.

    Convolutions (one- and two-dimensional, group by group) and linear layers that the plan cuts as consumers get new
    kernels and, where they have one, a new bias. A batch norm that directly follows such a layer is given the
    statistics of its new output, so that the layers behind it see what they will see; at the end all batch norms are
    measured again as by `reestimate`. Nothing else of the models changes; an optimizer's momentum is not touched.

    **Arguments:**

    - `pruned`: the network after the cut; changed in place.
    - `original`: the network before it (a deep copy), on the same device.
    - `plan`: the cut: `PruneResult.plan`, or what `apply` was given.
    - `loader`: as in `reestimate`; a thousand training images are plenty. They are kept in memory.
    - `batches`: use at most so many.
    - `ridge`: weight of staying near the present kernels, relative to the inputs' mean square. Above 0. None: for each
      layer the one of `RIDGES` whose kernels, solved on every second example, leave the least error on the others. Too
      small a ridge gives kernels that fit these images only.

    **Returns:** a `Repair`: each layer's error before and after.

    **Raises:** `ConfigError` for a ridge of 0 or less, `DataError` for an empty loader, `PlanError` if the plan is of
    another network, `ModelError` if a network can't run on a batch. The network is then as before.

    ```python
    >>> from copy import deepcopy
    >>> import filterfold as ff
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)).eval()
    >>> original, images = deepcopy(net), torch.randn(256, 4)
    >>> plan = ff.prune(net, images[:1], keep=0.5).plan
    >>> layer, = repair(net, original, plan, [images]).layers
    >>> layer.name, layer.after < layer.before
    ('2', True)

    ```
    """
    if ridge is not None and not ridge > 0:
        raise ConfigError(f"ridge={ridge}: must be above 0, such as 1e-3, or None")
    pruned, original = unwrap(pruned), unwrap(original)
    saved = [(tensor, tensor.detach().clone()) for _, tensor in named_tensors(pruned)]
    with random_state_preserved(pruned):
        inputs = gathered(pruned, loader, batches)
        try:
            with preserved(pruned, original), torch.no_grad():
                sites, skipped = _sites(pruned, original, plan, inputs[0])
                stream = track(sites, "repairing layers", len(sites))
                rows = [_solved(site, pruned, original, inputs, ridge) for site in stream]
            measure_norms(pruned, inputs)
        except BaseException:
            with torch.no_grad():
                for tensor, value in saved:
                    tensor.copy_(value)
            raise
    for name, reason in skipped.items():
        _LOG.info("%s: kernels left as they are: %s", name, reason)
    result = Repair(tuple(rows), skipped)
    _LOG.info("%s", result)
    return result


@dataclass(frozen=True, slots=True)
class _Site:
    """A layer to be solved: its module in both networks, what the cut did to its outputs, and its batch norm."""

    name: str
    module: Any
    twin: Any
    outputs: AxisCut | None
    norm: Any


def _sites(pruned: nn.Module, original: nn.Module, plan: Plan, inputs: Any) -> tuple[list[_Site], dict[str, str]]:
    """The layers that read cut channels, in the order in which they run, and those that can't be solved."""
    twins = dict(original.named_modules(remove_duplicate=False))
    edits = edits_of(plan, dict(named_tensors(original)))
    slices = (part for cut in plan.cuts if cut.changes for part in cut.consumers if part.role == "kernel")
    wanted = dict.fromkeys(part.tensor for part in slices)
    modules, skipped = {}, {}
    for tensor in wanted:
        name, _, leaf = tensor.rpartition(".")
        try:
            module = pruned.get_submodule(name)
        except AttributeError:
            raise PlanError(f"the plan cuts {tensor}, which the pruned network does not have") from None
        reason = unsolvable(module, leaf, pruned)
        if reason is None:
            modules[name] = module
        else:
            skipped[tensor] = reason
    calls, norms = watched(pruned, modules, inputs)
    sites = []
    for name in dict.fromkeys(calls):
        if calls.count(name) > 1:
            skipped[name] = "runs several times"
            continue
        own = edits.get(f"{name}.weight", {}).get(0)
        sites.append(_Site(name, modules[name], twins[name], own, norms.get(name)))
    skipped |= {name: "is not called as a module" for name in modules if name not in calls}
    return sites, skipped


def _seen(model: nn.Module, module: nn.Module, inputs: Any) -> tuple[Tensor, Tensor]:
    """The input and the output of a module when the model runs."""
    found: list[tuple[Tensor, Tensor]] = []

    def hook(_module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        found.append((args[0] if args else kwargs["input"], output))
        raise ReachedError

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        run(model, inputs)
    except ReachedError:
        pass
    finally:
        handle.remove()
    if not found:
        raise ModelError("a layer that ran on the first batch did not run on a later one, or not in the uncut network")
    return found[0]


def _solved(
    site: _Site, pruned: nn.Module, original: nn.Module, inputs: list[Any], ridge: float | None
) -> RepairedLayer:
    """Solve one layer and write its new kernels down."""
    module = site.module
    bias = None if module.bias is None else exact(module.bias)
    groups = getattr(module, "groups", 1)
    sums = Sums()
    for batch in inputs:
        data, output = _seen(pruned, module, batch)
        wanted = _wanted(site, _seen(original, site.twin, batch)[1], bias)
        if wanted.shape != output.shape:
            raise PlanError(f"{site.name}: the plan gives outputs {_text(wanted)}, the pruned network {_text(output)}")
        sums.add(module, groups, data, exact(output), wanted)
    centred = bias is not None or site.norm is not None
    ridge = sums.best_ridge(centred=centred) if ridge is None else ridge
    shift, offset, before, after = sums.solve(ridge, centred=centred, bias=bias)
    kernels = exact(module.weight).reshape(groups, module.weight.shape[0] // groups, -1).mT + shift
    module.weight.copy_(kernels.mT.reshape(module.weight.shape))
    if bias is not None:
        bias = bias + offset.flatten()
        module.bias.copy_(bias)
    if site.norm is not None:
        mean, var = sums.moments(kernels, bias)
        site.norm.running_mean.copy_(mean)
        site.norm.running_var.copy_(var)
    return RepairedLayer(site.name, before, after)


def _wanted(site: _Site, output: Tensor, bias: Tensor | None) -> Tensor:
    """What the cut made of the layer's outputs, applied to the uncut layer's: its rows, or blends of them."""
    value = exact(output)
    if site.outputs is None:
        return value
    axis = value.dim() - 1 if isinstance(site.module, nn.Linear) else value.dim() - spatial(site.module) - 1
    view = [-1 if dim == axis else 1 for dim in range(value.dim())]
    if site.twin.bias is None or bias is None:
        return site.outputs.apply(value, axis, "value")
    return site.outputs.apply(value - exact(site.twin.bias).view(view), axis, "value") + bias.view(view)


def _text(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
