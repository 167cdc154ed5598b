"""The benchmark of training speed: what it reports follows from what it measured."""

from __future__ import annotations

import pytest
import torch

training_speed = pytest.importorskip("training_speed", reason="benchmarks/ is not on the path")


@pytest.mark.slow
def test_the_figures_of_the_benchmark_belong_together() -> None:
    modes = ["eager", "bf16 channels_last"]
    rows = training_speed.measure(0.0625, modes, "cpu", 8, 1, 2)
    assert [(row["state"], row["mode"]) for row in rows] == [
        (state, mode) for state in ("dense", "half cut") for mode in modes
    ]
    for row in rows:
        assert row["share_of_floor"]["n"] == row["images_per_second"]["n"] == 2
        speed, floor = row["images_per_second"], row["operations_per_second"]
        low, high = 6 * row["macs"] * speed["min"] / floor["max"], 6 * row["macs"] * speed["max"] / floor["min"]
        assert 0 < low * 0.999 <= row["share_of_floor"]["median"] <= high * 1.001
        assert row["seconds_for_100_epochs"] == pytest.approx(5_000_000 / speed["median"])
    dense, cut = rows[0]["macs"], rows[2]["macs"]
    assert 3.5 < dense / cut < 4.5  # half the filters: about a quarter of the work
    assert rows[1]["macs"] == dense


def test_graphs_are_for_a_gpu() -> None:
    chosen = [mode for mode in training_speed.MODES if training_speed.fits(mode, "cpu")]
    assert "bf16 compile" in chosen
    assert not any("graphs" in mode for mode in chosen)
    assert all(training_speed.fits(mode, "cuda") for mode in training_speed.MODES)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_floor_is_a_speed_that_this_machine_can_have(precision: str) -> None:
    threads = torch.get_num_threads()
    assert 1e8 < training_speed.floor("cpu", precision) < 1e13 * threads
