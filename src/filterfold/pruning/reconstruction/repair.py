"""Kernels solved once more, each layer when the cut network reaches it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...errors import ConfigError, PlanError
from ...plan import Plan
from ...surgery.index_maps import Edit, edits_of
from ...utils.arguments import typed
from ...utils.model_state import preserved, random_state_preserved
from ...utils.modules import named_tensors, unwrap
from .calibration import Images, ReachedError, gathered, run
from .operations import Key
from .passes import Record, RepairedLayer, Solve

_LOG = logging.getLogger("filterfold.pruning.reconstruction")


@dataclass(frozen=True, slots=True)
class Repair:
    """What `repair` did.

    **Arguments:**

    - `layers`: the layers solved, in the order in which they run.
    - `skipped`: layer that reads cut channels → why its kernels were left as they are.
    - `images`: how many examples were used.
    - `left_out`: how many more there were, left out because the activations of all take too much memory at once, or
      because they can't be joined with the others.
    """

    layers: tuple[RepairedLayer, ...]
    skipped: Mapping[str, str]
    images: int
    left_out: int

    def __str__(self) -> str:
        """One line for logs."""
        end = f"; {self.left_out} of {self.images + self.left_out} images left out" if self.left_out else ""
        if not self.layers:
            return f"no layer repaired, {len(self.skipped)} skipped{end}"
        before, after = (sum(getattr(row, side) for row in self.layers) / len(self.layers) for side in _SIDES)
        return (
            f"{len(self.layers)} layers repaired, {len(self.skipped)} skipped: "
            f"mean relative error {before:.3g} -> {after:.3g}{end}"
        )


_SIDES = ("before", "after")


@typed
def repair(
    pruned: nn.Module,
    original: nn.Module,
    plan: Plan,
    loader: Iterable[Any],
    *,
    batches: int = 8,
    ridge: float | None = None,
) -> Repair:
    """Solve the layers behind a cut once more, so that their outputs match the uncut network's.

    Every convolution (plain, grouped, transposed; over any number of axes), linear layer and matrix product that reads
    cut channels, or anything else that the cut has changed, gets a new kernel and, where it has one, a new bias: in the
    order in which they run, each from what the repaired ones before it give. It does not matter which class or function
    calls them. A layer that runs several times is solved for all its inputs together. Batch norms are measured again
    when they are reached, so that what lies behind sees what it will see. Nothing else changes; an optimizer's momentum
    is not touched. What can't be solved is left as it is, by name.

    Images are taken all at once, as many as take `calibration.MEMORY` (4 GiB) of activations; of the outputs, 20,000
    rows a layer. Labels are not read.

    **Arguments:**

    - `pruned`: the network after the cut; changed in place.
    - `original`: the network before it (a deep copy), on the same device.
    - `plan`: the cut: `PruneResult.plan`, or what `apply` was given.
    - `loader`: as in `reestimate`; 256 to 1,000 training images are plenty. They are kept in memory.
    - `batches`: use at most so many.
    - `ridge`: weight of staying near the present kernels, relative to the inputs' mean square. Above 0. None: for each
      layer the one of `RIDGES` whose kernels, solved on every second example, leave the least error on the others. Too
      small a ridge gives kernels that fit these images only. Without a batch norm behind it, a kernel also grows no
      more than doing the same with fewer inputs asks for: logits that come from small differences of features are
      thrown off by the first steps of training.

    **Returns:** a `Repair`: each layer's error before and after, and what was left as it is.

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
    if ridge is not None and not 0 < ridge < math.inf:
        raise ConfigError(f"ridge={ridge}: must be above 0, such as 1e-3, or None")
    pruned, original = unwrap(pruned), unwrap(original)
    saved = [(tensor, tensor.detach().clone()) for _, tensor in named_tensors(pruned)]
    with random_state_preserved(pruned):
        found = gathered(pruned, loader, batches)
        try:
            with preserved(pruned, original), torch.inference_mode():
                result = _repaired(pruned, original, plan, found, ridge)
        except BaseException:
            with torch.no_grad():
                for tensor, value in saved:
                    tensor.copy_(value)
            raise
    for name, reason in result.skipped.items():
        _LOG.info("%s: kernels left as they are: %s", name, reason)
    _LOG.info("%s", result)
    return result


def _repaired(pruned: nn.Module, original: nn.Module, plan: Plan, batches: list[Any], ridge: float | None) -> Repair:
    edits, readers = edits_of(plan, dict(named_tensors(original))), _readers(pruned, original, plan)
    images = Images.of(batches)
    record = _recorded(original, edits, readers, Images.of(batches[:1]))
    used = images.that_fit(record.peak, record.images)
    if used.count != record.images:
        record = _recorded(original, edits, readers, used)
    done: dict[Key, RepairedLayer | None] = {}
    again = True
    while again:
        again = False
        with random_state_preserved(pruned, seed=0), Solve(pruned, record, readers, ridge, done) as solve:
            try:
                run(pruned, used.inputs)
            except ReachedError:
                again = True
        if solve.waiting is not None:
            record.layers[solve.waiting[0]].reason = "it runs less often than in the uncut network"
            again = True
    skipped = {key[0]: layer.reason for key, layer in record.layers.items() if layer.reason and key[0] in readers}
    seen = {key[0] for key in done} | {*skipped}
    for name in readers:
        if name not in seen:
            skipped[name] = f"{record.others[name]} reads it" if name in record.others else "no product reads it"
    return Repair(tuple(row for row in done.values() if row), skipped, used.count, used.given - used.count)


def _recorded(original: nn.Module, edits: Mapping[str, Edit], readers: dict[str, None], images: Images) -> Record:
    record = Record(original, edits, readers, images.count)
    with random_state_preserved(original, seed=0), record:
        run(original, images.inputs)
    for (name, _), layer in record.layers.items():
        if name in record.others:  # solving it would change that as well
            layer.reason = f"{record.others[name]} reads it too"
        elif layer.reason is None and record.overlap(name):
            layer.reason = "several operations read it, each in its own way"
    return record


def _readers(pruned: nn.Module, original: nn.Module, plan: Plan) -> dict[str, None]:
    """The tensors that read cut channels, by their first names."""
    there = {name for name, _ in named_tensors(pruned)}
    tensors = dict(named_tensors(original))
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    found: dict[str, None] = {}
    for cut in plan.cuts:
        for part in cut.consumers if cut.changes else ():
            if part.role == "kernel":
                if part.tensor not in there:
                    raise PlanError(f"the plan cuts {part.tensor}, which the pruned network does not have")
                found[first[id(tensors[part.tensor])]] = None
    return found
