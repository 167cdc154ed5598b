"""Every method begins with the same weights, known by their content; only `scratch` with fresh ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import filterfold as ff
from filterfold.bench.trials import context as contexts
from filterfold.bench.trials.config import COMPARED, CONTROLS, Comparison, Trial
from filterfold.bench.trials.context import RunContext
from filterfold.bench.trials.records import read_all
from filterfold.bench.trials.runner import compare
from filterfold.bench.trials.setting import Setting
from filterfold.bench.trials.start import Start, input_of, noted_input
from filterfold.data import load as load_data
from filterfold.errors import CheckpointError, ConfigError, RecordError
from filterfold.surgery.checkpoint import save
from filterfold.surgery.weights import Weights
from filterfold.zoo import build

SETTING = Setting(
    "vgg_small", "digits", width=0.25, data_options={"train_limit": 256},
    recipe={"epochs": 1, "lr": 0.01, "schedule": "constant"}, retrain_epochs=1,
)  # fmt: skip


def written(path: Path, classes: int = 10, seed: int = 5) -> Path:
    torch.manual_seed(seed)
    model = build("vgg_small", classes=classes, channels=1, width=0.25, image_size=8)
    torch.save({"state_dict": model.state_dict()}, path)
    return path


def beginning(path: Path, **others: Any) -> Setting:
    start = Start(str(path), tune=True, fingerprint=Weights.read(path).fingerprint, **others)
    return replace(SETTING, weights=start.weights, start=start.entries)


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Tensor]]:
    """Method and phase → the weights with which training began."""
    seen: dict[str, dict[str, Tensor]] = {}
    original = RunContext.train

    def train(self: RunContext, trial: Trial, model: nn.Module, **options: Any) -> Any:
        values = {name: value.clone() for name, value in model.state_dict().items()}
        seen.setdefault(f"{trial.method} {options.get('phase', 'train')}", values)
        return original(self, trial, model, **options)

    monkeypatch.setattr(contexts.RunContext, "train", train)
    return seen


def test_every_method_begins_with_the_weights_but_scratch(tmp_path: Path, first: dict[str, dict[str, Tensor]]) -> None:
    path = written(tmp_path / "w.pt")
    setting = beginning(path)
    comparison = Comparison.of(setting, [*COMPARED, *CONTROLS], keep=[0.5], seeds=[0])
    outcome = compare(comparison, tmp_path / "run", timing_rounds=1, device="cpu")
    assert outcome.complete
    assert not outcome.failed
    given = torch.load(path, weights_only=True)["state_dict"]
    begun = {name for name, values in first.items() if all(torch.equal(values[key], given[key]) for key in given)}
    assert begun == {"dense train", "dense-long train", "online train", "online-l1 train"}
    # one-shot methods went on from dense's training, and scratch had its own
    assert first.keys() - begun == {"l1 retrain", "random retrain", "scratch train"}
    epochs = {record["method"]: len(record["history"]) for record in read_all(tmp_path / "run")}
    assert epochs == {"dense": 1, "dense-long": 2, "l1": 2, "random": 2, "scratch": 1, "online": 1, "online-l1": 1}
    fresh = RunContext(SETTING, tmp_path, "cpu").build(0).state_dict()
    rows = {tuple(row.flatten().tolist()) for row in fresh["features.0.weight"]}
    assert {tuple(row.flatten().tolist()) for row in first["scratch train"]["features.0.weight"]} < rows


def test_a_new_head_is_the_seed_s_own_and_the_same_for_all_methods(tmp_path: Path) -> None:
    path = written(tmp_path / "w.pt", classes=7)
    with pytest.raises(CheckpointError, match=r"classifier.3 has 7 outputs there, 10 here"):
        RunContext(beginning(path), tmp_path, "cpu").build(0)
    context = RunContext(beginning(path, new_head=True), tmp_path, "cpu")
    one, same, other = (context.build(seed).state_dict() for seed in (0, 0, 1))
    given = torch.load(path, weights_only=True)["state_dict"]
    for name, value in one.items():
        assert torch.equal(value, same[name]), name
        if not name.startswith("classifier.3."):
            assert torch.equal(value, given[name]), name
    assert not torch.equal(one["classifier.3.weight"], other["classifier.3.weight"])
    assert "classifier.3 is new: 10 outputs instead of 7" in (context.told() or "")


def test_another_file_under_the_same_name_is_refused(tmp_path: Path) -> None:
    path, folder = written(tmp_path / "w.pt"), tmp_path / "run"
    setting = beginning(path)
    Comparison.of(setting, ["dense"], seeds=[0]).claim(folder)
    written(path, seed=6)
    with pytest.raises(RecordError, match=r"w.pt holds other weights now: start.fingerprint is '\w+' there, "):
        Comparison.of(beginning(path), ["dense"], seeds=[0]).claim(folder)
    with pytest.raises(RecordError, match=r"w.pt: not the weights that this was begun with"):
        RunContext(setting, folder, "cpu").build()
    assert Trial("dense", 0, beginning(path)).id != Trial("dense", 0, setting).id


def test_names_stay_and_records_of_before_mean_what_they_meant(tmp_path: Path) -> None:
    assert Trial("l1", 0, Setting("resnet20", "cifar10")).id == "l1-s0-c208e593ad"
    before = Setting("resnet20", "cifar10", weights="r.safetensors")  # as recipes wrote it: trained already
    assert Trial("l1", 0, before).id == "l1-s0-4d0ac1cb92"
    assert not before.begins.tune
    trial = Trial("l1", 0, beginning(written(tmp_path / "w.pt"), new_head=True))
    assert Trial.from_dict(json.loads(json.dumps(trial.to_dict()))) == trial
    assert trial.options["start"] == {
        "new_head": True, "tune": True, "fingerprint": Weights.read(tmp_path / "w.pt").fingerprint,
    }  # fmt: skip


def test_a_folder_of_before_this_option_is_taken_up(tmp_path: Path) -> None:
    Comparison.of(SETTING, ["dense"], seeds=[0]).claim(tmp_path)
    path = tmp_path / "comparison.json"
    document = json.loads(path.read_text())
    document["setting"] |= {"shares": {}, "follow": None, "weights": None}
    path.write_text(json.dumps(document))
    Comparison.of(SETTING, ["dense", "l1"], seeds=[0]).claim(tmp_path)
    assert len(json.loads(path.read_text())["trials"]) == 2


def test_a_pruned_network_is_trained_on_and_has_no_twin_from_scratch(tmp_path: Path) -> None:
    data = load_data("digits")
    model = build("vgg_small", channels=1, width=0.25, image_size=8)
    ff.prune(model, data.example, keep=0.5)
    save(model, tmp_path / "small.safetensors")
    setting = beginning(tmp_path / "small.safetensors")
    outcome = compare(Comparison.of(setting, ["dense"], seeds=[0]), tmp_path / "run", timing_rounds=1, device="cpu")
    [record] = outcome.records
    assert record["result"] is not None
    assert record["result"]["parameters"] == sum(p.numel() for p in model.parameters())
    with pytest.raises(ConfigError, match=r"'scratch': .*small.safetensors is pruned already"):
        compare(Comparison.of(setting, ["scratch"], seeds=[0]), tmp_path / "other", device="cpu")


def test_what_a_network_notes_of_its_images(tmp_path: Path) -> None:
    data = load_data("digits")
    save(nn.Linear(2, 2), tmp_path / "a", metadata={"input": input_of(data, {"train_limit": 3})})
    noted = noted_input(Weights.read(tmp_path / "a"))
    assert (noted["mean"], noted["std"]) == tuple(map(list, data.train.normalization))
    assert noted.keys() == {"mean", "std"}
    assert noted_input(Weights("x", {})) == {}
    for wrong in (
        3,
        {"mean": [0.5]},
        {"mean": ["a"], "std": [1]},
        {"mean": [1e999], "std": [1]},
        {"mean": [0], "std": [0]},
    ):
        save(nn.Linear(2, 2), tmp_path / "b", metadata={"input": wrong})
        with pytest.raises(CheckpointError, match="what it notes of its images"):
            noted_input(Weights.read(tmp_path / "b"))


@pytest.mark.parametrize("options", [{"weights": "a", "pretrained": True}, {"new_head": True}])
def test_what_excludes_each_other(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--weights"):
        Start(**options)
