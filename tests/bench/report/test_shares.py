"""The plot of accuracy against the share pruned, and the table beside a paper's."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from typing import Any

import pytest

from filterfold.bench.recipes import CountedTrial, load
from filterfold.bench.report.figure import group_styles
from filterfold.bench.report.paper_table import paper_table
from filterfold.bench.report.plots import shares
from filterfold.bench.report.study import studies

Factory = Callable[..., dict[str, Any]]


def with_keep(make: Factory, method: str, seed: int, keep: float) -> dict[str, Any]:
    one = make(method, seed)
    one["options"] = {**one["options"], "keep": keep}
    one["label"] = f"{method} keep={keep:g}"
    return one


def test_one_line_for_each_method_that_was_run_with_several_shares(make: Factory) -> None:
    records = [make("dense", seed) for seed in (0, 1)]
    records += [with_keep(make, m, s, k) for m in ("l1", "random") for s in (0, 1) for k in (0.9, 0.5, 0.1)]
    [study] = studies(records, "dense")
    plot = shares(study, group_styles(study))
    assert plot is not None
    assert "Filters pruned away" in plot.svg
    assert "l1" in plot.svg
    assert "random" in plot.svg
    assert "Dashed: dense" in plot.caption


def test_no_plot_where_every_method_has_one_share(make: Factory) -> None:
    records = [make("dense", 0), *(with_keep(make, "l1", seed, 0.5) for seed in (0, 1))]
    [study] = studies(records, "dense")
    assert shares(study, group_styles(study)) is None


def test_a_papers_table_has_our_mean_and_its_figures(make: Factory) -> None:
    recipe = load("vgg16-a")
    found = []
    for method, macs, weights in (("dense", 313463808, 14977728), ("l1", 206279680, 5390176)):
        for seed, top1 in ((0, 93.0), (1, 94.0)):
            record = make(method, seed)
            record["result"] |= {"top1": top1, "best_top1": 94.5}
            record["options"] |= {"data_options": {}, "retrain_epochs": 40, "retrain_lr": 0.001}
            found.append(CountedTrial(record, macs, weights))
    table = paper_table(recipe, found)
    head, dense, pruned = csv.reader(io.StringIO(table.csv()))
    row = dict(zip(head, pruned, strict=False))
    assert dense[0] == "VGG-16"
    assert row["Network"] == "VGG-16-pruned-A"
    assert float(row["Test error %, last epoch"]) == pytest.approx(6.5)
    assert float(row["Best validation error % (optimistic)"]) == pytest.approx(5.5)
    assert row["Paper's error % (best on test)"] == "6.6"
    assert [cell.text for cell in table.rows[1]][5:] == [
        "206,279,680", "34.2 %", "2.06e8, 34.2 %", "5,390,176", "64.0 %", "5.4e6, 64.0 %",
    ]  # fmt: skip
    assert table.rows[0][6].text == "–"
    assert "Seeds 0, 1" in table.notes[1]
