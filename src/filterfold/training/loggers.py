"""Handing a run's figures to TensorBoard or MLflow, epoch by epoch.

Both are asked for by name and imported only then. They look on: with or without them a run is the same run, ends with
the same weights, and can be taken up again.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from ..errors import ConfigError
from .run import Row

LOGS = "logs"


MLRUNS = "mlruns"
"""Folders in a run folder: TensorBoard's event files, one folder for each trial; MLflow's store, unless
`MLFLOW_TRACKING_URI` names a server."""


SERVER = "MLFLOW_TRACKING_URI"


class Tracker(Protocol):
    """Something that figures are handed to."""

    def row(self, row: Row) -> None:
        """An epoch is over."""

    def final(self, figures: Mapping[str, float]) -> None:
        """All is over; these are the results."""

    def close(self) -> None:
        """Write what is not written yet."""


class TensorBoard:
    """Event files for TensorBoard.

    **Arguments:**

    - `folder`: the run folder; `name`: of the trial.
    """

    def __init__(self, folder: Path, name: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder / LOGS / name))

    def row(self, row: Row) -> None:
        """Scalars by phase (`train/loss`, `retrain/macs`, …) and the cuts as text, at the epoch."""
        for tag, value in _scalars(row).items():
            self.writer.add_scalar(tag, value, row["epoch"])
        if row["events"]:
            self.writer.add_text(f"{row['phase']}/events", "\n\n".join(row["events"]), row["epoch"])

    def final(self, figures: Mapping[str, float]) -> None:
        """Scalars `final/…`."""
        for name, value in figures.items():
            self.writer.add_scalar(f"final/{name}", value, 0)

    def close(self) -> None:
        """Write what is not written yet."""
        self.writer.close()


class MLflow:
    """A run in MLflow: on the server that `MLFLOW_TRACKING_URI` names, else in a store in the run folder.

    An interrupted trial goes on in its own run.

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

    def row(self, row: Row) -> None:
        """Metrics by phase (`train/loss`, `retrain/macs`, …), at the epoch."""
        for tag, value in _scalars(row).items():
            self.client.log_metric(self.run, tag, value, step=row["epoch"])

    def final(self, figures: Mapping[str, float]) -> None:
        """Metrics `final/…`; the run is finished."""
        for name, value in figures.items():
            self.client.log_metric(self.run, f"final/{name}", value)
        self.client.set_terminated(self.run)

    def close(self) -> None:
        """Nothing is left to write."""


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


def _scalars(row: Row) -> dict[str, float]:
    values = {
        "loss": row["train_loss"],
        "validation_top1": row["validation_top1"],
        "learning_rate": row["learning_rate"],
        "macs": row["macs"],
        "seconds": row["seconds"],
    }
    return {f"{row['phase']}/{name}": float(value) for name, value in values.items() if value is not None}
