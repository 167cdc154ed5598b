"""The training loop."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from ..data import ImageData, batches
from ..data.augment import seeded
from ..data.splits import whole
from ..errors import ConfigError, ModelError, TrainingError
from ..utils import distributed
from ..utils.progress import show, track
from . import checkpoint
from .evaluate import check_fit, evaluate
from .fabric import handed_out, make
from .recipe import Recipe
from .run import Batch, Callback, History, Row, Run

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
    validate_every: int | None = None,
    device: str = "auto",
    phase: str = "train",
) -> History:
    """Train a network in place.

    With a checkpoint path the run can be killed at any time: the same call resumes after the last whole epoch and
    ends, on a CPU, with bit-identical weights. Order, augmentation and dropout of an epoch depend on
    `(recipe.seed, epoch)` only.

    Called in every process of a program that torchrun started (or in which `torch.distributed` is initialised), all
    train this one network: in every step each takes its part of the batch, which is as large as with one process, and
    gradients are averaged (DDP). Batch norm sees each process's part by itself, and its running statistics are averaged
    after every epoch. Rank 0 writes and reads the checkpoint, and calls `check` and the observers; all start with
    the weights of rank 0.

    **Arguments:**

    - `model`: maps images (b, channels, size, size) to logits (b, classes). It ends on the training device; modules
      in eval mode inside a network in training mode (frozen batch norms) stay as they are.
    - `data`: trained on `data.train`, watched on `data.validation`; `data.test` is not touched.
    - `recipe`: see `Recipe`; None: its defaults.
    - `callbacks`: see `Callback`, called in this order.
    - `observers`: each called with every new row of the history. They do not change the run: unlike callbacks they may
      differ when a run is resumed.
    - `optimizer`: over the model's parameters, instead of the recipe's. The schedule scales its groups' own
      learning rates, taken as those for `recipe.lr`.
    - `checkpoint`: file to write after each epoch and to go on from if it exists. A finished one is just loaded.
    - `checkpoint_seconds`: write at most so often; the last epoch is always written.
    - `check`: called after each epoch with the seconds that it took; it may raise to end the run, whose checkpoint
      is written first.
    - `validate_every`: instead of the recipe's.
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
    every = recipe.validate_every if validate_every is None else validate_every
    job = Job(model, data, recipe, tuple(callbacks), optimizer, every, device, phase)
    leading = Leading(observers, Path(checkpoint) if checkpoint is not None else None, checkpoint_seconds, check)
    distributed.join()
    if distributed.world_size() > 1:
        model.cpu()  # to be sent; each process moves it to its own device
    with handed_out(job):
        return work(job, leading)


@dataclass(frozen=True, slots=True)
class Job:
    """The arguments of `train` that every process of a run needs."""

    model: nn.Module
    data: ImageData
    recipe: Recipe
    callbacks: tuple[Callback, ...]
    optimizer: torch.optim.Optimizer | None
    validate_every: int
    device: str
    phase: str


@dataclass(frozen=True, slots=True)
class Leading:
    """The arguments of `train` that only rank 0 needs: what it does after an epoch."""

    observers: Sequence[Callable[[Row], object]] = ()
    checkpoint: Path | None = None
    checkpoint_seconds: float = 0.0
    check: Callable[[float], None] | None = None


def work(job: Job, leading: Leading | None = None) -> History:
    """Train in this process; `leading` is used in rank 0 only. See `train`."""
    model, data, recipe, callbacks = job.model, job.data, job.recipe, job.callbacks
    leading = leading or Leading()
    if min(recipe.batch_size, len(data.train)) < distributed.world_size():
        raise ConfigError(
            f"batches of {recipe.batch_size} images can't be shared by {distributed.world_size()} processes"
        )
    with _given_back(model, recipe):
        fabric = make(job.device, recipe, model, data.example)
        model.to(fabric.device)
        distributed.shared(tensor.detach() for tensor in (*model.parameters(), *model.buffers()))
        check_fit(model, data.example.to(fabric.device), len(data.classes))
        identity = checkpoint.identify(model, data, recipe, callbacks, job.optimizer, job.phase)
        tree = distributed.decided(lambda: checkpoint.read(leading.checkpoint, identity))
        if tree is not None:
            checkpoint.resize(model, tree)
        optimizer = job.optimizer or recipe.make_optimizer(model, len(data.classes))
        run = Run(model, optimizer, data, recipe, fabric, job.phase)
        loop = Loop(run, job, leading, identity)
        if tree is not None:
            checkpoint.resume(leading.checkpoint or "the checkpoint", run, tree)
        for callback in callbacks:
            callback.on_start(run)
        if tree is not None:
            for callback, kept in zip(callbacks, tree["callbacks"], strict=True):
                callback.load_state_dict(kept)
        try:
            with nullcontext() if distributed.is_first() else show(None):
                loop.go()
            run.take_average()
        finally:
            run.optimizer.zero_grad(set_to_none=True)
        return run.history


class Loop:
    """The epochs of one call of `train`."""

    def __init__(self, run: Run, job: Job, leading: Leading, identity: dict[str, Any]) -> None:
        self.run, self.leading, self.identity = run, leading, identity
        self.callbacks, self.validate_every = job.callbacks, job.validate_every
        self.split = run.data.train.to(run.device)
        self.validation = run.data.validation.to(run.device)
        self.stepper: Any = run.fabric.setup_optimizers(run.optimizer)
        self.rates = [group["lr"] / run.recipe.lr for group in run.optimizer.param_groups]
        self.augment = run.recipe.augment or run.data.augment
        self.whole = len(self.split) >= run.recipe.batch_size
        self.images = min(len(self.split), run.recipe.batch_size)
        self.part = distributed.own_part if distributed.world_size() > 1 else whole
        self.hooked = [c for c in job.callbacks if type(c).after_backward is not Callback.after_backward]
        self.stepping = [c for c in job.callbacks if type(c).after_step is not Callback.after_step]
        self.written = time.monotonic()

    def go(self) -> None:
        """Run the epochs that are left."""
        run, epochs = self.run, self.run.recipe.epochs
        for epoch in track(range(run.epoch + 1, epochs + 1), run.phase, epochs - run.epoch):
            run.epoch = epoch
            row = self.epoch()
            if self._validates(epoch):
                row["validation_top1"] = self._validate()
            run.history.rows.append(row)
            distributed.decided(lambda row=row: self._tell_and_save(row))  # type: ignore[misc]

    def epoch(self) -> Row:
        """Run the present epoch, without validation, and return its row."""
        run, recipe = self.run, self.run.recipe
        _seed(recipe.seed, run.epoch, distributed.rank())
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
            part=self.part,
        )
        total = torch.zeros((), dtype=torch.float64, device=run.device)
        rate, first, macs, extra = 0.0, run.macs, 0, 0
        for images, labels in track(feed, f"epoch {run.epoch}", run.steps):
            rate = recipe.rate(run.step, run.steps)
            macs, extra = macs + run.macs, extra + run.extra_macs
            total += self._batch(images, labels, rate)
            run.step += 1
            run.average()
            for callback in self.stepping:
                callback.after_step(run)
        loss = float(distributed.summed(total)) / (run.steps * distributed.world_size())
        if not math.isfinite(loss):
            raise TrainingError(f"the loss of epoch {run.epoch} is {loss}; lower the learning rate (it was {rate:g})")
        run.loss = loss
        if distributed.world_size() > 1:  # callbacks find the same network and the same random state everywhere
            distributed.averaged(run.model.buffers())
            distributed.averaged(() if run.averaged is None else run.averaged.buffers())
            _seed(recipe.seed, run.epoch, distributed.world_size())
        for callback in self.callbacks:
            callback.on_epoch_end(run)
        row: Row = {
            "phase": run.phase,
            "epoch": run.epoch,
            "train_loss": loss,
            "validation_top1": None,
            "learning_rate": rate,
            "seconds": time.perf_counter() - started,
            "macs": run.macs,
            "events": run.take_events(),
        }
        if macs != run.steps * first:
            row["mean_macs"] = macs / run.steps
        if extra:
            row["extra_macs"] = extra / run.steps if extra % run.steps else extra // run.steps
        return row

    def _batch(self, images: Tensor, labels: Tensor, rate: float) -> Tensor:
        """Take one step; return its loss, detached, because surgery needs that no autograd graph outlives the step."""
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
        run.batch = Batch(images, labels, logits, loss)
        for callback in self.callbacks:
            extra = callback.on_batch_loss(run)
            if extra is not None:
                objective = objective + extra
        run.batch = None
        part = len(labels) * distributed.world_size() / self.images
        if part != 1:  # processes have parts of different sizes: the mean is to be over images
            loss, objective = loss * part, objective * part
        run.fabric.backward(objective)
        if self.hooked or run.recipe.clip:
            run.fabric.strategy.precision.unscale_gradients(run.optimizer)
            for callback in self.hooked:
                callback.after_backward(run)
        if run.recipe.clip:
            members = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(members, run.recipe.clip)
        self.stepper.step()
        return loss.detach()

    def _validates(self, epoch: int) -> bool:
        every = self.validate_every
        return len(self.validation) > 0 and every > 0 and (epoch % every == 0 or epoch == self.run.recipe.epochs)

    def _validate(self) -> float:
        run = self.run
        return evaluate(
            run.forward if run.averaged is None else run.averaged,
            self.validation,
            batch_size=EVALUATION_BATCH,
            device=run.device,
            precision="32-true" if run.averaged is None else run.recipe.precision,
            channels_last=run.recipe.channels_last,
            description="validating",
            together=distributed.world_size() > 1,
        ).top1

    def _tell_and_save(self, row: Row) -> None:
        for observer in self.leading.observers:
            observer(row)
        last, check = row["epoch"] == self.run.recipe.epochs, self.leading.check
        due = last or time.monotonic() - self.written >= self.leading.checkpoint_seconds
        if due:
            self._save()
        try:
            if check is not None and not last:
                check(row["seconds"])
        except BaseException:
            if not due:
                self._save()
            raise

    def _save(self) -> None:
        if self.leading.checkpoint is not None:
            checkpoint.save(self.leading.checkpoint, self.run, self.callbacks, self.identity)
            self.written = time.monotonic()


def _seed(seed: int, epoch: int, rank: int = 0) -> None:
    number = int(torch.randint(2**62, (), generator=seeded(seed, epoch, 6, *([rank] if rank else []))))
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
            for module in model.modules() if recipe.freeze_norms else ():
                if isinstance(module, _BatchNorm):
                    module.eval()
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
