"""Online clustering as a callback of Hugging Face's `Trainer`. Needs `transformers` and `accelerate`."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils._pytree import tree_map
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import CheckpointError, ConfigError
from ..surgery.layer_attributes import restore, snapshot
from ..utils.io import load_tree, save_tree
from .online_clustering import OnlineFilterClustering
from .options import as_objects
from .schedule import Schedule

_LOG = logging.getLogger("filterfold.online")


FILE = "filterfold.safetensors"
"""In a trainer's checkpoint: the network's sizes, and the clustering's state."""


class HuggingFaceCallback(TrainerCallback):
    """Lets a network shrink while a `Trainer` trains it, in one process.

    A trainer's own checkpoints hold the weights of the smaller network but not its sizes; the callback writes these and
    its own state into them (`filterfold.safetensors`). To go on from one, make the model as at first and let the
    callback resize it: `callback.resume(model, folder)`, then `Trainer(…).train(resume_from_checkpoint=folder)`.

    **Arguments:**

    - `example_inputs`: what the model is called with, such as `{"pixel_values": images[:1]}`, for tracing.
    - `schedule`: see `Schedule.of`; the length is that of the trainer's arguments.
    - `monitor`: key of the trainer's log, a loss, that a schedule with patience watches: "loss" or "eval_loss".
    - `options`: everything else that `OnlineFilterClustering` takes besides model, inputs and optimizer; also the
      fields of its `Pull`, `CutOptions` and `Target` by their names.

    ```python
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[HuggingFaceCallback(example, macs=0.3)])
    ```
    """

    def __init__(
        self,
        example_inputs: Any,
        *,
        schedule: str | Schedule | Mapping[str, Any] = "gradual",
        monitor: str = "loss",
        **options: Any,
    ) -> None:
        Schedule.of(schedule, 100, 100)  # refuses unknown names now
        self.example_inputs, self.schedule, self.monitor = example_inputs, schedule, monitor
        self.options = as_objects(options)
        self.online: OnlineFilterClustering | None = None
        self._state: Mapping[str, Any] | None = None

    def resume(self, model: nn.Module, checkpoint: Path | str) -> None:
        """Give a fresh model the sizes that it had when a checkpoint was written, before the trainer is made with it.

        **Arguments:**

        - `model`: as it was at first; changed in place. Its weights are the trainer's business.
        - `checkpoint`: the trainer's folder, `…/checkpoint-N`.

        **Raises:** `CheckpointError` if the folder was written without this callback, or is of another network.
        """
        path = Path(checkpoint) / FILE
        state = load_tree(path)
        if not {"structure", "online"} <= set(state):
            raise CheckpointError(f"{path}: not written by HuggingFaceCallback")
        restore(model, state["structure"])
        self._state = state["online"]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Trace the network."""
        if args.world_size > 1 or args.n_gpu > 1:
            raise ConfigError("HuggingFaceCallback works on one device; use OnlineFilterClustering in your own loop")
        if args.fp16 and not args.max_grad_norm:
            raise ConfigError("HuggingFaceCallback: fp16 gradients are unscaled only where max_grad_norm is set")
        schedule = Schedule.of(self.schedule, math.ceil(args.num_train_epochs), state.max_steps)
        done = state.global_step if schedule.unit == "step" else int((state.epoch or 0) + 1e-6)
        if state.global_step and (self._state is None or self._state["epoch"] != done):
            raise ConfigError(
                "HuggingFaceCallback: before training goes on from a checkpoint, call resume(model, checkpoint) with it"
            )
        example = tree_map(lambda leaf: leaf.to(args.device) if hasattr(leaf, "to") else leaf, self.example_inputs)
        optimizer = kwargs["optimizer"]
        self.online = OnlineFilterClustering(
            kwargs["model"],
            example,
            getattr(optimizer, "optimizer", optimizer),  # out of accelerate's wrapper
            schedule=schedule,
            **self.options,
        )
        if self._state is not None:
            self.online.load_state_dict(self._state)
            self._state = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the network's sizes and the clusters beside the trainer's own files."""
        if self.online is not None:
            folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
            save_tree(folder / FILE, {"structure": snapshot(self.online.model), "online": self.online.state_dict()})

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The clustering term, on gradients that are clipped already."""
        if self.online is not None:
            self.online.add_gradients()
            self.online.merge_gradients()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Do what a schedule by epochs says."""
        self._step("epoch", round(state.epoch or 0), state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Do what a schedule by optimizer steps says."""
        self._step("step", state.global_step, state)

    def _step(self, unit: str, done: int, state: TrainerState) -> None:
        if self.online is None or self.online.schedule is None or self.online.schedule.unit != unit:
            return
        metric = next((row[self.monitor] for row in reversed(state.log_history) if self.monitor in row), None)
        for event in self.online.step(done, metric):
            _LOG.info("%s %d: %s", unit, done, event)
