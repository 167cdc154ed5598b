"""Tables: numbers against sums done here, files that read back, cells that can't break their format."""

from __future__ import annotations

import csv
import io
import statistics

import pytest

from filterfold.bench.report import tables
from filterfold.bench.report.study import SECONDS, TOP1, studies
from filterfold.bench.report.verdict import judge


def _rows(table: tables.Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table.csv())))


def test_comparison_rows(records):
    [study] = studies(records)
    table = tables.comparison(study)
    rows = [[cell.text for cell in row] for row in table.rows]
    assert [row[:2] for row in rows] == [
        ["dense", "5"], ["l1", "4"], ["random", "5"], ["scratch", "5"],
        ["online k=5", "5"], ["online k=15", "5"], ["online k=30", "5"], ["online k=50", "0"],
    ]  # fmt: skip
    values = [r["result"]["top1"] for r in records if r["label"] == "dense"]
    assert rows[0][2] == f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
    assert rows[-1][2:] == ["–"] * 6
    assert {len(row) for row in rows} == {len(table.columns)}
    assert study.title == "vgg16 on cifar10"


def test_csv_holds_full_values_and_reads_back(records):
    [study] = studies(records)
    rows = _rows(tables.comparison(study))
    values = [r["result"]["inference_seconds"] for r in records if r["label"] == "online k=5"]
    assert float(rows[4]["Inference time, s"]) == pytest.approx(statistics.mean(values), rel=1e-12)
    trials = _rows(tables.trials(study))
    assert len(trials) == 34
    assert float(trials[0]["Top-1, %"]) == records[0]["result"]["top1"]
    assert trials[0]["Clusters"] == ""


def test_the_document_s_tests_in_tables(reference):
    from filterfold.bench.report import read_table

    [study] = studies(read_table(reference / "figures_4_5.csv"))
    p = [round(float(row["p"]), 5) for row in _rows(tables.kruskal_wallis(study))]
    assert p == [0.03318, 0.19788, 0.87222]
    dunn = tables.dunn(study)
    raw = [row[1].text for row in dunn.rows]
    holm = [row[2].text for row in dunn.rows]
    assert raw == [".0031", ".0206", ".0034", ".0190", ".0018", ".0114"]
    assert holm == [".0610", ".3302", ".0640", ".3231", ".0384", ".2050"]
    pairs = tables.dunn_pairs(study, SECONDS)
    assert pairs.rows[0][1].text == "·"
    assert (pairs.rows[0][2].text, pairs.rows[1][1].text) == (".0610", ".0031")


def test_equivalence_and_control_tables(records):
    [study] = studies(records)
    judgements = judge(study)
    table = tables.equivalence(judgements)
    assert [row[0].text for row in table.rows] == [g.label for g in study.others]
    assert table.rows[1][1].text == "5 / 5 paired"
    assert table.rows[-1][-1].text == judgements[-1].accuracy
    times = tables.against_control(study, SECONDS)
    assert times.columns[1] == "Speed-up"
    assert times.rows[0][3].text == "−1.00 large"
    assert tables.against_control(study, TOP1).columns[1] == "Difference"


def test_permutation_tests_are_corrected_over_the_comparisons_only(reference):
    from filterfold.bench.report import read_table

    [study] = studies(read_table(reference / "figures_4_5.csv"))
    rows = _rows(tables.against_control(study, SECONDS))
    # Perfect separation of 5 and 5: 2 of 252 regroupings; Holm over six equal p-values gives six times that.
    assert [float(row["Permutation p"]) for row in rows] == pytest.approx([2 / 252] * 6)
    assert [float(row["p, Holm"]) for row in rows] == pytest.approx([12 / 252] * 6)


def test_widths_failures_and_provenance(records):
    [study] = studies(records)
    widths = tables.widths(study)
    assert widths.columns == ("Layer", "Before", "l1", "random", "scratch", "online k=5", "online k=15", "online k=30")
    assert [cell.text for cell in widths.rows[1]][:3] == ["features.1", "64", "35"]
    failed = tables.failed(study)
    assert [cell.text for cell in failed.rows[0]] == ["l1", "2", "out of memory <at> layer 3"]
    facts = {row[0].text: row[1].text for row in tables.provenance(study).rows}
    assert facts["torch"] == "2.13.0"
    assert facts["numpy"] == "2.4.6"
    assert facts["dirty"] == "no"
    assert facts["option recipe"] == "epochs 30, lr 0.02"
    assert "l1: 0, 1, 3, 4" in facts["seeds"]


def test_markdown_survives_hostile_text(make):
    hostile = make("dense", 0, label="a|b\n<script>`*_")
    text = tables.comparison(studies([hostile])[0]).markdown()
    row = next(line for line in text.splitlines() if "script" in line)
    assert row.startswith("| a\\|b &lt;script&gt;\\`\\*\\_ | 1 |")
    assert text.count("\n| a") == 1


def test_a_single_trial_has_no_spread(make):
    bare = make("dense", 0)
    bare["result"] = {"top1": 90.0}
    [study] = studies([bare, make("l1", 0)])
    assert tables.comparison(study).rows[0][2].text == "90.00"
