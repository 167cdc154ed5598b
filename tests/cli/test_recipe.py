"""`filterfold recipe`: a recipe from a file, run to the end on digits, with the paper's figures beside ours."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from typer.testing import CliRunner

from filterfold.bench import recipes
from filterfold.bench.trials.parallel import Parallel
from filterfold.bench.trials.records import read_all
from filterfold.bench.trials.runner import local
from filterfold.cli.app import app

runner = CliRunner()

MINI = """
name = "mini"
title = "Mini-pruned-A"
model = "vgg_small"
data = "digits"

[[prune]]
layers = ["features.*"]
ratio = 0.5
skip = ["features.0"]

[base]
epochs = 10
lr = 0.05
schedule = "constant"

[retrain.paper]
epochs = 10
lr = 0.001
schedule = "constant"

[retrain.cosine]
epochs = 10
lr = 0.01
schedule = "cosine"

[scratch]

[paper]
dense = { error = 6.75, macs = "1.51e6", weights = "8.18e4" }
pruned = { error = 6.60, macs = "5.43e5", weights = "2.76e4", macs_removed = 64.0, weights_removed = 66.3 }
scratch = { error = 6.88 }
"""


def run(*command: str, code: int = 0) -> str:
    result = runner.invoke(app, ["recipe", *command])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


@pytest.fixture
def mini(tmp_path: Path) -> Path:
    path = tmp_path / "mini.toml"
    path.write_text(MINI)
    return path


def test_the_list_names_every_row() -> None:
    text = run("list")
    assert all(name in text for name in recipes.names())


def test_what_is_shown_is_a_file_to_start_from(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(run("show", "resnet110-b"))
    assert recipes.load(path) == recipes.load("resnet110-b")


@pytest.mark.slow
def test_a_run_ends_in_records_and_the_papers_table(mini: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ["--epochs-scale", "0.1", "--train-limit", "200", "--seeds", "0,1", "--threads", "1"]
    run("run", str(mini), *options, "--retrain", "cosine", "--out", str(folder))
    records = read_all(folder)
    assert [(record["method"], record["seed"]) for record in records] == [
        (method, seed) for method in ("dense", "l1", "scratch") for seed in (0, 1)
    ]
    assert {row["phase"]: row["epoch"] for row in records[2]["history"]} == {"train": 1, "retrain": 1}
    assert records[2]["options"]["retrain"] == {"lr": 0.01, "schedule": "cosine"}
    with (folder / "paper_table.csv").open() as file:
        head, *rows = csv.reader(file)
    assert [row[0] for row in rows] == ["Mini", "Mini-pruned-A", "Mini-pruned-A scratch"]
    by_head = [dict(zip(head, row, strict=True)) for row in rows]
    assert [row["Paper's error % (best on test)"] for row in by_head] == ["6.75", "6.6", "6.88"]
    result = records[2]["result"], records[3]["result"]
    assert result[0] is not None
    assert result[1] is not None
    mean = 100 - (result[0]["top1"] + result[1]["top1"]) / 2
    assert float(by_head[1]["Test error %, last epoch"]) == pytest.approx(mean)
    assert int(by_head[1]["MACs"]) == result[0]["macs"]
    again = run("run", str(mini), *options, "--retrain", "cosine", "--out", str(folder))
    assert "Mini-pruned-A" in again


@pytest.mark.slow
def test_a_run_with_all_that_compare_has(mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    workers: list[int] = []
    monkeypatch.setattr(
        Parallel, "__call__", lambda self, trials, runner: workers.append(self.count) or local(trials, runner)
    )
    folder = tmp_path / "run"
    options = ["--epochs-scale", "0.1", "--train-limit", "200", "--threads", "1", "--no-scratch", "--parallel", "2"]
    run("run", str(mini), *options, "--log", "tensorboard", "--latency-batches", "2", "--out", str(folder))
    assert workers == [2]
    found = read_all(folder)
    assert [record["method"] for record in found] == ["dense", "l1"]
    for record in found:
        assert record["timing"] is not None
        assert list(record["timing"]["batches"]) == ["2"]
        assert list((folder / "logs" / record["id"]).glob("events.*"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["run", "resnet57-b"], "no recipe 'resnet57-b'"),
        (["run", "vgg16-a", "--retrain", "none"], "has no retraining 'none'"),
        (["run", "vgg16-a", "--epochs-scale", "0"], "epochs scale 0"),
        (["run", "vgg16-a", "--seeds", "a"], "--seeds a"),
        (["run", "vgg16-a", "--data", "digits", "--latency-batches", "0"], "a batch has at least 1 image"),
        (["run", "vgg16-a", "--data", "digits", "--engine", "slurm"], "there are local and ray"),
        (["run", "vgg16-a", "--data", "digits", "--log", "wandb"], "no tracker 'wandb'"),
        (["run", "vgg16-a", "--weights", "nowhere.safetensors"], "no such file"),
        (["run", "resnet34-a", "--data", "digits", "--width", "0.5"], "no width multiplier"),
    ],
)
def test_what_makes_no_sense_is_refused(command: list[str], message: str, tmp_path: Path) -> None:
    more = ["--out", str(tmp_path / "run")] if command[0] == "run" else []
    assert message in run(*command, *more, code=2)
    assert not (tmp_path / "run").exists()
