"""What networks cost to run and to train: ratios against figures worked out by hand, and what is to be doubted."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

import pytest

from filterfold.bench.report import costs, tables
from filterfold.bench.report.figure import group_styles
from filterfold.bench.report.plots import all_plots
from filterfold.bench.report.study import Study, studies
from filterfold.bench.report.verdict import judge
from filterfold.bench.report.warnings import find_warnings


def trial(label: str, seed: int, macs: int, calls: dict[str, list[float]] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "status": "finished", "method": label, "label": label, "seed": seed,
        "result": {"top1": 90.0 + seed, "macs": macs, "train_seconds": 10.0, **more},
        "timing": {"mode": "together", "batches": calls or {}, "controls": dict.fromkeys(calls or {}, 1.0)},
    }  # fmt: skip


def one(records: list[dict[str, Any]]) -> Study:
    [study] = studies(records)
    return study


FAST = [trial("dense", s, 100, {"1": [4.0, 2.0, 3.0], "64": [30.0 + s]}) for s in (0, 1)]
FAST += [trial("cut", s, 50, {"1": [1.5], "64": [3.0 + 0.01 * s]}) for s in (0, 1)]


def rows(table: tables.Table | None) -> list[dict[str, str]]:
    assert table is not None
    return list(csv.DictReader(io.StringIO(table.csv())))


def test_latency_by_hand() -> None:
    found = rows(costs.latency(one(FAST)))
    assert [(row["Method"], row["Batch"]) for row in found] == [
        ("dense", "1"), ("dense", "64"), ("cut", "1"), ("cut", "64"),
    ]  # fmt: skip
    dense, _, cut, large = found
    assert float(dense["Call, ms"]) == 3000.0  # the median of each trial's rounds
    assert (dense["Speed-up"], dense["MACs ratio"]) == ("", "")
    assert float(cut["Speed-up"]) == pytest.approx(2.0)
    assert float(cut["Images a second"]) == pytest.approx(1 / 1.5)
    assert float(large["Speed-up"]) == pytest.approx(math.sqrt(30 * 31) / math.sqrt(3.0 * 3.01))
    assert float(large["MACs ratio"]) == 2.0


def test_speed_beyond_the_saved_work_is_doubted_where_it_occurs() -> None:
    study = one(FAST)
    assert [(s.group.label, s.size) for s in costs.speeds(study) if s.exceeds_saved_work] == [("cut", 64)]
    [doubt] = [r for r in find_warnings(study, judge(study)) if "Calls faster" in r.title]
    assert not doubt.note
    assert "cut at batch 64: 10.1× at 2.00× fewer MACs" in doubt.text
    # a single trial has no interval: by 5 % then
    for seconds, beyond in ((1.55, False), (1.4, True)):
        pair = [trial("dense", 0, 100, {"1": [3.0]}), trial("cut", 0, 50, {"1": [seconds]})]
        assert any(s.exceeds_saved_work for s in costs.speeds(one(pair))) is beyond


def test_training_by_hand() -> None:
    records = [trial("dense", s, 100, train_images=1000, train_macs=600_000) for s in (0, 1)]
    records += [trial("l1", s, 50, train_images=1400, train_macs=720_000, train_seconds=13.0) for s in (0, 1)]
    dense, l1 = rows(costs.training(one(records)))
    assert [float(dense[name]) for name in ("Top-1, %", "Training time, s", "Images in training")] == [90.5, 10, 1000]
    table = costs.training(one(records))
    assert table is not None
    assert [cell.text for cell in table.rows[1]] == [
        "l1", "2", "90.50 ± 0.71", "13.0", "1.30×", "1.40 k", "1.40×", "720 k", "1.20×",
    ]  # fmt: skip
    assert float(l1["MACs of training"]) == 720_000


def test_records_without_these_figures_have_no_such_tables() -> None:
    bare = [
        {"status": "finished", "method": m, "label": m, "seed": 0, "result": {"top1": 90.0}} for m in ("dense", "l1")
    ]
    assert costs.latency(one(bare)) is None
    assert costs.training(one(bare)) is None
    old = [trial(m, s, 100) for m in ("dense", "l1") for s in (0, 1)]
    assert costs.latency(one(old)) is None
    table = costs.training(one(old))
    assert table is not None
    assert table.columns == ("Method", "n", "Top-1, %", "Training time, s", "× dense")


@pytest.mark.slow
def test_plots_of_speed(records: list[dict[str, Any]]) -> None:
    study = one(records)
    drawn = {plot.name: plot for plot in all_plots(study, group_styles(study), judge(study))}
    for name in ("accuracy_speedup_1", "accuracy_speedup_512", "speedups", "accuracy_training_macs"):
        assert name in drawn
    assert "accuracy_speedup_8" not in drawn
    assert "Speed-up over dense at batch 512" in drawn["accuracy_speedup_512"].svg
    single = one(FAST[:2])  # nothing to compare with
    assert not {name for name in (p.name for p in all_plots(single, group_styles(single), [])) if "speedup" in name}


def test_a_restless_machine_and_wasted_widths_are_said() -> None:
    records = [dict(r) for r in FAST]
    quiet = one(records)
    assert not [r for r in find_warnings(quiet, judge(quiet)) if "A/A" in r.title or "Widths" in r.title]
    records[0] |= {"timing": {**records[0]["timing"], "controls": {"1": 1.02, "64": 0.9}}}
    remarks = [f"layer{i}: 3 -> 17 channels take 2 ms, 3 -> 32 would take 2 ms" for i in range(5)]
    for record in records[2:]:
        record["timing"] = {**record["timing"], "wasted": remarks}
    study = one(records)
    found = {r.title: r for r in find_warnings(study, judge(study))}
    assert "by a factor of 0.90" in found["The A/A control is off"].text
    assert "Layers concerned: cut 5;" in found["Widths that save no time"].text
    assert [row["Layer"] for row in rows(costs.wasted(study))] == remarks
    assert costs.wasted(one(FAST)) is None
