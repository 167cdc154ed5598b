"""Online clustering and distillation as callbacks of `filterfold.training.train`.

They follow the protocol of `filterfold.training.Callback` without importing it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..surgery.weights import Weights
from ..utils.distributed import averaged
from ..utils.modules import in_memory_order, named_tensors
from .assign import ClusterRow
from .distillation import Distillation, check_temperature
from .online_clustering import OnlineFilterClustering
from .options import as_objects
from .schedule import Schedule


class OnlineCallback:
    """Makes an `OnlineFilterClustering` when the run starts and lets it take part; the run's average is cut alike.

    The options are plain values, so a trial can be written down.

    **Arguments:**

    - `schedule`: see `Schedule.of`; epochs and steps are the run's, the loss is that of training.
    - `distill`: weight of a second loss from the first cut on, in which the network as it was before teaches the
      smaller one (see `Distillation.loss`); 0: none. `temperature`: of both their logits.
    - `options`: everything else that `OnlineFilterClustering` takes besides model, inputs and optimizer; also the
      fields of its `Pull`, `CutOptions` and `Target` by their names.

    ```python
    >>> callback = OnlineCallback(clusters=10, schedule="document", strength=0.001)
    >>> callback.online is None  # until the run starts
    True

    ```
    """

    def __init__(
        self,
        *,
        schedule: str | Schedule | Mapping[str, Any] = "gradual",
        distill: float = 0.0,
        temperature: float = 2.0,
        **options: Any,
    ) -> None:
        known = Schedule.of(schedule, 100, 100)  # refuses unknown names now
        if known.unit == "step" and known.patience is not None:
            raise ConfigError("schedule: waiting for a plateau, OnlineCallback counts epochs: give unit='epoch'")
        if not (math.isfinite(distill) and distill >= 0):
            raise ConfigError(f"distill={distill}: must be a number of 0 or more")
        check_temperature(temperature)
        self.schedule, self.options = schedule, as_objects(options)
        self.distill, self.temperature = distill, temperature
        self.online: OnlineFilterClustering | None = None
        self.teacher: Distillation | None = None
        self._run: Any = None
        self._steps: set[int] = set()

    def on_start(self, run: Any) -> None:
        """Trace the run's model."""
        schedule = Schedule.of(self.schedule, run.recipe.epochs, run.recipe.epochs * run.steps)
        given = self.options.get("averaged", ())
        averages = [given] if isinstance(given, nn.Module) else list(given)
        averages += [] if run.averaged is None else [run.averaged]
        options = {**self.options, "schedule": schedule, "averaged": averages}
        self.online = OnlineFilterClustering(run.model, run.example, run.optimizer, **options)
        self._run = run
        self._steps = {*schedule.updates, *dict(schedule.milestones)} if schedule.unit == "step" else set()

    def on_batch_loss(self, run: Any) -> Tensor | None:
        """The teacher's term, where there is one."""
        if self.teacher is None:
            return None
        with run.fabric.autocast():
            return self.distill * self.teacher.loss(run.batch.images, run.batch.logits)

    def after_backward(self, run: Any) -> None:  # noqa: ARG002  # the protocol passes it
        """The clustering term, or the merging of gradients with the centripetal pull."""
        if self.online is not None:
            self.online.add_gradients()
            self.online.merge_gradients()

    def after_step(self, run: Any) -> None:
        """Do what a schedule by steps says."""
        if run.step in self._steps:
            averaged(run.model.buffers())  # several processes: each has its own running statistics until the epoch ends
            self._step(run, run.step)

    def on_epoch_end(self, run: Any) -> None:
        """Do what a schedule by epochs says."""
        if not self._steps:
            self._step(run, run.epoch, run.loss)

    def _step(self, run: Any, done: int, loss: float | None = None) -> None:
        """Do what the schedule says and tell the run."""
        online = self._started()
        cuts = len(online.cuts)
        teacher = None
        if self.distill > 0 and not online.plans and self._may_cut(online.schedule, done):
            teacher = Distillation(run.model, temperature=self.temperature)
        for event in online.step(done, loss):
            run.event(event)
        if len(online.cuts) > cuts:
            run.structure_changed()
            if teacher is not None:
                self._teach(teacher)

    @property
    def history(self) -> list[ClusterRow]:
        """The clustering's rows by the run's epochs, also where the schedule counts steps."""
        rows = self._started().history
        return [{**row, "epoch": -(-row["epoch"] // self._run.steps)} for row in rows] if self._steps else rows

    def state_dict(self) -> dict[str, Any]:
        """The clustering's state, and the teacher."""
        state = self._started().state_dict()
        return state if self.teacher is None else {**state, "teacher": self.teacher.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._started().load_state_dict(state)
        if self.distill and "teacher" in state:
            teacher = Distillation(self._run.model, temperature=self.temperature)
            teacher.load_state_dict(state["teacher"])
            self._teach(teacher)

    @staticmethod
    def _may_cut(schedule: Schedule | None, done: int) -> bool:
        return schedule is None or schedule.patience is not None or schedule.passed(done, 0) > 0

    def _teach(self, teacher: Distillation) -> None:
        self.teacher = teacher
        self._run.extra_macs += teacher.macs(self._run.example)

    def _started(self) -> OnlineFilterClustering:
        if self.online is None:
            raise CheckpointError("online clustering: the run has not started, so there is no state")
        return self.online


class DistillationCallback:
    """Lets a teacher take part in a run from its first batch on: (1 - weight) · loss + weight · teacher's loss.

    The teacher's forward passes count in the run's multiply-accumulates. It is not kept in checkpoints: the same call
    must give the same teacher again.

    **Arguments:**

    - `distillation`: the teacher, from the network before the cut, or any other with the same outputs. It is moved to
      the run's device. With features it must know of the cuts made so far.
    - `online`: what cuts in the same run, if anything does, so that features are followed through its plans.

    ```python
    >>> teacher = nn.Linear(4, 3)
    >>> DistillationCallback(Distillation(teacher, weight=0.7)).distillation.weight
    0.7

    ```
    """

    def __init__(self, distillation: Distillation, online: OnlineCallback | None = None) -> None:
        self.distillation, self.online = distillation, online

    def on_start(self, run: Any) -> None:
        """Move the teacher and count what it costs."""
        network = self.distillation.to(run.device).network
        for _, tensor in named_tensors(
            network
        ):  # in one order in memory, wherever it comes from: others compute other bits
            order = [0, 2, 3, 1] if run.recipe.channels_last and tensor.dim() == 4 else range(tensor.dim())
            tensor.data = in_memory_order(tensor.data, list(order))
        run.extra_macs += self.distillation.macs(run.example)

    def on_batch_loss(self, run: Any) -> Tensor:
        """What makes the batch's loss the whole objective."""
        plans = self.online.online.plans if self.online is not None and self.online.online is not None else []
        for plan in plans[self.distillation.followed :]:
            self.distillation.follow(plan)
        task: Tensor = run.batch.loss
        with run.fabric.autocast():
            taught = self.distillation.loss(run.batch.images, run.batch.logits)
        return self.distillation.weight * (taught - task)

    def after_backward(self, run: Any) -> None:
        """Nothing."""

    def after_step(self, run: Any) -> None:
        """Nothing."""

    def on_epoch_end(self, run: Any) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        """What the teacher was, to know it again."""
        return {"teacher": self._fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refuse to go on with another teacher."""
        if state["teacher"] != self._fingerprint():
            raise CheckpointError("the checkpoint was written with another teacher; delete it to start afresh")

    def _fingerprint(self) -> str:
        network = Weights("the teacher", dict(named_tensors(self.distillation.network))).fingerprint
        return f"{network} {self.distillation.weight:g} {self.distillation.temperature:g}"
