"""What training came to, against sums by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from filterfold.bench.trials.config import Trial
from filterfold.bench.trials.context import RunContext
from filterfold.bench.trials.costs import train_images, train_macs
from filterfold.bench.trials.runner import compare
from filterfold.bench.trials.setting import Setting
from filterfold.training import Row

SETTING = Setting(
    "vgg_small", "digits", width=0.25, data_options={"train_limit": 300, "validation": 0},
    recipe={"epochs": 2, "batch_size": 128}, retrain_epochs=1, retrain={"batch_size": 64},
)  # fmt: skip


def rows(*macs: int, phase: Any = "train") -> list[Row]:
    return [
        {"phase": phase, "epoch": epoch, "train_loss": 1.0, "validation_top1": None, "learning_rate": 0.1,
         "seconds": 1.0, "macs": count, "events": []}
        for epoch, count in enumerate(macs, 1)
    ]  # fmt: skip


@pytest.fixture
def bench(tmp_path: Path) -> RunContext:
    return RunContext(SETTING, tmp_path, "cpu")


def test_incomplete_last_batches_are_not_trained_on(bench: RunContext) -> None:
    history = rows(100, 100) + rows(40, phase="retrain")
    assert train_images(Trial("l1", 0, SETTING), bench, history) == 256 + 256 + 256  # 300 in batches of 128, of 64
    small = RunContext(Setting("vgg_small", "digits", data_options={"train_limit": 100, "validation": 0}), bench.folder)
    assert train_images(Trial("dense", 0, small.setting), small, rows(100)) == 100  # the only batch is complete enough


def test_steps_cost_three_forward_passes_of_the_network_that_was_trained(bench: RunContext) -> None:
    after = rows(100, 100) + rows(40, phase="retrain")  # cut between training and retraining
    assert train_macs(Trial("l1", 0, SETTING), bench, after, 100) == 3 * 256 * (100 + 100 + 40)
    while_ = rows(60, 40, 40)  # cut at the end of the first and the second epoch
    assert train_macs(Trial("online", 0, SETTING, keep=0.5), bench, while_, 100) == 3 * 256 * (100 + 60 + 40)
    assert train_macs(Trial("scratch", 0, SETTING), bench, rows(40, 40), 100) == 3 * 256 * (40 + 40)


def test_records_have_it(tmp_path: Path) -> None:
    from filterfold.bench.trials.config import Comparison

    outcome = compare(
        Comparison.of(SETTING, ["dense", "l1"], seeds=[0]), tmp_path / "run", device="cpu", timing_rounds=1
    )
    dense, cut = (record["result"] for record in outcome.records)
    assert dense is not None
    assert cut is not None
    assert dense["train_images"] == 512
    assert dense["train_macs"] == 3 * 512 * dense["macs"]
    assert cut["train_images"] == 768
    assert cut["train_macs"] == 3 * (512 * dense["macs"] + 256 * cut["macs"])
