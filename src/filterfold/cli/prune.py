"""`filterfold prune`: make a trained network smaller."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from typer import Option

from ..errors import ConfigError, PlanError
from ..plan import Plan
from ..training.recipe import Recipe, Schedule
from ..utils.io import write_json
from .display import change, count, live, say, table
from .figures import Figures
from .inspect import image_shape
from .options import (
    SHOWN,
    DataOptions,
    Device,
    ModelOptions,
    Overwrite,
    Threads,
    refuse_existing,
    use_threads,
)
from .teacher import DistillationOptions
from .weights import TrainedNetwork, WeightOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..data import ImageData
    from ..profiling import LatencyComparison
    from ..pruning.scored import PruneResult


EXAMPLES = """
Examples:

  filterfold prune --model vgg16 --weights vgg16.safetensors --data cifar10 --keep 0.5 --out small.safetensors

  filterfold prune -m resnet56 -w resnet56.safetensors -d cifar10 --macs 0.5 --round-to 8 --epochs 40

  filterfold prune -m vgg16 -w vgg16.safetensors -d cifar10 --latency 0.25 --out fast.safetensors

  filterfold prune -m vgg16 -w vgg16.safetensors --keep 'features.0=0.5' --keep 'features.3?=0.25' --out s.safetensors
"""


BATCH, BATCHES = 128, 10
"""Up to 1,280 training images, to score filters and to repair on."""


TIMED, CALLS, AFFORDED = (1, 64), 36, 20.0
"""Batch sizes at which the network is timed before and after; the least calls at each; seconds that they may take."""


_cut_option = partial(Option, rich_help_panel="Cut")


@dataclass(frozen=True)
class CutOptions:
    """How much to cut, and what."""

    keep: Annotated[
        list[str] | None,
        Option(help="Share of filters to keep: 0.5; or GROUP=0.5, several times, with * and ?."),
    ] = None
    macs: Annotated[float | None, Option(help="Share of the MACs that may remain.")] = None
    parameters: Annotated[float | None, _cut_option(help="Share of parameters that may remain.")] = None
    latency: Annotated[
        float | None, _cut_option(help="Share of the time, measured on this device, that may remain.")
    ] = None
    latency_batch: Annotated[int, _cut_option(help="Images at a time for --latency.", min=1)] = 64
    criterion: Annotated[str, Option(help="l1, l2, random, fpgm, taylor, reconstruction, …")] = "l1"
    scope: Annotated[str, _cut_option(help="Rank filters by layer or all together: layer, global.")] = "layer"
    round_to: Annotated[int, _cut_option(help="Keep multiples of so many filters.")] = 1
    min_keep: Annotated[int, _cut_option(help="Keep at least so many in each group.")] = 1
    ignore: Annotated[list[str] | None, _cut_option(help="Groups to leave alone, with * and ?.")] = None

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of `filterfold.prune`."""
        from ..pruning.budgets import LatencyBudget, Selection

        if sum(bool(budget) for budget in (self.keep, self.macs, self.parameters, self.latency)) != 1:
            raise ConfigError(
                "say how much may stay: one of --keep, --macs, --parameters and --latency, such as --keep 0.5"
            )
        return {
            "keep": _shares(self.keep) if self.keep else None,
            "macs": self.macs,
            "parameters": self.parameters,
            "latency": LatencyBudget(self.latency, batch_size=self.latency_batch) if self.latency else None,
            "criterion": self.criterion,
            "selection": Selection(cast(Any, self.scope), self.round_to, self.min_keep, tuple(self.ignore or ())),
        }


@dataclass(frozen=True, slots=True)
class Retraining(Recipe):
    """How the smaller network is trained on: not at all, unless epochs are given."""

    epochs: int = 0
    lr: float = 0.01
    schedule: Schedule = "warmup-cosine"
    warmup: float = 0.1

    def __post_init__(self) -> None:
        """Refuse values that make no sense, or have no effect."""
        if self.epochs:
            Recipe.__post_init__(self)
            return
        for entry in fields(self):
            if getattr(self, entry.name) != entry.default:
                raise ConfigError(f"--{entry.name.replace('_', '-')} has no effect without --epochs")

    def seeded(self, seed: int) -> Recipe | None:
        """The recipe, or None for no training."""
        return replace(self, seed=seed) if self.epochs else None


RETRAINED = {name: SHOWN[name] for name in SHOWN if name not in ("step_every", "step_factor", "validate_every")}
RETRAINED["epochs"] = Option("--epochs", "-e", help="Train on after the cut.", rich_help_panel="Training", min=0)


def prune(
    chosen: ModelOptions,
    images: DataOptions,
    cut: CutOptions,
    trained: WeightOptions,
    retraining: Annotated[Retraining, RETRAINED],
    teaching: DistillationOptions,
    out: Annotated[Path, Option("--out", "-o", help="The pruned network's file.")] = Path("pruned.safetensors"),
    onnx: Annotated[Path | None, Option(help="Also write an ONNX file, checked in ONNX Runtime.")] = None,
    overwrite: Overwrite = False,
    repair: Annotated[
        bool, Option("--repair", help="Solve the layers behind cut ones anew on 1,280 training images.")
    ] = False,
    evaluate: Annotated[bool, Option(help="Measure top-1 on the test images before and after.")] = True,
    timing: Annotated[
        bool,
        Option(" /--no-timing", show_default=False, help="Don't time both networks in the end. Ctrl-C ends it alone."),
    ] = True,
    image: Annotated[
        str | None, Option("--input", help="Channels x height x width, instead of --data, where no images are needed.")
    ] = None,
    classes: Annotated[int | None, Option(help="Number of outputs, with --input.", show_default="10")] = None,
    seed: Annotated[int, Option(help="Of random scores and retraining.")] = 0,
    device: Device = "auto",
    threads: Threads = None,
) -> Figures:
    """Cut filters out of a trained network, prove the cut right, and show what it cost and gained.

    With --epochs the smaller network is trained on; a run that was stopped goes on with the same command. With
    --no-evaluate and --input 3x224x224 no images are read, where the criterion needs none.
    """
    from .. import prune as prune_model
    from .. import repair as repair_model
    from .. import save
    from ..bench.trials.context import resolve
    from ..bench.trials.start import code_of, input_of, network_of
    from ..data import batches
    from ..export.program import to_onnx
    from ..online import DistillationCallback
    from ..pruning.scored import Scoring
    from ..training import train
    from ..utils.environment import command, describe

    use_threads(threads)
    budget, recipe = cut.keywords(), retraining.seeded(seed)
    teaching.check(recipe is not None)
    if image is None and classes is not None:
        raise ConfigError("--classes has no effect without --input: the images say how many there are")
    if image is not None and images != DataOptions():
        raise ConfigError("options of the images have no effect with --input: give one of both")
    classes = 10 if classes is None else classes
    shape = _without_images(image, cut.criterion, {"--repair": repair, "--epochs": recipe, "evaluation": evaluate})
    asked = (chosen, images, cut, trained, retraining, teaching, str(onnx), repair, seed)
    begun = _Unfinished(out, asked if shape is None else (*asked, shape, classes))
    for path in filter(None, (out, onnx)):
        refuse_existing(path, overwrite or begun.before)
    device = resolve(device)
    with live():
        found = trained.bare(chosen, shape, classes, device) if shape else trained.network(chosen, images, device)
        data = found.data if isinstance(found, TrainedNetwork) else None
        model, example, before = found.model, found.example, copy.deepcopy(found.model)
        top1 = partial(_top1, data=data if evaluate else None)
        feed = () if data is None else batches(data.train, BATCH, shuffle=True, seed=seed, device=device)
        loader, scoring = list(islice(feed, BATCHES)), Scoring(seed=seed)
        result = begun.keep(prune_model(model, example, loader=loader, scoring=scoring, **begun.budget(budget)))
        stages = {"before": top1(before), "after the cut": top1(model)}
        if repair:
            repair_model(model, before, result.plan, loader, batches=len(loader))  # says in the log what it did
            stages["after repair"] = top1(model)
        checkpoint = begun.checkpoint(model, result.plan) if recipe else None
        if recipe and data is not None:
            teacher = teaching.distillation(before, chosen, data)
            callbacks = [] if teacher is None else [DistillationCallback(teacher)]
            train(model, data, recipe, callbacks=callbacks, checkpoint=checkpoint, device=device, phase="retrain")
            stages["after retraining"] = top1(model)
        about = {
            "command": command(),
            "test_top1": stages,
            "environment": describe(),
            "input": input_of(found.data, found.images.keywords()) if isinstance(found, TrainedNetwork) else None,
            "weights": found.fingerprint,
            **(
                network_of(chosen.model, chosen.width, data)
                if data is not None
                else code_of(chosen.model, chosen.width, tuple(example.shape[1:]), classes)
            ),
        }
        begun.note()
        save(model, out, plan=result.plan, metadata=about)
        if onnx is not None:
            to_onnx(copy.deepcopy(model).cpu(), example.cpu(), onnx)
        begun.end(checkpoint)
        latency = _timed(before, model, example) if timing else {}
    shown = Figures(_document(result, stages, latency), partial(_show, result, stages, latency)).adding(network=out)
    return shown if onnx is None else shown.adding(onnx=onnx)


def _without_images(image: str | None, criterion: str, needs: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """The input's shape if nothing is to be loaded; None if there will be images.

    **Raises:** `ConfigError` naming what needs images.
    """
    from ..pruning.criteria.registry import resolve

    if image is None:
        return None
    needed = [name for name, value in needs.items() if value]
    needed += [f"--criterion {criterion}"] if resolve(criterion).gather is not None else []
    if needed:
        hint = "add --no-evaluate" if needed == ["evaluation"] else "give --data instead"
        raise ConfigError(f"--input {image}: {', '.join(needed)} needs images; {hint}")
    return image_shape(image)


def _timed(before: nn.Module, after: nn.Module, example: Tensor) -> dict[int, LatencyComparison]:
    """Batch size → times of both networks, where that takes no longer than `AFFORDED`; Ctrl-C leaves the rest out."""
    from ..profiling import measure_latency

    found: dict[int, LatencyComparison] = {}
    try:
        for size in TIMED:
            expected = CALLS * size * found[1].row("before", 1).median if found else 0.0
            if expected > AFFORDED:
                say(f"batch {size} is not timed: that might take {expected:.0f} s; filterfold latency does it")
                continue
            networks = {"before": before, "after": after}
            found[size] = measure_latency(networks, example, batch_sizes=[size], repeats=10, warmup=1)
    except KeyboardInterrupt:
        say("timing was interrupted; the network is written")
    return found


class _Unfinished:
    """A note beside the output that a command is at work on it, so that the same command can go on after a kill.

    **Arguments:**

    - `out`: the output.
    - `asked`: options that it depends on.
    """

    def __init__(self, out: Path, asked: tuple[Any, ...]) -> None:
        self._asked = hashlib.sha256(repr(asked).encode()).hexdigest()[:16]
        self._file = out.with_name(f".{out.name}.unfinished")
        self.before, self._plan = False, None
        """Whether this very command was begun before and did not end: what is there is its own. Its plan, if timed."""
        with suppress(OSError, ValueError, KeyError, TypeError, PlanError):
            found = json.loads(self._file.read_text(encoding="utf-8"))
            if found["asked"] == self._asked:
                self.before, plan = True, found["plan"]
                self._plan = None if plan is None else Plan.from_json(json.dumps(plan))

    def note(self) -> None:
        """Begin, or go on."""
        plan = None if self._plan is None else json.loads(self._plan.to_json())
        write_json(self._file, {"asked": self._asked, "plan": plan})

    def budget(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The budget that was asked for; or the widths found before: times measured anew would give other ones."""
        if self._plan is None:
            return asked
        widths = {name: new / old for name, (old, new) in self._plan.widths.items()}
        return {**asked, "latency": None, "round_to": 1, "keep": widths}

    def keep(self, result: PruneResult) -> PruneResult:
        """Keep a timed plan in the note; a result with the same widths as before gets the plan of the note."""
        if "latency" in result.plan.notes:
            self._plan = result.plan
            self.note()
        if self._plan is not None and self._plan.cuts == result.plan.cuts:
            return replace(result, plan=self._plan)
        return result

    def checkpoint(self, model: nn.Module, plan: Plan) -> Path:
        """Where retraining keeps its state; that of another cut network is another file."""
        weights = b"".join(value.cpu().numpy().tobytes() for value in model.state_dict().values())
        cut = hashlib.sha256(weights + plan.to_json().encode()).hexdigest()[:10]
        return self._file.with_suffix(f".{cut}")

    def end(self, checkpoint: Path | None) -> None:
        """Remove what only a command that goes on needs."""
        if checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
        self._file.unlink()


def _top1(model: nn.Module, data: ImageData | None) -> float | None:
    from ..training import evaluate

    return None if data is None else evaluate(model, data.test, classes=len(data.classes)).top1


def _document(
    result: PruneResult, stages: Mapping[str, float | None], latency: Mapping[int, LatencyComparison]
) -> dict[str, Any]:
    sides = {"before": result.before, "after": result.after}
    return {
        **{side: {"macs": cost.macs, "parameters": cost.parameters} for side, cost in sides.items()},
        "widths": result.plan.widths,
        "test_top1": stages,
        "latency": {size: found.to_dict() for size, found in latency.items()},
        "left_whole": result.frozen,
        "verified": str(result.verified),
        "notes": result.plan.notes,
    }


def _show(result: PruneResult, stages: Mapping[str, float | None], latency: Mapping[int, LatencyComparison]) -> None:
    widths = result.plan.widths
    rows = [(name, str(old), str(new), change(old, new)) for name, (old, new) in widths.items()]
    table("Units in each group", ("group", "before", "after", ""), rows)
    rows = [
        (name, count(old), count(new), change(old, new))
        for name, old, new in (
            ("MACs", result.before.macs, result.after.macs),
            ("parameters", result.before.parameters, result.after.parameters),
        )
    ]
    for size, timed in latency.items():
        old, new = (timed.row(name, size).median for name in ("before", "after"))
        rows.append((f"latency, batch {size}", f"{1e3 * old:.3g} ms", f"{1e3 * new:.3g} ms", f"{old / new:.2f}×"))
    first = stages["before"]
    for name, top1 in stages.items():
        if first is not None and top1 is not None and name != "before":
            rows.append((f"top-1 (test) {name}", f"{first:.2f} %", f"{top1:.2f} %", f"{top1 - first:+.2f}"))
    table("The network", ("", "before", "after", ""), rows)
    if found := result.plan.notes.get("latency"):
        shares = ", ".join(f"{name} {found[name]:.1%}" for name in ("asked", "predicted", "measured"))
        low, high = found["interval"]
        say(f"time at batch {found['batch_size']}: {shares} (95 %: {low:.1%} to {high:.1%})")
    for name, reason in result.frozen.items():
        say(f"left whole: {name}: {reason}")
    say(f"verified: {result.verified}")


def _shares(given: list[str]) -> float | dict[str, float]:
    """One share, or shares by group.

    >>> _shares(["0.5"]), _shares(["layer1.*=0.4", "layer2.*=0.7"])
    (0.5, {'layer1.*': 0.4, 'layer2.*': 0.7})
    """
    try:
        if len(given) == 1 and "=" not in given[0]:
            return float(given[0])
        pairs = [entry.rpartition("=") for entry in given]
        return {pattern: float(share) for pattern, _, share in pairs}
    except ValueError:
        raise ConfigError(f"--keep {' '.join(given)}: give a share such as 0.5, or GROUP=0.5 several times") from None
