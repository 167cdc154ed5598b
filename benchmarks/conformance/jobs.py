"""The two jobs of the conformance run: prune one network by Filterfold, and by the nearest peer."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import filterfold as ff
from filterfold.errors import SelectionError

from .models import Entry, build
from .oracle import TOLERANCE, dead, emptied, error, masked, outputs, randomise

AT_OUTPUT = "reaches the model's output"
KEEP = 0.5


def prepared(entry: Entry) -> tuple[nn.Module, Tensor]:
    """The network with generic random weights, and its input; the same every time."""
    torch.manual_seed(0)
    model = build(entry.name)
    randomise(model)
    return model, torch.randn(entry.shape)


def ours(entry: Entry) -> dict[str, Any]:
    """Prune half of every group with verification on; then judge by the independent oracle."""
    model, inputs = prepared(entry)
    original = copy.deepcopy(model)
    clock = Clock()
    try:
        result = ff.prune(model, inputs, criterion="l1", keep=KEEP)
    except ff.FilterfoldError as reason:
        return {"status": "refused", "why": _line(reason), **clock.read()}
    report = {**clock.read(), **summary(result), "left": _size(model) / _size(original)}
    report["output_layers"] = [g.name for g in result.groups if g.frozen == AT_OUTPUT]
    found, how = judged(original, model, result, inputs)
    report |= {"error": found, "judged": how}
    if found is None or not found <= TOLERANCE:
        report["status"] = "wrong"
    return report


def summary(result: Any) -> dict[str, Any]:
    """What was cut, and what was not and why."""
    frozen = [g for g in result.groups if g.frozen and g.frozen != AT_OUTPUT]
    kept = [cut.group for cut in result.plan.cuts if not cut.changes and not _is_one_channel(cut)]
    names = [g.name for g in frozen]
    whole = [*names, *(name for name in kept if name not in names)]
    reasons = Counter(str(g.frozen) for g in frozen)
    reasons["so tied that no unit can go"] += len(whole) - len(names)
    return {
        "status": "partly" if whole else "wholly",
        "groups": len(result.groups),
        "cut": sum(cut.changes for cut in result.plan.cuts),
        "frozen": len(frozen),
        "not_cut": whole,
        "reasons": [
            f"{reason} ({times} groups)" if times > 1 else reason for reason, times in reasons.items() if times
        ],
        "inexact": sum(not g.exact for g in result.groups if not g.frozen),
        "rewritten": len(result.plan.attributes),
        "verified": bool(result.verified),
        "verdict": str(result.verified),
    }


def _is_one_channel(cut: Any) -> bool:
    """Whether a group is a single channel, as the map of a spatial attention is: nothing to take half of."""
    return cut.size == 1 and all(sum(unit == 0 for unit in part.units) == 1 for part in cut.producers)


def judged(original: nn.Module, pruned: nn.Module, result: Any, inputs: Tensor) -> tuple[float | None, str]:
    """The independent error against a masked float64 copy, and how much of the cut it speaks for.

    Units that are multiplied and summed over (queries and keys) have no kernels to mask: they are dead at their source.
    Where some groups are not exact (normalisation over channels), masking speaks only for the others: a
    second copy is cut with the inexact ones left whole. The whole cut must run in any case.
    """
    expected_shapes = [t.shape for t in outputs(original, inputs)]
    if [t.shape for t in outputs(pruned, inputs)] != expected_shapes:
        return None, "the outputs have other shapes"
    summed = {g.name for g in result.groups if g.zeros_vanish and not g.frozen}
    inexact = [g.name for g in result.groups if not g.exact and not g.frozen and g.name not in summed]
    plan, small, how = result.plan, pruned, "all groups against the masked network"
    if inexact:
        small = copy.deepcopy(original)
        skip = [*inexact, *(g.name for g in result.groups if g.frozen and g.frozen != AT_OUTPUT)]
        try:
            plan = ff.prune(small, inputs, keep=KEEP, ignore=skip).plan
        except SelectionError:
            return 0.0, "no exact groups: runs, and the library's own permutation oracle"
        how = f"{sum(cut.changes for cut in plan.cuts)} exact groups against the masked network"
    with torch.inference_mode():
        wide = inputs.double()
    reference = dead(masked(original, plan), plan, summed)
    return error(outputs(reference, wide), outputs(small.double(), wide)), how


def peer(entry: Entry, output_layers: Sequence[str], exact: bool) -> dict[str, Any]:
    """The same job by Torch-Pruning: half of everything by L1, the layers at the output left whole."""
    import torch_pruning as tp

    model, inputs = prepared(entry)
    original = copy.deepcopy(model)
    modules = dict(model.named_modules())
    ignored = [modules[name] for name in output_layers if name in modules]
    clock = Clock()
    try:
        pruner = tp.pruner.MagnitudePruner(
            model, inputs, tp.importance.MagnitudeImportance(p=1), pruning_ratio=1 - KEEP, ignored_layers=ignored
        )
        pruner.step()
    except Exception as reason:
        return {"status": "crash", "why": _line(reason), **clock.read()}
    report: dict[str, Any] = {**clock.read(), "left": _size(model) / _size(original)}
    expected = outputs(original, inputs)
    try:
        shapes = [t.shape for t in outputs(model, inputs)]
    except Exception as reason:
        return {**report, "status": "broken", "why": _line(reason)}
    if shapes != [t.shape for t in expected]:
        return {**report, "status": "broken", "why": "the outputs have other shapes"}
    if _size(model) == _size(original):
        return {**report, "status": "nothing cut"}
    return {**report, **_peer_verdict(original, model, inputs, exact)}


def _peer_verdict(original: nn.Module, pruned: nn.Module, inputs: Tensor, exact: bool) -> dict[str, Any]:
    if not exact:
        return {"status": "runs", "judged": "runs; not mask-exact, so not judged further"}
    reference = emptied(original, pruned)
    if reference is None:
        return {"status": "runs", "judged": "runs; what was removed could not be told"}
    wide = inputs.double()
    found = error(outputs(reference, wide), outputs(pruned.double(), wide))
    return {"status": "runs" if found <= TOLERANCE else "wrong", "error": found, "judged": "against the masked network"}


class Clock:
    """Seconds since it was made: processor time of this process, which other load does not stretch, and wall time."""

    def __init__(self) -> None:
        """Start."""
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def read(self) -> dict[str, float]:
        """Both times, rounded to milliseconds."""
        return {
            "seconds": round(time.process_time() - self._cpu, 3),
            "wall_seconds": round(time.perf_counter() - self._wall, 3),
        }


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _line(reason: BaseException) -> str:
    text = next((line.strip() for line in str(reason).splitlines() if line.strip()), "no reason given")
    return f"{type(reason).__name__}: {text}"[:240]
