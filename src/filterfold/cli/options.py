"""Options that several commands share, and the networks and engines that they name."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from typer import Option

from ..errors import ConfigError, RecordError
from ..training.recipe import Recipe
from ..utils.io import check_output
from .display import live

if TYPE_CHECKING:
    from torch import nn

    from ..bench.trials.config import Comparison
    from ..bench.trials.runner import Engine, Outcome
    from ..bench.trials.setting import Setting
    from ..data import ImageData


MODEL_HELP = (
    "vgg16, vgg_small, resnet20|32|44|56|110, timm:NAME, torchvision:NAME; or code of yours, which is executed: "
    "file.py:factory."
)


MODEL = (
    f"{MODEL_HELP[:-1]}, package.module:factory. A factory is given those of classes, channels, width and image_size "
    "that it names (num_classes, in_channels and the like too)."
)
"""The help of --model at length."""


DATA_HELP = "digits, cifar10, cifar100, a Parquet or image folder, or a hub id."


_PANELS = ("Model", "Data", "Training", "Online clustering", "How trials run")
_model, _data, _training, _online, _run = (partial(Option, rich_help_panel=panel) for panel in _PANELS)
_rare_model, _rare_data, _rare_training, _rare_online, _rare_run = (
    partial(Option, rich_help_panel=panel, hidden=True) for panel in _PANELS
)
"""Options of a panel; rare ones are shown by --help-all. What has no panel stands first."""


@dataclass(frozen=True)
class ModelOptions:
    """Which network."""

    model: Annotated[str, Option("--model", "-m", help=MODEL_HELP)] = "vgg16"
    width: Annotated[float, _rare_model(help="Multiplier on every layer's width.")] = 1.0

    def build(self, data: ImageData) -> nn.Module:
        """The network for a data set, with fresh weights."""
        from ..zoo import build

        return build(
            self.model,
            classes=len(data.classes),
            channels=data.channels,
            width=self.width,
            image_size=data.image_size,
        )


@dataclass(frozen=True)
class DataOptions:
    """Which images, and how they are split and normalised: the arguments of `data.load`, None for its defaults."""

    data: Annotated[str, Option("--data", "-d", help=DATA_HELP)] = "cifar10"
    image_size: Annotated[int | None, _data(help="Scale to this size (pixels).")] = None
    channels: Annotated[int | None, _rare_data(help="1 (grey) or 3.")] = None
    image_column: Annotated[str | None, _rare_data(help="Column with the images.")] = None
    label_column: Annotated[str | None, _rare_data(help="Column with the labels.")] = None
    train_split: Annotated[str | None, _rare_data(help="Name of the training split.")] = None
    validation_split: Annotated[str | None, _rare_data(help="Name of the validation split.")] = None
    test_split: Annotated[str | None, _rare_data(help="Name of the test split.")] = None
    validation: Annotated[
        str | None,
        _rare_data(help="Hold out of the training images: a share (0.1) or a count (5000).", show_default="a tenth"),
    ] = None
    train_limit: Annotated[int | None, _data(help="Train on so many images only, balanced over classes.")] = None
    normalization: Annotated[
        str | None,
        _data(
            help="dataset, imagenet, or model (as its pretrained weights were trained).",
            show_default="as the weights; else dataset",
        ),
    ] = None
    mean: Annotated[str | None, _rare_data(help="Instead: of each channel, of values from 0 to 1: 0.5,0.5,0.5 …")] = (
        None
    )
    std: Annotated[str | None, _rare_data(help="… and the standard deviations.")] = None
    augment: Annotated[
        str | None,
        _rare_data(
            help="none, crop, crop-flip; streamed: resized-crop-flip, torchvision.", show_default="what suits the data"
        ),
    ] = None
    cache_dir: Annotated[
        Path | None, _rare_data(help="Where decoded images are kept.", show_default="~/.cache/filterfold")
    ] = None

    def keywords(self) -> dict[str, Any]:
        """What `data.load` is to be told and a result depends on: only what was asked for.

        **Raises:** `ConfigError` for a normalization that makes no sense.
        """
        asked = {**asdict(self), "validation": _amount(self.validation), "normalization": self._normalization()}
        other = ("data", "cache_dir", "mean", "std")
        return {key: value for key, value in asked.items() if value is not None and key not in other}

    def _normalization(self) -> str | list[list[float]]:
        if self.normalization == "model":
            raise ConfigError("--normalization model: give the weights' with a timm: or torchvision: model")
        if self.mean is None and self.std is None:
            return self.normalization or "dataset"
        if self.mean is None or self.std is None or self.normalization is not None:
            raise ConfigError("--mean and --std go together, and without --normalization")
        return [listed(self.mean, "--mean", float), listed(self.std, "--std", float)]

    def load(self) -> ImageData:
        """The data set."""
        from ..data import load

        return load(self.data, cache_dir=self.cache_dir, **self.keywords())


def _amount(text: str | None) -> float | None:
    """A share (0.1) or a count (5000).

    >>> _amount("0.1"), _amount("5000"), _amount("0")
    (0.1, 5000, 0)
    """
    if text is None:
        return None
    try:
        return float(text) if "." in text or "e" in text.lower() else int(text)
    except ValueError:
        raise ConfigError(f"--validation {text}: give a share such as 0.1, or a count such as 5000") from None


SHOWN = {
    "epochs": Option("--epochs", "-e", help="Passes over the training images."),
    "batch_size": _training(help="Images a step."),
    "optimizer": _rare_training(help="sgd; or adamw, for which rates of .001 and less are usual."),
    "lr": Option(help="Initial (or highest) learning rate."),
    "schedule": _training(help="step, constant, cosine, onecycle or warmup-cosine."),
    "step_every": _rare_training(help="step: divide every so many epochs …"),
    "step_factor": _rare_training(help="… by this factor."),
    "warmup": _rare_training(help="onecycle, warmup-cosine: share of the training in which the rate rises."),
    "momentum": _rare_training(help="Of SGD; AdamW's first beta."),
    "nesterov": _rare_training("--nesterov", help="Nesterov's momentum."),
    "weight_decay": _rare_training(help="Of either optimizer."),
    "head_lr": _rare_training(help="The classifier's learning rate, times that of the rest: 10 where it is new."),
    "clip": _rare_training(help="Largest norm of the gradient; 0: no limit."),
    "ema": _rare_training(
        help="Decay of a moving average of the weights, such as 0.999, with which training ends; 0: none."
    ),
    "freeze_norms": _rare_training("--freeze-norms", help="Leave the running statistics of batch norms as they are."),
    "label_smoothing": _rare_training(help="Share spread over all classes."),
    "precision": _training(help="32-true, bf16-mixed or 16-mixed."),
    "channels_last": _rare_training("--channels-last", help="Memory format."),
    "compile": _rare_training("--compile", help="Use torch.compile."),
    "cuda_graphs": _rare_training("--cuda-graphs", help="Replay the network as CUDA graphs (a GPU only)."),
    "validate_every": _rare_training(help="Epochs from one validation to the next; 0: never."),
}


TrainingOptions = Annotated[Recipe, SHOWN]
"""The fields of a training recipe that a command shows as options, with its defaults."""


def settings(recipe: Recipe) -> dict[str, Any]:
    """A training recipe as a setting holds it: without the seed, which is the trial's own."""
    return {name: value for name, value in recipe.to_dict().items() if name != "seed"}


@dataclass(frozen=True)
class OnlineOptions:
    """How to cluster while training."""

    milestones: Annotated[
        str | None,
        _rare_online(
            help="When to cut: 0 (after the first step); gradual (at 20, 35 and 50 % of training), early (5, 10, "
            "15 %), document (50, 60, 70 %), plateau (as document at the latest, sooner where the loss levels off), "
            "each at the end of an epoch; or between batches: small-cuts (20, up to half of training) or fractions of "
            "training, such as 0.1,0.2,0.3.",
            show_default="gradual; from trained weights 0",
        ),
    ] = None
    pull: Annotated[
        str,
        _rare_online(
            help="What brings the filters of a cluster together: cosine (a term in the loss), centripetal (common "
            "gradients: they become identical), or none."
        ),
    ] = "cosine"
    strength: Annotated[
        float | None,
        _rare_online(help="Of the pull.", show_default="0.001 for cosine, 0.05 for centripetal", min=0.0),
    ] = None

    def keywords(self, *, trained: bool = False) -> dict[str, Any]:
        """Arguments of `online.OnlineCallback`; later ones only where used, so that begun runs can go on.

        - `trained`: training begins with weights. What they know of the filters need not be learned before a cut.
        """
        options: dict[str, Any] = {"schedule": self.milestones or ("0" if trained else "gradual")}
        if self.pull not in ("cosine", "centripetal", "none"):
            raise ConfigError(f"--pull {self.pull}: must be cosine, centripetal or none")
        if self.pull == "none":
            if self.strength:
                raise ConfigError(f"--strength {self.strength}: --pull none has none")
            return {**options, "strength": 0.0}
        if self.pull == "cosine":
            return {**options, "strength": 1e-3 if self.strength is None else self.strength}
        return {**options, "pull": self.pull, **({} if self.strength is None else {"strength": self.strength})}


def setting_of(
    chosen: ModelOptions, images: DataOptions, training: Recipe, clustering: OnlineOptions, **others: Any
) -> Setting:
    """The setting of trials with these options; `others` are fields of its own, such as those of `Start`."""
    from ..bench.trials.setting import Setting

    return Setting(
        model=chosen.model,
        data=images.data,
        width=chosen.width,
        data_options=images.keywords(),
        recipe=settings(training),
        online=clustering.keywords(trained=bool(others.get("start"))),
        **others,
    )


Width = Annotated[float, Option(help="Multiplier on every layer's width.")]


Device = Annotated[str, Option(help="cpu, cuda, cuda:N, or auto: the GPU if there is one.")]


Threads = Annotated[int | None, Option(hidden=True, help="CPU threads.", show_default="as many as cores", min=1)]


LOG_HELP = "Hand figures on while trials run: tensorboard (event files in RUN/logs), mlflow, or both."


Precision = Annotated[str, Option(help="32-true, bf16-mixed or 16-mixed.")]


Overwrite = Annotated[bool, Option("--overwrite", help="Replace what is there.")]


def use_threads(count: int | None) -> None:
    """Let PyTorch compute with so many CPU threads; None: leave it as it is."""
    if count is not None:
        import torch

        torch.set_num_threads(count)


T = TypeVar("T")


@dataclass(frozen=True)
class RunOptions:
    """How trials run: where, until when, and what is told of them."""

    log: Annotated[str | None, _rare_run(help=LOG_HELP)] = None
    stop_after: Annotated[
        str | None, _run(help="Stop in time, with everything saved; the same command goes on: 9m, 90s, 2h.")
    ] = None
    device: Annotated[str, _run(help="cpu, cuda, cuda:N, or auto: the GPU if there is one.")] = "auto"
    threads: Annotated[int | None, _rare_run(help="CPU threads.", show_default="as many as cores", min=1)] = None
    timing: Annotated[
        bool,
        _run(" /--no-timing", show_default=False, help="Don't time networks in the end. Ctrl-C ends the timing alone."),
    ] = True

    def keywords(self) -> dict[str, Any]:
        """Arguments of `bench.trials.runner.compare`.

        **Raises:** `ConfigError` for what makes no sense.
        """
        from ..bench.trials.context import seconds

        return {
            "trackers": listed(self.log, "--log", str),
            "stop_after": seconds(self.stop_after) if self.stop_after else None,
            "device": self.device,
            "batch_sizes": () if self.timing else None,
        }

    def run(
        self, comparison: Comparison, folder: Path, *, cache_dir: Path | None = None, fresh: bool = False
    ) -> Outcome:
        """Run a comparison with these options."""
        from ..bench.trials.runner import compare
        from ..utils.environment import command

        use_threads(self.threads)
        how = self.keywords()
        with live():
            return compare(comparison, folder, command=command(), cache_dir=cache_dir, fresh=fresh, **how)


@dataclass(frozen=True)
class EngineOptions(RunOptions):
    """Where many trials run: here, one after the other or several at a time, or on a Ray cluster."""

    engine: Annotated[str, _rare_run(help="local, or ray: a Ray cluster.")] = "local"
    parallel: Annotated[
        int | None,
        _run(
            help="Trials at a time, on the same cores and GPUs.",
            show_default="1; ray: as many as fit",
            metavar="<int>",
            min=1,
        ),
    ] = None
    address: Annotated[
        str | None,
        _rare_run(
            help="ray: of the cluster, such as auto or ray://HOST:10001.",
            show_default="one of its own, on this machine",
        ),
    ] = None
    share: Annotated[float, _rare_run(help="ray: GPUs (without any: cores) that a trial takes, such as 0.25.")] = 1.0
    latency_batches: Annotated[
        str,
        _rare_run(
            help="Batch sizes at which all networks are timed in the end, besides the whole test set; none: only that."
        ),
    ] = "1,8,64,512"

    def keywords(self) -> dict[str, Any]:
        """Arguments of `bench.trials.runner.compare`.

        **Raises:** `ConfigError` for what makes no sense.
        """
        text = "" if self.latency_batches == "none" else self.latency_batches
        sizes = listed(text, "--latency-batches", int)
        if min(sizes, default=1) < 1:
            raise ConfigError(f"--latency-batches {self.latency_batches}: a batch has at least 1 image")
        return {**super().keywords(), "engine": self.choose(), "batch_sizes": sizes if self.timing else None}

    def choose(self) -> Engine:
        """The engine.

        **Raises:** `ConfigError` for one that there is not, or options that it does not have.
        """
        from ..bench.trials.parallel import Parallel
        from ..bench.trials.runner import local

        if self.engine == "ray":
            from ..bench.trials.ray import RayCluster

            return RayCluster(self.address, parallel=self.parallel, share=self.share)
        if self.engine != "local":
            raise ConfigError(f"--engine {self.engine}: there are local and ray")
        if self.address is not None or self.share != 1.0:
            raise ConfigError("--address and --share are for a Ray cluster; add --engine ray")
        return local if self.parallel in (None, 1) else Parallel(self.parallel or 1)


def listed(text: str | None, option: str, kind: Callable[[str], T]) -> list[T]:
    """Comma-separated values.

    >>> listed("5,10", "--clusters", int), listed(None, "--keep", float)
    ([5, 10], [])
    """
    try:
        return [kind(part.strip()) for part in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(f"{option} {text}: give comma-separated values, such as 5,10 or 0.5,0.25") from None


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Refuse to write over a file unasked, or where nothing can be written."""
    check_output(path, folder=False)
    if os.path.lexists(path) and not overwrite:
        raise RecordError(f"{path} exists; give another --out, or --overwrite to replace it")
