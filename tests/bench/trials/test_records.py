"""Records: written as a whole, read back unchanged, refused by name when damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from filterfold.bench.trials import records
from filterfold.bench.trials.config import Trial
from filterfold.bench.trials.runner import failure
from filterfold.bench.trials.setting import Setting
from filterfold.errors import RecordError


def make(method: str = "dense", seed: int = 0, **budget: Any) -> records.Record:
    trial = Trial(method, seed, Setting("vgg_small", "digits"), **budget)
    return failure(trial, RuntimeError("no reason"), "cpu", None, "2024-01-01T00:00:00+00:00")


def test_round_trip(tmp_path: Path) -> None:
    record = make("online", 3, clusters=5)
    path = records.write(tmp_path, record)
    assert path == tmp_path / "records" / f"{record['id']}.json"
    assert records.read(path) == record
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # no temporary left


def test_read_all_is_ordered_and_takes_folder_or_file(tmp_path: Path) -> None:
    made = [make("online", 0, clusters=10), make("online", 0, clusters=5), make("l1", 1), make("l1", 0), make("dense")]
    for record in made:
        records.write(tmp_path, record)
    labels = [(record["label"], record["seed"]) for record in records.read_all(tmp_path)]
    assert labels == [("dense", 0), ("l1", 0), ("l1", 1), ("online k=5", 0), ("online k=10", 0)]
    assert records.read_all(tmp_path / "records") == records.read_all(tmp_path)
    assert records.read_all(tmp_path / "records" / f"{made[0]['id']}.json") == [made[0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a whole record"),
        ("[]", "not one of Filterfold's records"),
        ('{"name": 1}', "not one of Filterfold's records"),
        ('{"format": 99}', "record format 99 is not 1"),
        ('{"format": 1}', "the record lacks clusters"),
    ],
)
def test_damaged_records_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "records" / "x.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(RecordError, match=message) as caught:
        records.read_all(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_finished_record_needs_a_result(tmp_path: Path) -> None:
    path = records.write(tmp_path, make())
    document = json.loads(path.read_text()) | {"status": "finished"}
    path.write_text(json.dumps(document))
    with pytest.raises(RecordError, match="without a result"):
        records.read(path)


def test_missing_folder_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no such run folder"):
        records.read_all(tmp_path / "nowhere")
    with pytest.raises(RecordError, match="no record of a trial there"):
        records.read_all(tmp_path)
