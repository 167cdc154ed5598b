"""Online clustering as a callback of Hugging Face's `Trainer`. Needs `transformers` and `accelerate`."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from torch.utils._pytree import tree_map
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import ConfigError
from .filters import OnlineFilterClustering
from .schedule import Schedule

_LOG = logging.getLogger("filterfold.online")


class HuggingFaceCallback(TrainerCallback):
    """Lets a network shrink while a `Trainer` trains it, in one process.

    A trainer's own checkpoints hold the weights of the smaller network but not its sizes, so it can't resume from one
    written after a cut; `filterfold.save` the trained model.

    **Arguments:**

    - `example_inputs`: what the model is called with, such as `{"pixel_values": images[:1]}`, for tracing.
    - `schedule`: "gradual", "document" or "plateau" over the arguments' `num_train_epochs`, a `Schedule`, or its
      `to_dict()`.
    - `monitor`: key of the trainer's log, a loss, that a schedule with patience watches: "loss" or "eval_loss".
    - `options`: everything else that `OnlineFilterClustering` takes besides model, inputs and optimizer.

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
        Schedule.of(schedule, 1)  # refuses unknown names now
        self.example_inputs, self.schedule, self.monitor, self.options = example_inputs, schedule, monitor, options
        self.online: OnlineFilterClustering | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Trace the network."""
        if args.world_size > 1 or args.n_gpu > 1:
            raise ConfigError("HuggingFaceCallback works on one device; use OnlineFilterClustering in your own loop")
        if args.fp16 and not args.max_grad_norm:
            raise ConfigError("HuggingFaceCallback: fp16 gradients are unscaled only where max_grad_norm is set")
        if state.global_step:
            raise ConfigError("HuggingFaceCallback can't resume: start afresh, without resume_from_checkpoint")
        example = tree_map(lambda leaf: leaf.to(args.device) if hasattr(leaf, "to") else leaf, self.example_inputs)
        optimizer = kwargs["optimizer"]
        self.online = OnlineFilterClustering(
            kwargs["model"],
            example,
            getattr(optimizer, "optimizer", optimizer),  # out of accelerate's wrapper
            schedule=Schedule.of(self.schedule, math.ceil(args.num_train_epochs)),
            **self.options,
        )

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
        """Do what the schedule says."""
        if self.online is None:
            return
        metric = next((row[self.monitor] for row in reversed(state.log_history) if self.monitor in row), None)
        epoch = round(state.epoch or 0)
        for event in self.online.step(epoch, metric):
            _LOG.info("epoch %d: %s", epoch, event)
