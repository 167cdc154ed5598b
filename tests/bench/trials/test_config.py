"""Trials are named by their content; a folder belongs to one comparison."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from filterfold.bench.trials.config import Comparison, Trial
from filterfold.bench.trials.context import Deadline, Stopped, seconds
from filterfold.bench.trials.method_names import Method
from filterfold.bench.trials.setting import Setting
from filterfold.errors import ConfigError, FilterfoldError, RecordError

SETTING = Setting("vgg_small", "digits", recipe={"epochs": 2, "lr": 0.1})


@pytest.mark.slow
def test_names_do_not_depend_on_the_process_or_the_order_of_keys() -> None:
    turned = replace(SETTING, recipe={"lr": 0.1, "epochs": 2})
    trial = Trial("online", 4, SETTING, clusters=10)
    assert Trial("online", 4, turned, clusters=10).id == trial.id
    code = (
        "from filterfold.bench.trials.config import *;"
        "print(Trial('online', 4, Setting('vgg_small', 'digits', recipe={'epochs': 2, 'lr': .1}), clusters=10).id)"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == trial.id


@pytest.mark.parametrize(
    "other",
    [
        Trial("online", 5, SETTING, clusters=10),
        Trial("online", 4, SETTING, clusters=11),
        Trial("online-l1", 4, SETTING, clusters=10),
        Trial("online", 4, replace(SETTING, recipe={"epochs": 3, "lr": 0.1}), clusters=10),
        Trial("online", 4, replace(SETTING, width=0.5), clusters=10),
        Trial("online", 4, replace(SETTING, data="cifar10"), clusters=10),
    ],
)
def test_whatever_changes_the_outcome_changes_the_name(other: Trial) -> None:
    assert other.id != Trial("online", 4, SETTING, clusters=10).id


def test_redo_from_the_record() -> None:
    trial = Trial("l1", 1, SETTING, keep=0.3)
    document = json.loads(json.dumps(trial.to_dict()))
    assert Trial.from_dict(document) == trial
    assert Trial.from_dict(document).id == trial.id


def test_the_documents_experiment_has_35_trials() -> None:
    comparison = Comparison.of(SETTING, ["l1", "online"], clusters=[5, 10, 15, 20, 25, 30], seeds=range(5))
    labels = [trial.label for trial in comparison.trials]
    assert len(labels) == 35
    assert {label: labels.count(label) for label in labels} == dict.fromkeys(
        ["l1", *(f"online k={k}" for k in (5, 10, 15, 20, 25, 30))], 5
    )
    assert [trial.seed for trial in comparison.trials[:7]] == [0] * 7  # seed by seed: balanced when stopped early


def test_shares_multiply_the_methods_that_cut() -> None:
    comparison = Comparison.of(SETTING, ["dense", "l1", "online", "online-l1"], keep=[0.5, 0.25], seeds=[0])
    assert [trial.label for trial in comparison.trials] == [
        "dense", "l1 keep=0.5", "l1 keep=0.25", "online keep=0.5", "online keep=0.25",
        "online-l1 keep=0.5", "online-l1 keep=0.25",
    ]  # fmt: skip


def test_shares_of_the_macs_are_another_kind_of_budget() -> None:
    methods = ["dense", "l1", "scratch-long", "online", "online-l1+repair+distill"]
    comparison = Comparison.of(SETTING, methods, keep=[0.5], macs=[0.25], seeds=[0])
    assert [trial.label for trial in comparison.trials] == [
        "dense", "l1 keep=0.5", "l1 macs=0.25", "scratch-long keep=0.5", "scratch-long macs=0.25", "online keep=0.5",
        "online macs=0.25", "online-l1+repair+distill keep=0.5", "online-l1+repair+distill macs=0.25",
    ]  # fmt: skip
    for trial in comparison.trials:
        assert Trial.from_dict(json.loads(json.dumps(trial.to_dict()))) == trial
        assert trial.base.label == "dense"
    last = comparison.trials[-1]
    assert last.parsed == Method("online", "l1", additions=("repair", "distill"))
    assert len({trial.id for trial in comparison.trials}) == 9


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("dense-long", Method("dense", long=True)),
        ("scratch+longer", Method("scratch", additions=("longer",))),
        ("mean-std-iterative", Method("one-shot", "mean-std", "iterative")),
        ("online-centroid", Method("online", "centroid")),
        ("online-mean-std", Method("online", "mean-std")),
    ],
)
def test_names_are_taken_apart(name: str, method: Method) -> None:
    assert Method.parse(name) == method


def test_lengths_of_training_multiply_all_methods() -> None:
    comparison = Comparison.of(SETTING, ["dense", "online"], macs=[0.5], epochs=[0, 4], seeds=[0])
    assert [trial.label for trial in comparison.trials] == [
        "dense epochs=0", "online macs=0.5 epochs=0", "dense epochs=4", "online macs=0.5 epochs=4",
    ]  # fmt: skip
    assert Trial.from_dict(json.loads(json.dumps(comparison.trials[3].to_dict()))) == comparison.trials[3]


def test_without_budgets_the_methods_have_their_own() -> None:
    comparison = Comparison.of(SETTING, ["dense", "l1", "online", "online-l1"], seeds=[0])
    assert [trial.label for trial in comparison.trials] == ["dense", "l1", "online keep=0.5", "online-l1 keep=0.5"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Trial("l1", 0, SETTING, keep=1.5), "keep = 1.5: the share that stays"),
        (lambda: Trial("l1", 0, SETTING, keep=0.0), "keep = 0"),
        (lambda: Trial("online", 0, SETTING), "needs one of clusters, keep and macs"),
        (lambda: Trial("online", 0, SETTING, clusters=5, keep=0.5), "needs one of clusters, keep and macs"),
        (lambda: Trial("online", 0, SETTING, macs=0.5, keep=0.5), "needs one of clusters, keep and macs"),
        (lambda: Trial("l1", 0, SETTING, macs=0.5, keep=0.5), "of the filters or of the MACs"),
        (lambda: Trial("l1", 0, SETTING, macs=1.5), "macs = 1.5"),
        (lambda: Trial("dense", 0, SETTING, macs=0.5), "'dense' cuts nothing"),
        (lambda: Trial("l1+early", 0, SETTING, keep=0.5), "only online methods take"),
        (lambda: Trial("scratch+repair", 0, SETTING, keep=0.5), "only online methods take"),
        (lambda: Trial("online+repare", 0, SETTING, keep=0.5), r"\+repare is not one of"),
        (lambda: Trial("online-l1+centripetal", 0, SETTING, keep=0.5), r"only online takes \+centripetal"),
        (
            lambda: Trial("online+unpulled+centripetal", 0, SETTING, keep=0.5),
            r"only online takes .* one of \+centripetal, \+unpulled",
        ),
        (lambda: Trial("online+repair+repair", 0, SETTING, keep=0.5), "each at most once"),
        (lambda: Trial("online", 0, SETTING, clusters=0), "clusters = 0"),
        (lambda: Trial("dense", 0, SETTING, epochs=-1), "epochs = -1"),
        (lambda: Trial("l1", 0, SETTING, epochs=0), "0 epochs are for dense, scratch and online"),
        (lambda: Trial("scratch-long", 0, SETTING, keep=0.5, epochs=0), "0 epochs are for dense, scratch and online"),
        (lambda: Trial("l1", 0, SETTING, clusters=5), "takes no number of clusters"),
        (lambda: Trial("dense", 0, SETTING, keep=0.5), "'dense' cuts nothing"),
        (lambda: Trial("onlin", 0, SETTING, keep=0.5), "no method 'onlin'; did you mean online"),
        (lambda: Comparison.of(SETTING, ["dense"], seeds=[]), "nothing to compare"),
        (lambda: Setting("m", "d", width=0), "width = 0"),
        (lambda: Setting("m", "d", round_to=0), "round_to = 0"),
        (lambda: Comparison(Setting("m", "d"), (Trial("dense", 0, SETTING),)), "must share their setting"),
    ],
)
def test_nonsense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_folder_takes_more_trials_of_its_comparison_and_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Comparison.of(SETTING, ["dense"], seeds=[0]).claim(folder, "first")
    Comparison.of(SETTING, ["dense"], seeds=[1]).claim(folder, "second")
    assert len(json.loads((folder / "comparison.json").read_text())["trials"]) == 2
    before = (folder / "comparison.json").read_bytes()
    with pytest.raises(RecordError, match=r"different comparison \(recipe.lr is 0.1 there, 0.2 here\)"):
        Comparison.of(replace(SETTING, recipe={"epochs": 2, "lr": 0.2}), ["dense"], seeds=[0]).claim(folder)
    assert (folder / "comparison.json").read_bytes() == before


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(RecordError, match="not empty and holds no comparison"):
        Comparison.of(SETTING, ["dense"], seeds=[0]).claim(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2}', '{"format": 1, "setting": 3, "trials": {}}'])
def test_a_damaged_description_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(RecordError, match=r"comparison\.json"):
        Comparison.of(SETTING, ["dense"], seeds=[0]).claim(tmp_path)


def test_deadline() -> None:
    now = [0.0]
    deadline = Deadline(10.0, clock=lambda: now[0])
    deadline.check(9.9)
    now[0] = 5.0
    deadline.check(4.9)
    with pytest.raises(Stopped):
        deadline.check(5.0)
    now[0] = 11.0
    with pytest.raises(Stopped):
        deadline.check()
    Deadline(None).check(1e9)


@pytest.mark.parametrize("text", ["", "nine", "9 m", "5d", "-3s", "0s", "m9"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(FilterfoldError, match=r"duration|no time"):
        seconds(text)
