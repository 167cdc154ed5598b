"""`filterfold compare` and `filterfold demo`: many trials, then the table and the report."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from ..training.recipe import Recipe
from . import report
from .display import live
from .figures import Figures
from .options import (
    DataOptions,
    EngineOptions,
    ModelOptions,
    OnlineOptions,
    TrainingOptions,
    listed,
    setting_of,
)
from .report import MARGIN_HELP
from .teacher import DistillationOptions
from .weights import StartOptions

if TYPE_CHECKING:
    from ..bench.trials.runner import Outcome
    from ..bench.trials.setting import Setting


UNFINISHED = 3


FAILED = 1
"""Exit codes: stopped by --stop-after with work left (the same command goes on); all done, but some trial failed."""


EXAMPLES = """
Examples:

  filterfold compare --data cifar10 --model vgg16 --clusters 5,10,15,20,25,30 --trials 5 --epochs 100

  filterfold compare --data cifar10 --model vgg16 --methods dense,online --clusters 5,10,15,20,25,30 --stop-after 9m

  filterfold compare --data cifar10 --model vgg16 --width 0.25 --epochs 3 --train-limit 5000 --trials 3

  filterfold compare --data digits --model vgg_small --methods dense,l1,random,online,online-l1 --keep 0.5,0.25

  filterfold compare --data cifar10 --model resnet56 --keep 0.5 --out runs/resnet --stop-after 9m

  filterfold compare --data cifar10 --model resnet56 --keep 0.5 --parallel 4

  filterfold compare --data path/to/images --model timm:resnet18 --pretrained --new-head --epochs 5 --lr 0.01 --macs 0.5

  filterfold compare --data cifar10 --model vgg16 --methods dense,l1,random,largest,mean-std --keep 0.9,0.7,0.5,0.3,0.1
"""


DEMO_EXAMPLES = """
Examples:

  filterfold demo

  filterfold demo --trials 3 --keep 0.25 --out runs/quarter

  filterfold demo --parallel 2 --log tensorboard --out runs/logged
"""


METHODS_HELP = (
    "Comma-separated: dense, a criterion such as l1, online, scratch …; --help-all has all, and what they are."
)


METHODS = (
    "Comma-separated: dense; dense-long (as many epochs as training and retraining together); "
    "without --methods dense,l1,online and the controls dense-long,random,scratch,online-l1; "
    "a criterion such as l1 (the original algorithm: train, cut once, retrain), random, "
    "largest or mean-std; CRITERION-greedy or -iterative (its variants); scratch (the small network, fresh weights); "
    "scratch-long (for as many epochs as cost what online costs); online (fold clusters while training); "
    "online-CRITERION (the same schedule, dropping by a criterion); online-centroid (nothing removed); "
    "online…+repair, l1+repair (next kernels repaired after every cut); "
    "online…+distill, l1+distill, scratch+distill (with a teacher, see --distill); "
    "online…+early (cuts at 5, 10 and 15 % of training); "
    "online+centripetal, online+unpulled (filters brought together by the stronger rule, or not at all); "
    "online…+longer, scratch+longer (more epochs, for at most .7 of the dense training's MACs; from weights: as many)."
)


_rare = partial(Option, rich_help_panel="Comparison", hidden=True)


def compare(
    chosen: ModelOptions,
    beginning: StartOptions,
    images: DataOptions,
    training: TrainingOptions,
    clustering: OnlineOptions,
    teaching: DistillationOptions,
    running: EngineOptions,
    methods: Annotated[
        str | None,
        Option(help=METHODS_HELP, show_default="dense,l1,online and controls"),
    ] = None,
    clusters: Annotated[str | None, Option(help="Filters left in every layer by online methods: 5,10,30.")] = None,
    keep: Annotated[
        str | None,
        Option(
            help="Shares of the filters that stay, for every method that cuts: 0.5,0.25.",
            show_default="half, or as Li et al.",
        ),
    ] = None,
    macs: Annotated[
        str | None,
        Option(help="Shares of the multiply-accumulates that stay, likewise; online chooses each layer's width."),
    ] = None,
    crossover: Annotated[
        str | None,
        _rare(
            help="Instead of --epochs: train for each of these numbers of epochs, such as 0,1,2,4,8, to see where "
            "fresh weights catch up.",
            show_default="one training, of --epochs",
        ),
    ] = None,
    trials: Annotated[int, Option(help="Seeds for each method.")] = 5,
    first_seed: Annotated[int, _rare(help="The first seed.")] = 0,
    retrain_epochs: Annotated[
        int | None,
        _rare(help="After a one-shot cut.", show_default="40 % of --epochs: 40 for 100, as Li et al."),
    ] = None,
    retrain_lr: Annotated[float, _rare(help="Learning rate of retraining, constant or the highest.")] = 0.001,
    retrain_schedule: Annotated[str, _rare(help="constant; or as --schedule, over the retraining.")] = "constant",
    round_to: Annotated[int, _rare(help="Keep multiples of so many filters.")] = 1,
    margin: Annotated[float, Option(help=MARGIN_HELP)] = 0.5,
    out: Annotated[Path | None, Option(help="Run folder.", show_default="runs/MODEL-DATA")] = None,
) -> Figures:
    """Train and prune with several methods and seeds, and report which is worth it.

    With --weights or --pretrained every method trains from these weights, except those that are named scratch.

    Stop whenever you like: the same command goes on, here or on another machine, and tries failed trials again.
    """
    from ..bench.trials.config import COMPARED, CONTROLS, Comparison

    start, images = beginning.settle(chosen.model, images)
    names = teaching.methods([*COMPARED, *CONTROLS] if methods is None else listed(methods, "--methods", str))
    setting = setting_of(
        chosen,
        images,
        training,
        clustering,
        weights=start.weights,
        start=start.entries,
        distill=teaching.setting(),
        retrain_epochs=max(1, round(0.4 * training.epochs)) if retrain_epochs is None else retrain_epochs,
        retrain_lr=retrain_lr,
        retrain={} if retrain_schedule == "constant" else {"schedule": retrain_schedule},
        round_to=round_to,
    )
    comparison = Comparison.of(
        setting,
        names,
        clusters=listed(clusters, "--clusters", int),
        keep=listed(keep, "--keep", float),
        macs=listed(macs, "--macs", float),
        epochs=listed(crossover, "--crossover", int),
        seeds=range(first_seed, first_seed + trials),
    )
    folder = out or default_folder(setting)
    return figures(running.run(comparison, folder, cache_dir=images.cache_dir), folder, margin)


def figures(outcome: Outcome, folder: Path, margin: float) -> Figures:
    """Write a comparison's report; what it came to, with the exit code that says how far it came."""
    records = list(map(dict, outcome.records))
    found = report.figures(records, margin, code=exit_code(outcome))
    if records:
        with live():
            found = found.adding(report=report.write(records, folder, margin))
    if outcome.failed:
        found = found.adding(
            f"{len(outcome.failed)} of {outcome.total} trials failed; the same command tries them again"
        )
    elif not outcome.complete:
        what = f"{outcome.left} of {outcome.total} trials" if outcome.left else "timing"
        found = found.adding(f"stopped in time; still to do: {what}; the same command goes on from here")
    return found.adding(folder=folder)


def exit_code(outcome: Outcome) -> int:
    """0 if everything is done, else `UNFINISHED` or `FAILED`."""
    return 0 if outcome.complete else FAILED if outcome.failed and outcome.timed else UNFINISHED


@dataclass(frozen=True)
class DemoOptions(EngineOptions):
    """On one thread of the CPU: the images are so small that more only get in each other's way."""

    device: Annotated[str, Option(help="cpu, cuda, cuda:N, or auto.", rich_help_panel="How trials run")] = "cpu"
    threads: Annotated[int | None, Option(help="CPU threads.", min=1, rich_help_panel="How trials run")] = 1


def demo(
    running: DemoOptions,
    out: Annotated[Path, Option(help="Run folder.")] = Path("runs/demo"),
    trials: Annotated[int, Option(help="Seeds for each method.")] = 5,
    epochs: Annotated[int, Option("--epochs", "-e", help="Passes over the training images.")] = 20,
    keep: Annotated[float, Option(help="Share of the filters that stays.")] = 0.5,
) -> Figures:
    """Compare dense training, the original algorithm and online clustering on handwritten digits.

    Real data that ships with scikit-learn, a small VGG, several seeds each, about two minutes. Done a second time, it
    shows what is there. One CPU thread: the images are so small that more only get in each other's way.
    """
    from ..bench.trials.config import Comparison

    setting = setting_of(
        ModelOptions("vgg_small"),
        DataOptions("digits"),
        Recipe(epochs=epochs, lr=0.1, schedule="onecycle"),
        OnlineOptions(),
        retrain_epochs=max(1, round(0.4 * epochs)),
        retrain_lr=0.01,  # the paper's .001 is for 390 steps an epoch; here are ten
    )
    comparison = Comparison.of(setting, ("dense", "l1", "online"), keep=[keep], seeds=range(trials))
    return figures(running.run(comparison, out), out, margin=1.0)


def default_folder(setting: Setting, first: str = "") -> Path:
    """`runs/` and the names of model and data."""
    names = [part for part in (first, setting.model, setting.data) if part]
    readable = ["".join(c if c.isalnum() or c in "._" else "-" for c in Path(name).name) for name in names]
    return Path("runs") / "-".join(readable)
