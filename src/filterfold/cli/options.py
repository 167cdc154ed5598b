"""Options that several commands share, and the networks and engines that they name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from typer import Option

from ..errors import CheckpointError, ConfigError, RecordError

if TYPE_CHECKING:
    from torch import nn

    from ..bench.trials.runner import Engine
    from ..data import ImageData


TRAIN = "Training"


ONLINE = "Online clustering"


MODEL_HELP = (
    "vgg16, vgg_small, resnet20|32|44|56|110, timm:NAME, torchvision:NAME, package.module:factory, or file.py:factory."
)


@dataclass(frozen=True)
class ModelOptions:
    """Which network."""

    model: Annotated[str, Option("--model", "-m", help=MODEL_HELP, rich_help_panel="Model")] = "vgg16"
    width: Annotated[float, Option(help="Multiplier on every layer's width.", rich_help_panel="Model")] = 1.0

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
    """Which images, and how they are split and normalised."""

    data: Annotated[
        str,
        Option(
            "--data",
            "-d",
            help="digits, cifar10, cifar100, a Parquet or image folder, or a hub id.",
            rich_help_panel="Data",
        ),
    ] = "cifar10"
    image_size: Annotated[int | None, Option(help="Scale to this size (pixels).", rich_help_panel="Data")] = None
    channels: Annotated[int | None, Option(help="1 (grey) or 3.", rich_help_panel="Data")] = None
    image_column: Annotated[str | None, Option(help="Column with the images.", rich_help_panel="Data")] = None
    label_column: Annotated[str | None, Option(help="Column with the labels.", rich_help_panel="Data")] = None
    train_split: Annotated[str | None, Option(help="Name of the training split.", rich_help_panel="Data")] = None
    validation_split: Annotated[str | None, Option(help="Name of the validation split.", rich_help_panel="Data")] = None
    test_split: Annotated[str | None, Option(help="Name of the test split.", rich_help_panel="Data")] = None
    validation: Annotated[
        str | None,
        Option(
            help="Hold out of the training images: a share (0.1) or a count (5000).",
            show_default="a tenth",
            rich_help_panel="Data",
        ),
    ] = None
    train_limit: Annotated[
        int | None, Option(help="Train on so many images only, balanced over classes.", rich_help_panel="Data")
    ] = None
    normalization: Annotated[str, Option(help="dataset or imagenet.", rich_help_panel="Data")] = "dataset"
    augment: Annotated[
        str | None,
        Option(
            help="none, crop, crop-flip; streamed: resized-crop-flip, torchvision.",
            show_default="what suits the data",
            rich_help_panel="Data",
        ),
    ] = None
    cache_dir: Annotated[
        Path | None,
        Option(help="Where decoded images are kept.", show_default="~/.cache/filterfold", rich_help_panel="Data"),
    ] = None

    def keywords(self) -> dict[str, Any]:
        """What `data.load` is to be told and a result depends on: only what was asked for."""
        asked: dict[str, Any] = {
            "image_size": self.image_size,
            "channels": self.channels,
            "image_column": self.image_column,
            "label_column": self.label_column,
            "train_split": self.train_split,
            "validation_split": self.validation_split,
            "test_split": self.test_split,
            "validation": _amount(self.validation),
            "train_limit": self.train_limit,
            "normalization": self.normalization,
            "augment": self.augment,
        }
        return {key: value for key, value in asked.items() if value is not None}

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


@dataclass(frozen=True)
class RecipeOptions:
    """How to train. The defaults are those of `training.Recipe`."""

    epochs: Annotated[int, Option("--epochs", "-e", help="Passes over the training images.", rich_help_panel=TRAIN)] = (
        100
    )
    batch_size: Annotated[int, Option(help="Images a step.", rich_help_panel=TRAIN)] = 128
    lr: Annotated[float, Option(help="Initial (or highest) learning rate.", rich_help_panel=TRAIN)] = 0.02
    schedule: Annotated[str, Option(help="step, constant, cosine or onecycle.", rich_help_panel=TRAIN)] = "step"
    step_every: Annotated[int, Option(help="step: divide every so many epochs …", rich_help_panel=TRAIN)] = 60
    step_factor: Annotated[float, Option(help="… by this factor.", rich_help_panel=TRAIN)] = 5.0
    momentum: Annotated[float, Option(help="Of SGD.", rich_help_panel=TRAIN)] = 0.9
    nesterov: Annotated[bool, Option("--nesterov", help="Nesterov's momentum.", rich_help_panel=TRAIN)] = False
    weight_decay: Annotated[float, Option(help="Of SGD.", rich_help_panel=TRAIN)] = 5e-4
    label_smoothing: Annotated[float, Option(help="Share spread over all classes.", rich_help_panel=TRAIN)] = 0.0
    precision: Annotated[str, Option(help="32-true, bf16-mixed or 16-mixed.", rich_help_panel=TRAIN)] = "32-true"
    channels_last: Annotated[bool, Option("--channels-last", help="Memory format.", rich_help_panel=TRAIN)] = False
    compile: Annotated[bool, Option("--compile", help="Use torch.compile.", rich_help_panel=TRAIN)] = False
    cuda_graphs: Annotated[
        bool, Option("--cuda-graphs", help="Replay the network as CUDA graphs (a GPU only).", rich_help_panel=TRAIN)
    ] = False
    validate_every: Annotated[
        int, Option(help="Epochs from one validation to the next; 0: never.", rich_help_panel=TRAIN)
    ] = 1

    def keywords(self) -> dict[str, Any]:
        """The fields of `training.Recipe` but the seed; later ones only where used, so that begun runs can go on."""
        from ..training import Recipe

        chosen = Recipe(**asdict(self)).to_dict()  # refuses what makes no sense
        del chosen["seed"]
        return chosen


@dataclass(frozen=True)
class OnlineOptions:
    """How to cluster while training."""

    milestones: Annotated[
        str,
        Option(
            help="When to cut: gradual (at 20, 35 and 50 % of training), early (5, 10, 15 %), document (50, 60, 70 %), "
            "or plateau (as document at the latest, sooner where the loss levels off).",
            rich_help_panel=ONLINE,
        ),
    ] = "gradual"
    pull: Annotated[
        str,
        Option(
            help="What brings the filters of a cluster together: cosine (a term in the loss), centripetal (common "
            "gradients: they become identical), or none.",
            rich_help_panel=ONLINE,
        ),
    ] = "cosine"
    strength: Annotated[
        float | None,
        Option(
            help="Of the pull.", show_default="0.001 for cosine, 0.05 for centripetal", min=0.0, rich_help_panel=ONLINE
        ),
    ] = None

    def keywords(self) -> dict[str, Any]:
        """Arguments of `online.OnlineCallback`; later ones only where used, so that begun runs can go on."""
        options: dict[str, Any] = {"schedule": self.milestones}
        if self.pull not in ("cosine", "centripetal", "none"):
            raise ConfigError(f"--pull {self.pull}: must be cosine, centripetal or none")
        if self.pull == "none":
            if self.strength:
                raise ConfigError(f"--strength {self.strength}: --pull none has none")
            return {**options, "strength": 0.0}
        if self.pull == "cosine":
            return {**options, "strength": 1e-3 if self.strength is None else self.strength}
        return {**options, "pull": self.pull, **({} if self.strength is None else {"strength": self.strength})}


DEVICE_HELP = "cpu, cuda, cuda:N, or auto: the GPU if there is one."


Device = Annotated[str, Option(help=DEVICE_HELP)]


Threads = Annotated[int | None, Option(help="CPU threads.", show_default="as many as cores", min=1)]


LOG_HELP = "Hand figures on while trials run: tensorboard (event files in RUN/logs), mlflow, or both."


Log = Annotated[str | None, Option(help=LOG_HELP)]


Precision = Annotated[str, Option(help="32-true, bf16-mixed or 16-mixed.")]


Overwrite = Annotated[bool, Option("--overwrite", help="Replace what is there.")]


def use_threads(count: int | None) -> None:
    """Let PyTorch compute with so many CPU threads; None: leave it as it is."""
    if count is not None:
        import torch

        torch.set_num_threads(count)


WHERE = "How trials run"


T = TypeVar("T")


@dataclass(frozen=True)
class EngineOptions:
    """Here, one after the other or several at a time, or on a Ray cluster; who looks on; how networks are timed."""

    engine: Annotated[str, Option(help="local, or ray: a Ray cluster.", rich_help_panel=WHERE)] = "local"
    parallel: Annotated[
        int | None,
        Option(
            help="Trials at a time. They share the cores (or --threads), and the GPU or GPUs.",
            show_default="1; ray: as many as the cluster has room for",
            rich_help_panel=WHERE,
            min=1,
        ),
    ] = None
    address: Annotated[
        str | None,
        Option(
            help="ray: of the cluster, such as auto or ray://HOST:10001.",
            show_default="one of its own, on this machine",
            rich_help_panel=WHERE,
        ),
    ] = None
    share: Annotated[
        float,
        Option(help="ray: GPUs (without any: cores) that a trial takes, such as 0.25.", rich_help_panel=WHERE),
    ] = 1.0

    log: Annotated[
        str | None,
        Option(help=LOG_HELP, rich_help_panel=WHERE),
    ] = None
    latency_batches: Annotated[
        str,
        Option(
            help="Batch sizes at which all networks are timed in the end, besides the whole test set; none: only that.",
            rich_help_panel=WHERE,
        ),
    ] = "1,8,64,512"

    def keywords(self) -> dict[str, Any]:
        """Arguments of `experiment.launch.compare`.

        **Raises:** `ConfigError` for what makes no sense.
        """
        text = "" if self.latency_batches == "none" else self.latency_batches
        sizes = listed(text, "--latency-batches", int)
        if min(sizes, default=1) < 1:
            raise ConfigError(f"--latency-batches {self.latency_batches}: a batch has at least 1 image")
        return {"engine": self.choose(), "trackers": listed(self.log, "--log", str), "batch_sizes": sizes}

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


WEIGHTS_HELP = "Weights: safetensors or a torch state dict, by name; or a network that Filterfold saved, pruned or not."


def with_weights(factory: Callable[[], nn.Module], weights: Path, device: str) -> nn.Module:
    """A network with the weights of a file: one of Filterfold's, whose sizes it takes on, or a plain state dict.

    **Raises:** `CheckpointError` naming what does not fit.
    """
    from ..surgery.checkpoint import inspect, load, load_weights

    try:
        inspect(weights)
    except CheckpointError:
        model = factory()
        load_weights(model, weights)
        return model.to(device)
    return load(weights, factory, device=device)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Refuse to write over a file unasked."""
    if path.exists() and not overwrite:
        raise RecordError(f"{path} exists; give another --out, or --overwrite to replace it")
