"""One training run: its state, what callbacks see of it, its history, and CUDA graphs of its network."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NotRequired, Protocol, TypedDict

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..data import ImageData
from ..profiling.macs import measure
from .recipe import AUTOCAST, Recipe

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Graphed(nn.Module):
    """A network recorded as CUDA graphs for one batch size.

    In eval mode the network runs as it is. The network itself is not changed, so it can be recorded again
    after a cut.

    **Arguments:**

    - `model`: in training mode, on the GPU.
    - `images`: a batch of the size, type and memory format of those to come.
    - `dtype`: of autocast, or None.
    """

    def __init__(self, model: nn.Module, images: Tensor, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.training = model.training  # not train(), which would wake frozen batch norms
        kept = [(buffer, buffer.clone()) for buffer in model.buffers()]  # recording changes running statistics
        autocast: AbstractContextManager[object] = nullcontext()
        if dtype is not None:  # casts that are remembered outside a graph are gone when it is replayed
            autocast = torch.autocast(images.device.type, dtype=dtype, cache_enabled=False)
        devices = [images.device] if images.device.type == "cuda" else []
        with torch.random.fork_rng(devices), autocast:
            torch.cuda.make_graphed_callables(self, (images,), allow_unused_input=True)
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)

    def forward(self, images: Tensor) -> Tensor:
        """The network's logits."""
        logits: Tensor = self.model(images)
        return logits


class Row(TypedDict):
    """One epoch.

    - `phase`: name of the run, such as "train" or "retrain"; `epoch`: counted from 1.
    - `train_loss`: mean cross-entropy over the epoch's batches, without what callbacks add.
    - `validation_top1`: percent, after the epoch's callbacks; None where nothing was held out or asked.
    - `learning_rate`: of the last batch.
    - `seconds`: training and callbacks, without validation and checkpoint.
    - `macs`: multiply-accumulates an image of the network that the epoch ends with.
    - `events`: what callbacks reported.
    - `extra_macs`: multiply-accumulates an image that callbacks added in the epoch's batches; left out where none.
    - `mean_macs`: multiply-accumulates an image, mean over the epoch's batches; left out where the network is of one
      size in all of them. `extra_macs` is then a mean, too.
    """

    phase: str
    epoch: int
    train_loss: float
    validation_top1: float | None
    learning_rate: float
    seconds: float
    macs: int
    events: list[str]
    extra_macs: NotRequired[float]
    mean_macs: NotRequired[float]


@dataclass
class History:
    """The epochs of a run."""

    rows: list[Row] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Training time of all epochs, also of those before an interruption."""
        return sum(row["seconds"] for row in self.rows)

    @property
    def best_top1(self) -> float | None:
        """The best validation top-1, or None without validation. Optimistic: report the last one."""
        found = [row["validation_top1"] for row in self.rows if row["validation_top1"] is not None]
        return max(found, default=None)

    @property
    def last_top1(self) -> float | None:
        """The validation top-1 after the last epoch."""
        return self.rows[-1]["validation_top1"] if self.rows else None


@dataclass(frozen=True, slots=True)
class Batch:
    """The present training batch: images (b, channels, size, size), labels (b,), logits (b, classes), loss ()."""

    images: Tensor
    labels: Tensor
    logits: Tensor
    loss: Tensor


class Callback(Protocol):
    """A part of a run of one's own: derive from it and override what is needed, or have all its methods.

    A callback may change the network physically, as long as every parameter stays the same object (`surgery.apply`
    does so) and it calls `run.structure_changed()` afterwards. Cut between batches: in `after_step` or `on_epoch_end`.
    """

    def on_start(self, run: Run) -> None:
        """Called once in each process, with model and optimizer in the state that they start or resume from.

        After an interruption the network is pruned already; `load_state_dict` follows.
        """

    def on_batch_loss(self, run: Run) -> Tensor | None:  # noqa: ARG002  # what overrides it needs the run
        """A scalar to add to the batch's loss, or None; `run.batch` holds inputs, outputs and loss of this batch."""
        return None

    def after_backward(self, run: Run) -> None:
        """Called with the gradients in place (unscaled), before the optimizer's step."""

    def after_step(self, run: Run) -> None:
        """Called after each step of the optimizer, when `run.step` of them are done; the batch is gone.

        With several processes it is called in each, with the same weights; running statistics and random state are each
        process's own.
        """

    def on_epoch_end(self, run: Run) -> None:
        """Called after the epoch's last batch, before validation and the checkpoint.

        With several processes it is called in each, with the same weights and random state; what rank 0 decides by
        anything else must be sent to the others (`filterfold.utils.distributed.agreed`).
        """

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint must hold: nested dicts, lists and tuples of tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class Run:
    """The state of a run, for its callbacks.

    **Attributes:**

    - `model`: the network itself, not wrapped; `optimizer`: the one that steps it.
    - `data`, `recipe`, `phase`: what `train` was given.
    - `fabric`: Lightning Fabric, for the device and precision, and for gradients over several processes.
    - `epoch`: the present epoch, counted from 1; 0 before the first.
    - `step`: batches done in the whole run; `steps`: batches of one epoch.
    - `history`: rows of the epochs that are over.
    - `loss`: mean training loss of the epoch that is over, in `Callback.on_epoch_end`; None before the first.
    - `macs`: multiply-accumulates an image of the present network.
    - `extra_macs`: what callbacks add to it from now on, for an image: a teacher's forward pass.
    - `averaged`: the moving average of the network, of the same sizes, or None; whoever cuts the network cuts it alike
      (the `averaged` of `surgery.apply`).
    - `batch`: the present `Batch`, inside `Callback.on_batch_loss`; else None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: ImageData,
        recipe: Recipe,
        fabric: Fabric,
        phase: str,
    ) -> None:
        self.model, self.optimizer, self.data, self.recipe = model, optimizer, data, recipe
        self.fabric, self.phase = fabric, phase
        self.epoch = 0
        self.step = 0
        self.steps = max(1, len(data.train) // recipe.batch_size)
        self.loss: float | None = None
        self.history = History()
        self.macs = 0
        self.extra_macs = 0
        self.batch: Batch | None = None
        self._events: list[str] = []
        self._compiled = False
        self.forward: nn.Module = model
        self.averaged = copy.deepcopy(model).requires_grad_(False) if recipe.ema else None
        self.structure_changed()

    @property
    def device(self) -> torch.device:
        """Where the run computes."""
        return self.fabric.device

    @property
    def example(self) -> Tensor:
        """One image of zeros on the run's device, shape (1, channels, size, size), for tracing and counting."""
        return self.data.example.to(self.device)

    def event(self, text: str) -> None:
        """Add a text to the events in the row of the present epoch."""
        self._events.append(text)

    def take_events(self) -> list[str]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events

    def structure_changed(self) -> None:
        """Tell the run that the sizes of the network have changed: set memory formats, wrap it, count its cost."""
        layout = torch.channels_last if self.recipe.channels_last else torch.contiguous_format
        for tensor in (*_tensors(self.model), *_tensors(self.averaged)):
            form = layout if tensor.ndim == 4 else torch.contiguous_format
            if not tensor.is_contiguous(memory_format=form):
                tensor.data = tensor.data.contiguous(memory_format=form)
        inner: Any = self.model
        if self.recipe.compile:
            if self._compiled:  # graphs of the old shapes would count against the limit of recompilations
                torch.compiler.reset()
            inner = torch.compile(self.model, mode="reduce-overhead" if self.recipe.cuda_graphs else "default")
            self._compiled = True
        elif self.recipe.cuda_graphs:
            inner = self._graphed(layout)
        self.forward = self.fabric.setup_module(inner)
        self.macs = measure(self.model, self.example).macs

    @torch.no_grad()
    def average(self) -> None:
        """Move the averaged network, if there is one, towards the present one; after each step."""
        if self.averaged is None:
            return
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        pairs = list(zip(_tensors(self.averaged), _tensors(self.model), strict=True))
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        move = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # so in torch's stubs
        move([one for one, _ in floating], [other for _, other in floating], None)
        for one, other in pairs:
            if not one.is_floating_point():
                one.copy_(other)

    @torch.no_grad()
    def take_average(self) -> None:
        """Put the averaged values, if there are any, into the network."""
        if self.averaged is not None:
            for one, other in zip(_tensors(self.averaged), _tensors(self.model), strict=True):
                other.copy_(one)

    def _graphed(self, layout: torch.memory_format) -> nn.Module:
        """The network recorded for the size and type of the training batches."""
        dtype = AUTOCAST[self.recipe.precision]
        count = min(self.recipe.batch_size, len(self.data.train))
        images = self.example.to(dtype or torch.float32).repeat(count, 1, 1, 1).contiguous(memory_format=layout)
        return Graphed(self.model, images, dtype)


def _tensors(model: nn.Module | None) -> list[Tensor]:
    return [] if model is None else [*model.parameters(), *model.buffers()]
