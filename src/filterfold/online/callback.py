"""Online clustering as a callback of `filterfold.training.train`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, ConfigError
from .filters import OnlineFilterClustering
from .schedule import Schedule

_OPTIONS = set(inspect.signature(OnlineFilterClustering).parameters) - {"model", "example_inputs", "optimizer"}


class OnlineCallback:
    """Makes an `OnlineFilterClustering` when the run starts and lets it take part.

    Follows the protocol of `filterfold.training.Callback` without importing it. The options are plain values, so a
    trial can be written down.

    **Arguments:**

    - `schedule`: "gradual", "document" or "plateau" (see `Schedule`; epochs are the run's, the loss is that of
      training), a `Schedule`, or its `to_dict()`.
    - `options`: everything else that `OnlineFilterClustering` takes besides model, inputs and optimizer.

    ```python
    >>> callback = OnlineCallback(clusters=10, schedule="document", strength=0.001)
    >>> callback.online is None  # until the run starts
    True

    ```
    """

    def __init__(self, *, schedule: str | Schedule | Mapping[str, Any] = "gradual", **options: Any) -> None:
        Schedule.of(schedule, 1)  # refuses unknown names now
        unknown = sorted(set(options) - _OPTIONS)
        if unknown:
            raise ConfigError(f"online clustering has no option {unknown[0]!r}")
        self.schedule, self.options = schedule, options
        self.online: OnlineFilterClustering | None = None

    def on_start(self, run: Any) -> None:
        """Trace the run's model."""
        schedule = Schedule.of(self.schedule, run.recipe.epochs)
        self.online = OnlineFilterClustering(run.model, run.example, run.optimizer, schedule=schedule, **self.options)

    def on_batch_loss(self, run: Any) -> Tensor | None:  # noqa: ARG002  # the protocol passes it
        """The clustering term, where there is one."""
        online = self.online
        return online.loss() if online is not None and online.pulls else None

    def after_backward(self, run: Any) -> None:  # noqa: ARG002  # the protocol passes it
        """Merge the gradients of clusters, with the centripetal pull."""
        if self.online is not None:
            self.online.merge_gradients()

    def on_epoch_end(self, run: Any) -> None:
        """Do what the schedule says and tell the run."""
        online = self._started()
        cuts = len(online.cuts)
        for event in online.step(run.epoch, run.loss):
            run.event(event)
        if len(online.cuts) > cuts:
            run.structure_changed()

    def state_dict(self) -> dict[str, Any]:
        """The clustering's state."""
        return self._started().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._started().load_state_dict(state)

    def _started(self) -> OnlineFilterClustering:
        if self.online is None:
            raise CheckpointError("online clustering: the run has not started, so there is no state")
        return self.online
