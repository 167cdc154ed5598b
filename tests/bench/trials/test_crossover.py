"""Trials of several lengths in one comparison: each is trained for its own number of epochs, and 0 is the cut alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from filterfold import prune
from filterfold.bench.report.plots import catching_up, crossover, lengths
from filterfold.bench.report.study import studies
from filterfold.bench.trials import runner
from filterfold.bench.trials.config import Comparison
from filterfold.bench.trials.context import RunContext
from filterfold.bench.trials.setting import Setting
from filterfold.surgery.checkpoint import load

SETTING = Setting(
    "vgg_small",
    "digits",
    width=0.25,
    data_options={"train_limit": 300},
    recipe={"epochs": 7, "lr": 0.05, "batch_size": 50},
    online={"schedule": "0"},
)


def test_every_trial_has_its_own_length(tmp_path: Path) -> None:
    comparison = Comparison.of(SETTING, ["online-l1", "scratch", "dense"], keep=[0.5], epochs=[0, 1, 3], seeds=[0])
    outcome = runner.compare(comparison, tmp_path, timing_rounds=1, batch_sizes=[])
    assert outcome.complete
    counts = {record["label"]: len(record["history"]) for record in outcome.records}
    assert counts == {
        f"{name} epochs={n}": n for name in ("online-l1 keep=0.5", "scratch keep=0.5", "dense") for n in (0, 1, 3)
    }

    context = RunContext(SETTING, tmp_path / "other", "cpu")
    whole = context.build(0)
    cut = copy.deepcopy(whole)
    prune(cut, context.example, criterion="l1", keep=0.5)
    [untrained] = [trial for trial in comparison.trials if trial.label == "online-l1 keep=0.5 epochs=0"]
    found = load(tmp_path / "models" / f"{untrained.id}.safetensors", lambda: context.build(0))
    same = cut.state_dict()
    assert all(torch.equal(value, same[name]) for name, value in found.state_dict().items())

    [study] = studies(dict(record) for record in outcome.records)
    top1 = {record["label"]: record["result"]["top1"] for record in outcome.records}
    assert lengths(study)["scratch", "keep=0.5"] == {n: [top1[f"scratch keep=0.5 epochs={n}"]] for n in (0, 1, 3)}


def record(method: str, seed: int, epochs: int, top1: float) -> dict[str, object]:
    label = f"{method} macs=0.4 epochs={epochs}"
    about = {"status": "finished", "method": method, "label": label, "seed": seed, "options": {"epochs": epochs}}
    return about | {"result": {"top1": top1}}


@pytest.mark.parametrize(
    ("fresh", "said"),
    [
        ({1: (20, 30), 4: (60, 66), 16: (70, 71)}, "scratch macs=0.4 catches up with l1 macs=0.4 at 4 epochs."),
        ({1: (20, 30), 4: (60, 62), 16: (69, 69)}, "scratch macs=0.4 stays behind l1 macs=0.4 up to 16 epochs."),
    ],
)
def test_the_plot_says_where_fresh_weights_catch_up(fresh: dict[int, tuple[int, int]], said: str) -> None:
    inherited = {1: (50, 52), 4: (62, 64), 16: (70, 70)}
    records = [
        record(method, seed, epochs, values[seed])
        for method, line in (("l1", inherited), ("scratch", fresh))
        for epochs, values in line.items()
        for seed in (0, 1)
    ]
    [study] = studies(records)
    plot = crossover(study)
    assert plot is not None
    assert plot.caption.endswith(said)
    assert ("Rings" in plot.caption) == ("catches" in said)


def test_one_length_is_no_crossover() -> None:
    [study] = studies([record("l1", 0, 4, 60.0), record("scratch", 0, 4, 50.0)])
    assert crossover(study) is None
    assert [entry[2] for entry in catching_up(lengths(study))] == [None]
