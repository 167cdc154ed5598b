"""The training loop."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..data import ImageData, batches
from ..data.augment import seeded
from ..errors import ConfigError, ModelError, TrainingError
from ..progress import track
from . import state
from .evaluate import check_fit, evaluate
from .recipe import Recipe
from .run import Callback, History, Row, Run

if TYPE_CHECKING:
    from lightning_fabric import Fabric

EVALUATION_BATCH = 500


def train(
    model: nn.Module,
    data: ImageData,
    recipe: Recipe | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    observers: Sequence[Callable[[Row], object]] = (),
    optimizer: torch.optim.Optimizer | None = None,
    checkpoint: Path | str | None = None,
    checkpoint_seconds: float = 0.0,
    check: Callable[[float], None] | None = None,
    validate_every: int = 1,
    device: str = "auto",
    phase: str = "train",
) -> History:
    """Train a network in place.

    With a checkpoint path the run can be killed at any time: the same call goes on from the last whole epoch and
    ends, on a CPU, with the same weights to the bit. Order, augmentation and dropout of an epoch depend on
    `(recipe.seed, epoch)` only.

    **Arguments:**

    - `model`: maps images (b, channels, size, size) to logits (b, classes). It ends on the training device; modules
      in eval mode inside a network in training mode (frozen batch norms) stay as they are.
    - `data`: trained on `data.train`, watched on `data.validation`; `data.test` is not touched.
    - `recipe`: see `Recipe`; None: its defaults.
    - `callbacks`: see `Callback`, called in this order.
    - `observers`: each called with every new row of the history. They only look on: unlike callbacks they may come
      and go when a run is taken up again.
    - `optimizer`: over the model's parameters, instead of the recipe's SGD. The schedule scales its groups' own
      learning rates, taken as those for `recipe.lr`.
    - `checkpoint`: file to write after each epoch and to go on from if it exists. A finished one is just loaded.
    - `checkpoint_seconds`: write at most so often; the last epoch is always written.
    - `check`: called after each epoch with the seconds that it took; it may raise to end the run, whose checkpoint
      is written first.
    - `validate_every`: epochs from one validation to the next; the last epoch is always validated. 0: never.
    - `device`: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
    - `phase`: name in the history's rows.

    **Returns:** one row for each epoch (see `run.Row`).

    **Raises:** `ConfigError` for a checkpoint of another run or options that this machine can't follow,
    `CheckpointError` for a damaged one, `ModelError` or `DataError` if network and data don't fit,
    `TrainingError` if the loss is no longer finite.

    ```python
    >>> from filterfold import data, zoo
    >>> digits = data.load("digits", train_limit=100)
    >>> history = train(zoo.build("vgg_small", channels=1, image_size=8, width=0.25), digits, Recipe(epochs=2))
    >>> [row["epoch"] for row in history.rows]
    [1, 2]

    ```
    """
    recipe = recipe or Recipe()
    path = Path(checkpoint) if checkpoint is not None else None
    with _given_back(model, recipe):
        fabric = _fabric(device, recipe)
        model.to(fabric.device)
        check_fit(model, data.example.to(fabric.device), len(data.classes))
        same = state.identity(model, data, recipe, callbacks, optimizer, phase)
        tree = state.read(path, same) if path is not None and path.exists() else None
        if tree is not None:
            state.resize(model, tree)
        run = Run(model, optimizer or recipe.optimizer(model), data, recipe, fabric, phase)
        loop = _Loop(run, callbacks, observers, path, checkpoint_seconds, check, validate_every, same)
        if tree is not None and path is not None:
            state.take_up(path, run, tree)
        for callback in callbacks:
            callback.on_start(run)
        if tree is not None:
            for callback, kept in zip(callbacks, tree["callbacks"], strict=True):
                callback.load_state_dict(kept)
        try:
            loop.go()
        finally:
            run.optimizer.zero_grad(set_to_none=True)
        return run.history


class _Loop:
    """The epochs of one call of `train`."""

    def __init__(
        self,
        run: Run,
        callbacks: Sequence[Callback],
        observers: Sequence[Callable[[Row], object]],
        path: Path | None,
        checkpoint_seconds: float,
        check: Callable[[float], None] | None,
        validate_every: int,
        same: dict[str, Any],
    ) -> None:
        self.run, self.callbacks, self.observers, self.path = run, callbacks, observers, path
        self.checkpoint_seconds, self.check, self.validate_every = checkpoint_seconds, check, validate_every
        self.same = same
        self.split = run.data.train.to(run.device)
        self.validation = run.data.validation.to(run.device)
        self.stepper: Any = run.fabric.setup_optimizers(run.optimizer)
        self.rates = [group["lr"] / run.recipe.lr for group in run.optimizer.param_groups]
        self.augment = run.recipe.augment or run.data.augment
        self.whole = len(self.split) >= run.recipe.batch_size
        self.steps = len(self.split) // run.recipe.batch_size if self.whole else 1
        self.hooked = [c for c in callbacks if type(c).after_backward is not Callback.after_backward]
        self.written = time.monotonic()

    def go(self) -> None:
        """All epochs that are left."""
        run, epochs = self.run, self.run.recipe.epochs
        for epoch in track(range(run.epoch + 1, epochs + 1), run.phase, epochs - run.epoch):
            run.epoch = epoch
            row = self._epoch()
            if self._validates(epoch):
                row["validation_top1"] = self._validate()
            run.history.rows.append(row)
            for observer in self.observers:
                observer(row)
            self._save_or_stop(epoch == epochs, row["seconds"])

    def _epoch(self) -> Row:
        run, recipe = self.run, self.run.recipe
        _seed(recipe.seed, run.epoch)
        started = time.perf_counter()
        feed = batches(
            self.split,
            recipe.batch_size,
            shuffle=True,
            augment=self.augment,
            seed=recipe.seed,
            epoch=run.epoch,
            device=run.device,
            channels_last=recipe.channels_last,
            drop_last=self.whole,
        )
        total = torch.zeros((), dtype=torch.float64, device=run.device)
        rate = 0.0
        for images, labels in track(feed, f"epoch {run.epoch}", self.steps):
            rate = recipe.rate(run.step, self.steps)
            total += self._batch(images, labels, rate)
            run.step += 1
        loss = float(total) / self.steps
        if not math.isfinite(loss):
            raise TrainingError(f"the loss of epoch {run.epoch} is {loss}; lower the learning rate (it was {rate:g})")
        run.loss = loss
        for callback in self.callbacks:
            callback.on_epoch_end(run)
        return {
            "phase": run.phase,
            "epoch": run.epoch,
            "train_loss": loss,
            "validation_top1": None,
            "learning_rate": rate,
            "seconds": time.perf_counter() - started,
            "macs": run.macs,
            "events": run.take_events(),
        }

    def _batch(self, images: Tensor, labels: Tensor, rate: float) -> Tensor:
        """One step. What it returns is detached, so no graph outlives it: surgery needs that."""
        run = self.run
        for group, relative in zip(run.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * relative
        run.optimizer.zero_grad(set_to_none=True)
        logits = run.forward(images)
        if not isinstance(logits, Tensor):
            raise ModelError(
                f"{type(run.model).__name__} returns a {type(logits).__name__} in training mode, not logits"
            )
        loss = functional.cross_entropy(logits, labels, label_smoothing=run.recipe.label_smoothing)
        objective = loss
        for callback in self.callbacks:
            extra = callback.on_batch_loss(run)
            if extra is not None:
                objective = objective + extra
        run.fabric.backward(objective)
        if self.hooked:
            run.fabric.strategy.precision.unscale_gradients(run.optimizer)
            for callback in self.hooked:
                callback.after_backward(run)
        self.stepper.step()
        return loss.detach()

    def _validates(self, epoch: int) -> bool:
        every = self.validate_every
        return len(self.validation) > 0 and every > 0 and (epoch % every == 0 or epoch == self.run.recipe.epochs)

    def _validate(self) -> float:
        run = self.run
        return evaluate(
            run.forward,
            self.validation,
            batch_size=EVALUATION_BATCH,
            device=run.device,
            channels_last=run.recipe.channels_last,
            description="validating",
        ).top1

    def _save_or_stop(self, last: bool, seconds: float) -> None:
        due = last or time.monotonic() - self.written >= self.checkpoint_seconds
        if due:
            self._save()
        try:
            if self.check is not None and not last:
                self.check(seconds)
        except BaseException:
            if not due:
                self._save()
            raise

    def _save(self) -> None:
        if self.path is not None:
            state.save(self.path, self.run, self.callbacks, self.same)
            self.written = time.monotonic()


def _fabric(device: str, recipe: Recipe) -> Fabric:
    """Lightning Fabric for one device."""
    from lightning_fabric import Fabric

    accelerator, _, index = device.partition(":")
    if accelerator not in ("auto", "cpu", "cuda", "mps"):
        raise ConfigError(f"device={device!r} is not auto, cpu, cuda, cuda:N or mps")
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={device!r}: PyTorch sees no CUDA device here; use cpu")
    if accelerator != "cuda" and recipe.precision == "16-mixed":
        raise ConfigError(f"precision='16-mixed' needs a GPU, not {accelerator}; use bf16-mixed or 32-true")
    chosen: list[int] | int = [int(index)] if index else 1
    return Fabric(accelerator=accelerator, devices=chosen, precision=recipe.precision)


def _seed(seed: int, epoch: int) -> None:
    number = int(torch.randint(2**62, (), generator=seeded(seed, epoch, 6)))
    torch.manual_seed(number)
    random.seed(number)


@contextmanager
def _given_back(model: nn.Module, recipe: Recipe) -> Iterator[None]:
    """Training mode, random state and PyTorch's switches: set for the run, given back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    python = random.getstate()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
        try:
            if not model.training:
                model.train()
            if recipe.deterministic:
                torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = not recipe.deterministic
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            torch.backends.cudnn.benchmark = benchmark
            random.setstate(python)
            for module, training in modes:
                module.training = training
