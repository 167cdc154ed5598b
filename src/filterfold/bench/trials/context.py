"""What all trials of a setting share in one process: data, networks, training, the device, the folder, the deadline."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from ... import data as datasets
from ...errors import ConfigError
from ...surgery.weights import Loaded, Weights
from ...training import Callback, Recipe, Row, Tracker, check_trackers, tracking, train
from ...training.evaluate import check_fit
from ...zoo import build
from .config import Trial, refuse_other_images
from .setting import Setting
from .start import Start, shown

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


class Stopped(Exception):
    """Raised when the time is up, which is no error: everything finished so far is on the disk."""


class Deadline:
    """A point in time that long work looks at.

    **Arguments:**

    - `seconds`: time from now, or None for no end.
    - `clock`: the time in seconds; by default that of the calendar, which other processes and machines have as well.

    >>> now = iter([0.0, 4.0])
    >>> deadline = Deadline(8.0, clock=lambda: next(now))
    >>> deadline.remaining()
    4.0
    """

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._end = float("inf") if seconds is None else clock() + seconds

    def remaining(self) -> float:
        """Seconds left; infinite without an end."""
        return self._end - self._clock()

    def check(self, needed: float = 0.0) -> None:
        """Raise `Stopped` if less than `needed` seconds are left."""
        if self.remaining() <= needed:
            raise Stopped

    def check_next(self, last: float) -> None:
        """Raise `Stopped` unless another piece of work like the last one, which took so many seconds, fits in."""
        self.check(1.2 * last)


@dataclass(eq=False)
class RunContext:
    """The place where trials are run.

    **Arguments:**

    - `setting`: what the trials have in common.
    - `folder`: the run folder.
    - `device`: `cpu`, `cuda[:N]`, or `auto`: the GPU if there is one.
    - `deadline`: when to stop.
    - `cache_dir`: where decoded data sets are kept; None for the usual place.
    - `trackers`: names of `training.TRACKERS`.
    - `images`: fingerprint that the data set must have; None: any.
    - `timing`: whether each trial times its network.
    """

    setting: Setting
    folder: Path
    device: str = "auto"
    deadline: Deadline = field(default_factory=lambda: Deadline(None))
    cache_dir: Path | None = None
    trackers: Sequence[str] = ()
    images: str | None = None
    timing: bool = True

    def __post_init__(self) -> None:
        """Refuse a device that is not there, and trackers that are not installed."""
        self.device = resolve(self.device)
        check_trackers(self.trackers)

    def __getstate__(self) -> dict[str, Any]:
        """All but images and weights: another process loads its own."""
        return {name: value for name, value in self.__dict__.items() if name not in ("data", "weights")}

    @cached_property
    def data(self) -> datasets.ImageData:
        """The data set, loaded when it is first asked for.

        **Raises:** `RecordError` if it is not the one that the trials of the run folder were begun with.
        """
        found = datasets.load(self.setting.data, cache_dir=self.cache_dir, **self.setting.data_options)
        if self.images is not None:
            refuse_other_images(self.setting.data, self.images, found.fingerprint)
        return found

    @cached_property
    def weights(self) -> Weights | None:
        """What networks begin with, read when it is first asked for; None: fresh weights."""
        start = self.setting.begins
        return start.read(self.setting.model, self.data.channels) if start.given else None

    @property
    def example(self) -> Tensor:
        """One blank image on the device, shape (1, channels, height, width)."""
        return torch.zeros(1, self.data.channels, self.data.image_size, self.data.image_size, device=self.device)

    def build(self, seed: int = 0) -> nn.Module:
        """The dense network on the device, as training begins with it; the global random state stays as it was.

        It has the weights of the setting, and what these don't fill (a new classifier) is drawn by the seed.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self._drawn()
            self._begin(model)
        return model.to(self.device)

    def fresh(self, seed: int = 0) -> nn.Module:
        """The same network with all its weights drawn by the seed, whatever the setting begins with."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._drawn().to(self.device)

    @property
    def begins_smaller(self) -> bool:
        """Whether the weights of the setting are those of a network that was pruned already."""
        if self.weights is None or not self.weights.header:
            return False
        sizes = [[parameter.shape for parameter in model.parameters()] for model in (self.build(), self.fresh())]
        return sizes[0] != sizes[1]

    def _drawn(self) -> nn.Module:
        return build(
            self.setting.model,
            classes=len(self.data.classes),
            channels=self.data.channels,
            width=self.setting.width,
            image_size=self.data.image_size,
        )

    def _begin(self, model: nn.Module) -> Loaded | None:
        if self.weights is None:
            return None
        return self.weights.into(model, new_head=self.setting.begins.new_head, classes=len(self.data.classes))

    def teacher(self) -> nn.Module:
        """The network of the setting's teacher file, on the CPU.

        **Raises:** `CheckpointError` if it does not fit, `RecordError` if it is another than the runs began with.
        """
        file = Start(self.setting.distill["teacher"], fingerprint=self.setting.distill.get("fingerprint", ""))
        with torch.random.fork_rng(devices=[]):
            model = self._drawn()
        file.read(self.setting.model, self.data.channels).into(model, classes=len(self.data.classes))
        return model

    def told(self) -> str | None:
        """In words what the networks begin with, and the images; None for fresh weights."""
        with torch.random.fork_rng(devices=[]):
            loaded = self._begin(self._drawn())
        if self.weights is None or loaded is None:
            return None
        about = "; ".join(filter(None, (f"fingerprint {self.weights.fingerprint}", str(loaded))))
        return f"begins with {self.weights.source} ({about})\n{shown(self.data)}"

    def recipe(self, trial: Trial | None = None, **changes: Any) -> Recipe:
        """The training recipe of a trial, or of the setting with seed 0."""
        own: dict[str, Any] = {"seed": 0 if trial is None else trial.seed}
        if trial is not None and trial.epochs is not None:
            own["epochs"] = trial.epochs
        try:
            return Recipe(**{**self.setting.recipe, **own, **changes})
        except TypeError as error:
            raise ConfigError(f"the training recipe has an option that this version does not know: {error}") from error

    def train(
        self,
        trial: Trial,
        model: nn.Module,
        *,
        checkpoint: str = "training",
        phase: str = "train",
        callbacks: Sequence[Callback] = (),
        **changes: Any,
    ) -> list[Row]:
        """Train a network, in place; an interrupted training goes on from its last epoch.

        **Arguments:**

        - `trial`: whose seed, working folder and trackers are used.
        - `checkpoint`: its name in the working folder.
        - `changes`: fields of the recipe that differ from the setting's.

        **Returns:** the epochs; none for a trial of 0.

        **Raises:** `Stopped` when the time is up.
        """
        if trial.epochs == 0:
            return []
        with self.tracked(trial) as trackers:
            history = train(
                model,
                self.data,
                self.recipe(trial, **changes),
                callbacks=callbacks,
                observers=[tracker.row for tracker in trackers],
                checkpoint=self.work(trial.id) / f"{checkpoint}.safetensors",
                check=self.deadline.check_next,
                device=self.device,
                phase=phase,
            )
        return history.rows

    def tracked(self, trial: Trial) -> AbstractContextManager[list[Tracker]]:
        """The trackers of a trial, for the length of a `with` block."""
        return tracking(self.trackers, self.folder, trial.id)

    def loader(self, seed: int, count: int = 10) -> list[tuple[Tensor, Tensor]]:
        """Batches of training images, not augmented, for criteria that look at data."""
        feed = datasets.batches(self.data.train, 128, shuffle=True, seed=seed, device=self.device)
        return list(islice(feed, count))

    def check(self) -> None:
        """Find out now what would make every trial fail: missing data, a model that does not fit it, a bad recipe.

        **Raises:** the `FilterfoldError` that says so.
        """
        for changes in ({}, self.setting.retrain, self.setting.scratch):
            self.recipe(**changes)
        check_fit(self.build(), self.example, len(self.data.classes))

    def model_file(self, trial_id: str) -> Path:
        """Where a trial's final network lies."""
        return self.folder / "models" / f"{trial_id}.safetensors"

    def base_file(self, trial_id: str, suffix: str) -> Path:
        """Where the dense network that trials begin with lies, and what is known about it."""
        return self.folder / "bases" / f"{trial_id}{suffix}"

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold a lock for the length of a `with` block: a trial's, or that of a dense network that trials begin with.

        **Raises:** `Stopped` if another process holds it until the time is up.
        """
        left, held = self.deadline.remaining(), lock(self.folder, name)
        try:
            held.acquire(timeout=-1 if left == float("inf") else max(0.0, left))
        except Timeout:
            raise Stopped from None
        try:
            yield
        finally:
            held.release()

    def is_locked(self, name: str) -> bool:
        """Whether anybody holds a lock."""
        return is_locked(self.folder, name)

    def work(self, trial_id: str) -> Path:
        """Where a trial keeps what it needs to be taken up again."""
        return self.folder / "work" / trial_id


def lock(folder: Path, name: str) -> FileLock:
    """A lock in a run folder, not taken yet. It ends with the process that holds it, however that ends."""
    return FileLock(folder / ".locks" / name)


def is_locked(folder: Path, name: str) -> bool:
    """Whether anybody holds a lock. It is taken for a moment to find out."""
    if not (folder / ".locks" / name).exists():
        return False
    try:
        with lock(folder, name).acquire(blocking=False):
            return False
    except Timeout:
        return True


def resolve(device: str) -> str:
    """`auto` becomes the GPU if there is one.

    **Raises:** `ConfigError` for a device that is not there.

    >>> resolve("cpu")
    'cpu'
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ConfigError(f"no device {device!r}; give cpu, cuda, or cuda:N") from None
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r} is not served; give cpu, cuda, or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"no device {device!r}: this PyTorch finds no GPU; give cpu")
    return device


def seconds(text: str) -> float:
    """Seconds from a duration as people write it.

    **Raises:** `ConfigError` if it is none.

    >>> seconds("9m"), seconds("1h30m"), seconds("45")
    (540.0, 5400.0, 45.0)
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms]?)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ConfigError(f"{text!r} is no duration; write 90s, 9m or 1h30m")
    total = sum(float(number) * _UNITS[unit or "s"] for number, unit in parts)
    if total <= 0:
        raise ConfigError(f"{text!r} leaves no time; write 90s, 9m or 1h30m")
    return total
