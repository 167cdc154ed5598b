"""What can follow dense training: strategies, own shares and schedules, weights from a file, the twin from scratch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from filterfold.bench import recipes
from filterfold.bench.recipes.recipe import keep_shares
from filterfold.bench.trials import trial as running
from filterfold.bench.trials.config import COMPARED, CONTROLS, Comparison, Trial
from filterfold.bench.trials.context import RunContext
from filterfold.bench.trials.records import Record
from filterfold.bench.trials.runner import compare
from filterfold.bench.trials.setting import Setting
from filterfold.errors import ConfigError
from filterfold.surgery.checkpoint import load, save

pytestmark = pytest.mark.slow

SETTING = Setting(
    "vgg_small",
    "digits",
    width=0.5,
    data_options={"train_limit": 200},
    recipe={"epochs": 1, "lr": 0.05, "schedule": "constant"},
    retrain_epochs=3,
    shares={"features.*": 0.5, "features.0": 1.0},
)


def run(trial: Trial, folder: Path) -> Record:
    return running.run_trial(trial, RunContext(trial.setting, folder, "cpu"))


def test_own_shares_and_schedule(tmp_path: Path) -> None:
    trial = Trial("l1", 0, replace(SETTING, retrain={"schedule": "cosine", "lr": 0.01}))
    record = run(trial, tmp_path)
    result = record["result"]
    assert result is not None
    assert {name: after for name, (_, after) in result["widths"].items()} == {
        "features.0": 16,
        "features.3": 8,
        "features.7": 16,
        "features.10": 16,
        "classifier.0": 32,
    }
    rates = [row["learning_rate"] for row in record["history"] if row["phase"] == "retrain"]
    assert len(rates) == 3
    assert max(rates) <= 0.01
    assert sorted(rates, reverse=True) == rates
    assert record["options"]["shares"] == SETTING.shares


def test_iterative_pruning_cuts_layer_by_layer_and_ends_as_narrow(tmp_path: Path) -> None:
    record = run(Trial("l1-iterative", 0, SETTING), tmp_path)
    result, retraining = record["result"], [row for row in record["history"] if row["phase"] == "retrain"]
    assert result is not None
    assert [row["epoch"] for row in retraining] == [1, 2, 3]
    macs = [row["macs"] for row in retraining]
    assert macs[0] > macs[1] > macs[2] == result["macs"]
    at_once = run(Trial("l1", 0, SETTING), tmp_path)["result"]
    assert at_once is not None
    assert at_once["macs"] == result["macs"]


def test_greedy_scoring_leaves_out_what_was_dropped_above(tmp_path: Path) -> None:
    setting = replace(SETTING, retrain_epochs=0)
    trial = Trial("l1-greedy", 0, setting)
    bench = RunContext(setting, tmp_path, "cpu")
    running.run_trial(trial, bench)
    base = load(bench.base_file(trial.base.id, ".safetensors"), bench.build)
    small = load(bench.model_file(trial.id), bench.build)
    first, second, third = (base.get_parameter(f"features.{n}.weight").detach() for n in (3, 7, 10))
    kept = first.abs().sum((1, 2, 3)).topk(8).indices.sort().values
    kept_below = second[:, kept].abs().sum((1, 2, 3)).topk(16).indices.sort().values
    kept_last = third[:, kept_below].abs().sum((1, 2, 3)).topk(16).indices.sort().values
    assert torch.equal(small.get_parameter("features.10.weight").detach(), third[kept_last][:, kept_below])


def test_a_repaired_one_shot_cut_is_nearer_to_the_dense_network(tmp_path: Path) -> None:
    setting = replace(SETTING, recipe={**SETTING.recipe, "epochs": 3}, shares={}, retrain_epochs=0)
    bench = RunContext(setting, tmp_path, "cpu")
    trials = [Trial(method, 0, setting, macs=0.4) for method in ("l1", "l1+repair", "reconstruction-then-train+repair")]
    for trial in trials:
        running.run_trial(trial, bench)
    dense = load(bench.base_file(trials[0].base.id, ".safetensors"), bench.build).eval()
    images = torch.cat([images for images, _ in bench.loader(0)])
    plain, repaired, ranked = (load(bench.model_file(trial.id), bench.build).eval() for trial in trials)
    with torch.inference_mode():
        wanted = dense(images)
        change = [float((small(images) - wanted).norm() / wanted.norm()) for small in (plain, repaired, ranked)]
    assert change[1] < 0.6 * change[0]
    assert change[2] < change[0]
    first, last = ("features.3.weight", "features.10.weight")
    left = [
        [len(small.get_parameter(name)) / len(dense.get_parameter(name)) for name in (first, last)]
        for small in (plain, ranked)
    ]
    assert left[0][0] == pytest.approx(left[0][1], abs=0.07)  # the same share of every layer
    assert abs(left[1][0] - left[1][1]) > 0.07  # as the layers' scores say


def test_the_twin_from_scratch_is_as_wide_but_trained_from_its_own_weights(tmp_path: Path) -> None:
    setting = replace(SETTING, scratch={"epochs": 2})
    pruned = run(Trial("l1", 0, setting), tmp_path)["result"]
    record = run(Trial("scratch", 0, setting), tmp_path)
    result = record["result"]
    assert pruned is not None
    assert result is not None
    assert result["widths"] == pruned["widths"]
    assert [row["phase"] for row in record["history"]] == ["train", "train"]
    assert {row["macs"] for row in record["history"]} == {result["macs"]}


def test_a_trained_network_from_a_file_is_not_trained_again(tmp_path: Path) -> None:
    model = RunContext(SETTING, tmp_path, "cpu").build(7)
    save(model, tmp_path / "dense.safetensors")
    setting = replace(SETTING, weights=str(tmp_path / "dense.safetensors"), retrain_epochs=0)
    bench = RunContext(setting, tmp_path / "run", "cpu")
    record = running.run_trial(Trial("dense", 0, setting), bench)
    assert record["history"] == []
    again = load(bench.model_file(record["id"]), bench.build)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())


def test_names_of_trials_that_use_none_of_this_stay_as_they_were() -> None:
    plain = Setting("resnet20", "cifar10")
    assert "shares" not in Trial("l1", 0, plain).options
    assert Trial.from_dict(Trial("l1", 0, SETTING).to_dict()) == Trial("l1", 0, SETTING)


def test_the_twin_may_train_for_what_the_online_method_costs(tmp_path: Path) -> None:
    setting = replace(SETTING, recipe={"epochs": 4, "lr": 0.05}, shares={}, online={"schedule": "document"})
    online = run(Trial("online", 0, setting, keep=0.5), tmp_path)
    twin = run(Trial("scratch-long", 0, setting, keep=0.5), tmp_path)
    assert online["result"] is not None
    assert twin["result"] is not None
    assert twin["result"]["macs"] == online["result"]["macs"]
    spent, now = 0, online["dense"]["macs"]
    for row in online["history"]:  # cuts happen at the end of an epoch
        spent, now = spent + now, row["macs"]
    assert len(twin["history"]) == round(spent / now) > 4


@pytest.mark.parametrize(
    ("method", "least"),
    [("online+longer", 5), ("online-l1+longer", 5), ("online+early+longer", 6), ("scratch+longer", 9)],
)
def test_what_is_cheaper_may_train_for_longer(tmp_path: Path, method: str, least: int) -> None:
    setting = replace(SETTING, recipe={"epochs": 4, "lr": 0.05}, shares={})
    record = run(Trial(method, 0, setting, keep=0.5), tmp_path)
    assert record["result"] is not None
    rows, dense = record["history"], record["dense"]["macs"]
    cost = record["result"].get("train_macs", 0) / (3 * 4 * dense * record["result"].get("train_images", 0) / len(rows))
    assert 0.5 < cost <= 0.7
    assert len(rows) >= least
    one_more = cost + rows[-1]["macs"] / (4 * dense)
    assert one_more > 0.7 or method != "scratch+longer"


@pytest.mark.parametrize(("method", "most"), [("l1", 0.4), ("scratch", 0.4), ("online", 0.4), ("online-random", 0.4)])
def test_a_share_of_the_macs_is_met_by_every_method(tmp_path: Path, method: str, most: float) -> None:
    setting = replace(SETTING, recipe={"epochs": 2, "lr": 0.05}, shares={}, retrain_epochs=0)
    record = run(Trial(method, 0, setting, macs=most), tmp_path)
    assert record["result"] is not None
    assert 0.6 * most < record["result"]["macs"] / record["dense"]["macs"] <= most
    assert record["label"] == f"{method} macs=0.4"


def test_layer_after_layer_needs_shares_of_the_filters(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not of the MACs"):
        run(Trial("l1-iterative", 0, replace(SETTING, shares={}), macs=0.5), tmp_path)


@pytest.mark.parametrize("method", ["l1-hasty", "scratch-greedy", "online-l1-greedy"])
def test_unknown_strategies_are_refused(method: str) -> None:
    with pytest.raises(ConfigError, match="no method"):
        Trial(method, 0, SETTING, clusters=3 if method.startswith("online") else None)


def test_the_papers_widths_come_from_the_recipes() -> None:
    assert keep_shares("resnet110") == recipes.load("resnet110-b").keep
    assert keep_shares("vgg_small") is None


def test_dense_for_as_long_as_those_that_are_trained_again(tmp_path: Path) -> None:
    setting = Setting(
        "vgg_small", "digits", width=0.25, data_options={"train_limit": 256},
        recipe={"epochs": 2, "lr": 0.1, "schedule": "onecycle"}, retrain_epochs=1,
    )  # fmt: skip
    comparison = Comparison.of(setting, [*COMPARED, *CONTROLS], keep=[0.5], seeds=[0])
    outcome = compare(comparison, tmp_path / "run", timing_rounds=1)
    assert [record["method"] for record in outcome.records] == [
        "dense", "dense-long", "l1", "random", "scratch", "online", "online-l1",
    ]  # fmt: skip
    assert outcome.complete
    epochs = {record["method"]: len(record["history"]) for record in outcome.records}
    assert epochs == {"dense": 2, "dense-long": 3, "l1": 3, "random": 3, "scratch": 2, "online": 2, "online-l1": 2}
    found = {record["method"]: record for record in outcome.records}
    assert found["dense-long"]["dense"] is not None
    assert found["dense-long"]["result"] is not None
    assert found["dense-long"]["result"]["macs"] == found["dense-long"]["dense"]["macs"]
    # its own training, not that of `dense` and a bit more: the schedule ends with its last epoch
    rates = [epoch["learning_rate"] for epoch in found["dense-long"]["history"]]
    assert rates[1] > found["dense"]["history"][1]["learning_rate"]
    assert rates[2] < rates[1]
