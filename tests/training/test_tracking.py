"""Tracking: what TensorBoard reads back is the history; looking on changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from filterfold.bench.trials.config import Comparison
from filterfold.bench.trials.runner import compare
from filterfold.bench.trials.setting import Setting
from filterfold.data import ImageData, load
from filterfold.errors import ConfigError
from filterfold.training import Recipe, check_trackers, tracking, train
from filterfold.training.run import Row
from filterfold.zoo import build

pytest.importorskip("tensorboard")

RECIPE = Recipe(epochs=3, lr=0.05)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load("digits", train_limit=256)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return build("vgg_small", channels=1, image_size=8, width=0.25)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag → (step, value), read back with TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.*")):
        events = EventAccumulator(str(path)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return found


def test_event_files_hold_the_history_across_an_interruption(tmp_path: Path, digits: ImageData) -> None:
    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    checkpoint = tmp_path / "training.safetensors"
    with tracking(["tensorboard"], tmp_path, "trial") as trackers, pytest.raises(KeyboardInterrupt):
        train(network(), digits, RECIPE, observers=[trackers[0].row], checkpoint=checkpoint, check=stop)
    model = network()
    with tracking(["tensorboard"], tmp_path, "trial") as trackers:
        history = train(model, digits, RECIPE, observers=[trackers[0].row], checkpoint=checkpoint)
    found = scalars(tmp_path / "logs" / "trial")
    rows = history.rows
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3]
    assert [value for _, value in found["train/loss"]] == pytest.approx([row["train_loss"] for row in rows])
    assert [value for _, value in found["train/macs"]] == [row["macs"] for row in rows]
    assert [value for _, value in found["train/validation_top1"]] == pytest.approx(
        [row["validation_top1"] for row in rows]
    )
    # nobody looking on: the same weights, and the same checkpoint is taken up
    alone = network()
    train(alone, digits, RECIPE)
    assert all(one.equal(other) for one, other in zip(model.parameters(), alone.parameters(), strict=True))
    assert train(network(), digits, RECIPE, checkpoint=checkpoint).rows == rows


def test_a_comparison_is_logged_trial_by_trial(tmp_path: Path) -> None:
    setting = Setting("vgg_small", "digits", width=0.25, data_options={"train_limit": 256}, recipe={"epochs": 2})
    comparison = Comparison.of(setting, ["dense", "online"], keep=[0.5], seeds=[0])
    outcome = compare(comparison, tmp_path / "run", trackers=["tensorboard"], timing_rounds=1)
    assert outcome.complete
    for record in outcome.records:
        found = scalars(tmp_path / "run" / "logs" / record["id"])
        assert record["result"] is not None
        assert found["final/top1"] == [(0, pytest.approx(record["result"]["top1"]))]
        assert [value for _, value in found["train/macs"]] == [row["macs"] for row in record["history"]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of SQLAlchemy, about MLflow's use of it
def test_mlflow_holds_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = pytest.importorskip("mlflow.tracking")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    row: Row = {
        "phase": "train", "epoch": 1, "train_loss": 1.5, "validation_top1": None, "learning_rate": 0.1,
        "seconds": 1.0, "macs": 7, "events": [],
    }  # fmt: skip
    for epoch in (1, 2):  # two processes, one run
        with tracking(["mlflow"], tmp_path / "run", "trial") as (found,):
            found.row({**row, "epoch": epoch})
            found.final({"top1": 90.0 + epoch})
    client = tracker.MlflowClient(f"sqlite:///{tmp_path / 'run' / 'mlruns.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("run").experiment_id])
    assert [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, "train/loss")] == [
        (1, 1.5),
        (2, 1.5),
    ]
    assert run.data.metrics["final/top1"] == 92.0
    assert (run.info.run_name, run.info.status) == ("trial", "FINISHED")


def test_mlflow_without_a_place_to_keep_figures_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    def find_spec(name: str) -> object | None:
        return None if name == "sqlalchemy" else object()

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="mlflow-skinny keeps nothing itself; pip install mlflow, or set MLFLOW_"):
        check_trackers(["mlflow"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    check_trackers(["mlflow"])


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="no tracker 'wandb'; there are tensorboard and mlflow"):
        check_trackers(["wandb"])
