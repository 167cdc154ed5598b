"""What all trials of one setting share in one process: the data, the network's factory, the device, the clock."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import data as datasets
from ...errors import ConfigError
from ...training import Recipe, Tracker, check_trackers, tracking
from ...training.evaluate import check_fit
from ...zoo import build
from .config import Setting
from .deadline import Deadline


class RunContext:
    """The place where trials are run.

    **Arguments:**

    - `setting`: what the trials have in common.
    - `folder`: the run folder.
    - `device`: `cpu`, `cuda[:N]`, or `auto`: the GPU if there is one.
    - `deadline`: when to stop.
    - `cache_dir`: where decoded data sets are kept; None for the usual place.
    - `trackers`: names of `training.TRACKERS`.
    """

    def __init__(
        self,
        setting: Setting,
        folder: Path,
        device: str = "auto",
        deadline: Deadline | None = None,
        cache_dir: Path | None = None,
        trackers: Sequence[str] = (),
    ) -> None:
        self.setting = setting
        self.folder = Path(folder)
        self.device = resolve(device)
        self.deadline = deadline or Deadline(None)
        self._cache_dir = cache_dir
        self._trackers = tuple(trackers)
        check_trackers(self._trackers)

    def at(self, *, device: str | None = None, folder: Path | None = None) -> RunContext:
        """The same bench on another device, or with another run folder."""
        place, where = folder or self.folder, device or self.device
        return RunContext(self.setting, place, where, self.deadline, self._cache_dir, self._trackers)

    def tracked(self, trial_id: str) -> AbstractContextManager[list[Tracker]]:
        """What a trial's figures are handed to while it runs, for the length of a `with` block."""
        return tracking(self._trackers, self.folder, trial_id)

    def __getstate__(self) -> dict[str, Any]:
        """All but the images: another process loads its own."""
        return {name: value for name, value in self.__dict__.items() if name != "data"}

    @cached_property
    def data(self) -> datasets.ImageData:
        """The data set, loaded when it is first asked for."""
        return datasets.load(self.setting.data, cache_dir=self._cache_dir, **self.setting.data_options)

    @property
    def example(self) -> Tensor:
        """One blank image on the device, shape (1, channels, height, width)."""
        return torch.zeros(1, self.data.channels, self.data.image_size, self.data.image_size, device=self.device)

    def build(self, seed: int = 0) -> nn.Module:
        """The dense network on the device, with a seed's initial weights; the global random state stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build(
                self.setting.model,
                classes=len(self.data.classes),
                channels=self.data.channels,
                width=self.setting.width,
                image_size=self.data.image_size,
            )
        return model.to(self.device)

    def recipe(self, seed: int, **changes: Any) -> Recipe:
        """The setting's training recipe for a seed."""
        try:
            return Recipe(**{**self.setting.recipe, **changes, "seed": seed})
        except TypeError as error:
            raise ConfigError(f"the training recipe has an option that this version does not know: {error}") from error

    def loader(self, seed: int, count: int = 10) -> list[tuple[Tensor, Tensor]]:
        """Batches of training images, not augmented, for criteria that look at data."""
        feed = datasets.batches(self.data.train, 128, shuffle=True, seed=seed, device=self.device)
        return list(islice(feed, count))

    def check(self) -> None:
        """Find out now what would make every trial fail: missing data, a model that does not fit it, a bad recipe.

        **Raises:** the `FilterfoldError` that says so.
        """
        self.recipe(0)
        check_fit(self.build(), self.example, len(self.data.classes))

    def model_file(self, trial_id: str) -> Path:
        """Where a trial's final network lies."""
        return self.folder / "models" / f"{trial_id}.safetensors"

    def base_file(self, trial_id: str, suffix: str) -> Path:
        """Where the dense network that trials begin with lies, and what is known about it."""
        return self.folder / "bases" / f"{trial_id}{suffix}"

    def lock(self, name: str) -> Path:
        """The lock of whoever works at something: a trial, or the dense network that trials begin with."""
        return self.folder / ".locks" / name

    def work(self, trial_id: str) -> Path:
        """Where a trial keeps what it needs to be taken up again."""
        return self.folder / "work" / trial_id


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
