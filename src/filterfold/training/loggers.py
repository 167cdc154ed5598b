"""Logging the figures of a run to TensorBoard or MLflow, epoch by epoch.

Both are asked for by name and imported only then. They do not change a run: with or without them it ends with the same
weights, and can be resumed.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .run import Row

LOGS = "logs"


MLRUNS = "mlruns"
"""Folders in a run folder: TensorBoard's event files, one folder for each trial; MLflow's store, unless
`MLFLOW_TRACKING_URI` names a server."""


SERVER = "MLFLOW_TRACKING_URI"


class Tracker:
    """Logs the figures of one trial; TensorBoard and MLflow derive from it."""

    def scalar(self, name: str, value: float, step: int) -> None:
        """Log one figure."""
        raise NotImplementedError

    def text(self, name: str, text: str, step: int) -> None:
        """Log a text, where the tracker has texts."""

    def close(self) -> None:
        """Write what is not written yet."""

    def row(self, row: Row) -> None:
        """Log an epoch: scalars by phase (`train/loss`, `retrain/macs`, …), and the cuts as text."""
        phase, epoch = row["phase"], row["epoch"]
        self.scalar(f"{phase}/loss", row["train_loss"], epoch)
        if row["validation_top1"] is not None:
            self.scalar(f"{phase}/validation_top1", row["validation_top1"], epoch)
        self.scalar(f"{phase}/learning_rate", row["learning_rate"], epoch)
        self.scalar(f"{phase}/macs", row["macs"], epoch)
        self.scalar(f"{phase}/seconds", row["seconds"], epoch)
        if row["events"]:
            self.text(f"{phase}/events", "\n\n".join(row["events"]), epoch)

    def final(self, figures: Mapping[str, float]) -> None:
        """Log the results at the end: scalars `final/…`."""
        for name, value in figures.items():
            self.scalar(f"final/{name}", value, 0)


class TensorBoard(Tracker):
    """Event files for TensorBoard.

    **Arguments:**

    - `folder`: the run folder; `name`: of the trial.
    """

    def __init__(self, folder: Path, name: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder / LOGS / name))

    def scalar(self, name: str, value: float, step: int) -> None:
        """Write a scalar."""
        self.writer.add_scalar(name, value, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Write a text."""
        self.writer.add_text(name, text, step)

    def close(self) -> None:
        """Write what is not written yet."""
        self.writer.close()


class MLflow(Tracker):
    """A run in MLflow: on the server that `MLFLOW_TRACKING_URI` names, else in a store in the run folder.

    A trial that is resumed logs to the run that it had.

    **Arguments:**

    - `folder`: the run folder, whose name is the experiment's; `name`: of the trial.
    """

    def __init__(self, folder: Path, name: str) -> None:
        from mlflow.tracking import MlflowClient

        folder.mkdir(parents=True, exist_ok=True)
        uri = os.environ.get(SERVER) or f"sqlite:///{(folder / MLRUNS).resolve()}.db"
        self.client: Any = MlflowClient(tracking_uri=uri)
        title = folder.resolve().name
        known = self.client.get_experiment_by_name(title)
        experiment = known.experiment_id if known else self.client.create_experiment(title)
        found = self.client.search_runs([experiment], f"tags.`filterfold.trial` = '{name}'")
        tags = {"filterfold.trial": name}
        run = found[0] if found else self.client.create_run(experiment, tags=tags, run_name=name)
        self.run = run.info.run_id

    def scalar(self, name: str, value: float, step: int) -> None:
        """Log a metric."""
        self.client.log_metric(self.run, name, float(value), step=step)

    def final(self, figures: Mapping[str, float]) -> None:
        """Log the results; the run is finished."""
        super().final(figures)
        self.client.set_terminated(self.run)


TRACKERS: dict[str, Callable[[Path, str], Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse names that are unknown, and packages that are not installed.

    **Raises:** `ConfigError`.
    """
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"no tracker {name!r}; there are {' and '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"tracker {name!r} is not installed; pip install {name}")
    if "mlflow" in names and not os.environ.get(SERVER) and importlib.util.find_spec("sqlalchemy") is None:
        raise ConfigError(f"mlflow-skinny keeps nothing itself; pip install mlflow, or set {SERVER} to a server")


@contextmanager
def tracking(names: Sequence[str], folder: Path, name: str) -> Iterator[list[Tracker]]:
    """Trackers for the length of a `with` block.

    **Arguments:**

    - `names`: of `TRACKERS`.
    - `folder`, `name`: the run folder, and the trial's name in it.
    """
    with ExitStack() as stack:
        made: list[Tracker] = []
        for kind in names:
            tracker = TRACKERS[kind](folder, name)
            stack.callback(tracker.close)
            made.append(tracker)
        yield made
