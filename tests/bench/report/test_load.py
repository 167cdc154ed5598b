"""Foreign tables: recognised columns, units, and one clear line for what can't be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from filterfold.bench.report import read_table, tables
from filterfold.bench.report.study import COMPARED, studies
from filterfold.errors import RecordError


def _write(folder: Path, text: str) -> Path:
    path = folder / "table.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_reference_table(reference):
    records = read_table(reference / "figures_4_5.csv")
    assert len(records) == 35
    assert [records[0]["label"], records[34]["label"]] == ["original", "online clustering k=30"]
    assert records[34]["clusters"] == 30
    assert records[34]["seed"] == 5
    assert records[0]["result"]["top1"] == 89.24
    assert records[34]["result"]["inference_seconds"] == 6.697844


@pytest.mark.parametrize(
    ("header", "row", "expected"),
    [
        ("Group,Accuracy,Latency (ms)", "a,91.5,20", {"top1": 91.5, "inference_seconds": 0.02}),
        ("algorithm\ttest_acc\ttime", "a\t0.915\t1.5", {"top1": 91.5, "inference_seconds": 1.5}),
        ("method;top-1;train_seconds;seconds", "a;91,5;9;2,5", {"top1": 91.5, "train_seconds": 9}),
        ("method,Top1 Accuracy,Top5 Accuracy", "a,90%,99%", {"top1": 90, "top5": 99}),
        ("method,FLOPs,Params", "a,1e6,500", {"macs": 1e6, "parameters": 500}),
        ("method,top1,seconds", "a,90,", {"top1": 90, "inference_seconds": None}),
        ("\ufeffmethod,acc1,remark", "a,90,fine", {"top1": 90}),
    ],
)  # fmt: skip
def test_columns_and_units(tmp_path, header, row, expected):
    [record] = read_table(_write(tmp_path, f"{header}\n{row}\n\n"))
    assert record["label"] == "a"
    assert {field: record["result"][field] for field in expected} == pytest.approx(expected)


def test_columns_can_be_given(tmp_path):
    path = _write(tmp_path, "who,score\na,1\nb,2\n")
    records = read_table(path, {"method": "who", "top1": "score"})
    assert [(r["label"], r["seed"]) for r in records] == [("a", 1), ("b", 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column names the method"),
        ("method,top1\n", "a header and no trial"),
        ("x,top1\na,1\n", "no column names the method; the columns are x, top1"),
        ("method,remark\na,b\n", "no column of accuracy or time"),
        ("method,top1\na,fast\n", "line 2, column 'top1': 'fast' is no number"),
        ("method,top1\na,1\na,1,2\n", "line 3: 3 cells under 2 columns"),
        *(
            (
                f"method,top1\na,90\na,{top1}\n",
                f"line 3, column 'top1': {top1} is no accuracy from 0 to 100 %",
            )
            for top1 in ("nan", "NaN", "inf", "-inf", "1e300", "-1", "101")
        ),
        ("method,seconds\na,inf\n", "line 2, column 'seconds': inf is no inference seconds; leave the cell empty"),
    ],
)
def test_what_can_not_be_read_is_named(tmp_path, text, message):
    with pytest.raises(RecordError) as error:
        read_table(_write(tmp_path, text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_and_columns(tmp_path):
    with pytest.raises(RecordError, match="nowhere"):
        read_table(tmp_path / "nowhere.csv")
    path = _write(tmp_path, "who,score\na,1\n")
    with pytest.raises(RecordError, match="no column 'whom' for method"):
        read_table(path, {"method": "whom"})
    with pytest.raises(RecordError, match="'colour' is no field"):
        read_table(path, {"colour": "who"})


def test_our_own_table_of_trials_reads_back(records, tmp_path):
    [study] = studies(records)
    path = tmp_path / "trials.csv"
    path.write_text(tables.trials(study).csv(), encoding="utf-8")
    [again] = studies(read_table(path))
    for measure in COMPARED:
        found, theirs = again.samples(measure), study.samples(measure)
        assert found == {label: pytest.approx(values) for label, values in theirs.items()}
        assert len(found) == 7
