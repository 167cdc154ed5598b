"""Online clustering as a callback of Lightning's `Trainer`. Needs `lightning` (or `pytorch_lightning`)."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from ..errors import CheckpointError, ConfigError
from ..surgery.layer_attributes import restore, snapshot
from ..utils.distributed import check_wrappers, renew
from .online_clustering import OnlineFilterClustering
from .options import as_objects
from .schedule import Schedule

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]


_LOG = logging.getLogger("filterfold.online")


class LightningCallback(Callback):
    """Lets a network shrink while a `Trainer` trains it, in one process or in several with `strategy="ddp"`.

    In several, rank 0 decides and all cut alike. Clusters, cuts and the network's sizes go into Lightning's
    checkpoints, and come back from them.

    **Arguments:**

    - `network`: attribute of the `LightningModule` that holds the network; None: the module itself is one.
    - `example_inputs`: what the network is called with, for tracing; None: the module's `example_input_array`.
    - `schedule`: see `Schedule.of`; the length is that of the trainer's `max_epochs` or `max_steps`.
    - `monitor`: name of the logged metric, a loss, that a schedule with patience watches.
    - `options`: everything else that `OnlineFilterClustering` takes besides model, inputs and optimizer; also the
      fields of its `Pull`, `CutOptions` and `Target` by their names.

    ```python
    trainer = Trainer(max_epochs=100, callbacks=[LightningCallback(network="net", macs=0.3)])
    ```
    """

    def __init__(
        self,
        *,
        network: str | None = None,
        example_inputs: Any = None,
        schedule: str | Schedule | Mapping[str, Any] = "gradual",
        monitor: str | None = None,
        **options: Any,
    ) -> None:
        Schedule.of(schedule, 100, 100)  # refuses unknown names now
        self.network, self.example_inputs, self.schedule, self.monitor = network, example_inputs, schedule, monitor
        self.options = as_objects(options)
        self.online: OnlineFilterClustering | None = None
        self._state: Mapping[str, Any] | None = None
        self._structure: Mapping[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the network the sizes of the checkpoint that is about to be loaded into it."""
        if stage != "fit":
            return
        given = pl_module.on_load_checkpoint

        def resized(checkpoint: dict[str, Any]) -> None:
            kept = checkpoint.get("callbacks", {}).get(self.state_key)
            if kept:
                restore(self._network(pl_module), kept["structure"])
            given(checkpoint)

        pl_module.on_load_checkpoint = resized  # type: ignore[method-assign]  # no hook of callbacks comes early enough

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Trace the network, or go on."""
        vars(pl_module).pop("on_load_checkpoint", None)
        if len(trainer.optimizers) != 1:
            raise ConfigError(f"LightningCallback needs one optimizer, not {len(trainer.optimizers)}")
        wrapper = trainer.strategy.model
        if trainer.world_size > 1 and not isinstance(wrapper, DistributedDataParallel):
            name = type(trainer.strategy).__name__
            raise ConfigError(f"LightningCallback cuts what DDP holds whole on every rank, not {name}: strategy='ddp'")
        check_wrappers(wrapper or pl_module)
        example = pl_module.example_input_array if self.example_inputs is None else self.example_inputs
        if example is None:
            raise ConfigError("LightningCallback: give example_inputs=, or the module an example_input_array")
        example = tree_map(lambda leaf: leaf.to(pl_module.device) if hasattr(leaf, "to") else leaf, example)
        steps = trainer.estimated_stepping_batches
        schedule = Schedule.of(self.schedule, trainer.max_epochs or 1, int(steps) if math.isfinite(steps) else None)
        self.online = OnlineFilterClustering(
            self._network(pl_module), example, trainer.optimizers[0], schedule=schedule, **self.options
        )
        if self._state:
            self.online.load_state_dict(self._state["online"])
            self._state = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The clustering term, on gradients that are unscaled already; Lightning clips them afterwards."""
        if self.online is not None:
            self.online.add_gradients()
            self.online.merge_gradients()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Do what a schedule by optimizer steps says, once for each."""
        if self.online is not None and self.online.epoch < trainer.global_step:
            self._step("step", trainer.global_step, trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what a schedule by epochs says."""
        self._step("epoch", trainer.current_epoch + 1, trainer)

    def _step(self, unit: str, done: int, trainer: Trainer) -> None:
        if self.online is None or self.online.schedule is None or self.online.schedule.unit != unit:
            return
        metric = None if self.monitor is None else trainer.callback_metrics.get(self.monitor)
        cuts = len(self.online.cuts)
        for event in self.online.step(done, None if metric is None else float(metric)):
            _LOG.info("%s %d: %s", unit, done, event)
        if len(self.online.cuts) > cuts and trainer.strategy.model is not None:
            renew(trainer.strategy.model)

    def state_dict(self) -> dict[str, Any]:
        """The clustering's state and the network's structure."""
        if self.online is None:
            return {}
        return {"structure": snapshot(self.online.model), "online": self.online.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        self._state = state_dict

    def _network(self, pl_module: LightningModule) -> nn.Module:
        found: Any = pl_module if self.network is None else getattr(pl_module, self.network, None)
        if not isinstance(found, nn.Module):
            raise CheckpointError(f"{type(pl_module).__name__} has no network {self.network!r}")
        return found
