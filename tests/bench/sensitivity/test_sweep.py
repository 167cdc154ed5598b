"""The sweep against networks that are really cut, and what is derived from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from filterfold import data
from filterfold.bench.sensitivity import Layer, Point, Sensitivity, suggest, sweep, sweep_layers
from filterfold.data import ImageData, Split
from filterfold.errors import ConfigError, RecordError, SelectionError
from filterfold.graph import Traced, trace
from filterfold.profiling.macs import measure
from filterfold.pruning.budgets import select
from filterfold.pruning.criteria import score
from filterfold.surgery.apply import apply
from filterfold.training import Recipe, evaluate, train
from filterfold.zoo import build


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return data.load("digits")


@pytest.fixture(scope="module")
def model(digits: ImageData) -> nn.Module:
    torch.manual_seed(0)
    network = build("resnet20", channels=1, width=0.25)
    train(network, digits, Recipe(epochs=2, batch_size=64, lr=0.1), validate_every=0)
    return network


@pytest.fixture(scope="module")
def groups(model: nn.Module, digits: ImageData) -> Traced:
    return trace(model, digits.example)


def test_every_point_is_that_of_the_network_that_is_really_cut(
    model: nn.Module, groups: Traced, digits: ImageData
) -> None:
    criteria, ratios = ("l1", "random", "mean-std"), (0.3, 0.75)
    loader = list(data.batches(digits.train.take(torch.arange(64)), 32))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = sweep(model, groups, digits.validation, criteria=criteria, ratios=ratios, loader=loader)
    assert [layer.group for layer in found.layers] == [group.name for group in groups if group.frozen is None]
    assert found.base["top1"] == pytest.approx(evaluate(model, digits.validation).top1)
    assert all(layer.partial for layer in found.layers)
    for criterion in criteria:
        scores = score(groups, model, criterion, loader=loader)
        for layer in found.layers:
            for point in layer.curve(criterion):
                keep = {group.name: 1.0 for group in groups} | {layer.group: 1 - point.ratio}
                receipt = apply(select(groups, scores, keep=keep), model)
                metrics = evaluate(model, digits.validation)
                receipt.rollback()
                assert point.top1 == pytest.approx(metrics.top1), (layer.group, criterion)
                assert point.loss == pytest.approx(metrics.loss, rel=1e-4)
                assert point.kept == max(1, int(round(layer.size * (1 - point.ratio), 9)))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_stages_are_layers_of_equal_resolution(model: nn.Module, groups: Traced, digits: ImageData) -> None:
    found = sweep(model, groups, digits.validation, ratios=[0.5], layers=["layer*.conv1"], images=8)
    assert [layer.stage for layer in found.layers] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert found.images == 8


def test_a_killed_sweep_goes_on_and_ends_the_same(
    model: nn.Module, groups: Traced, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_layers, "LARGEST_BATCH", 30)
    options = {"ratios": (0.5,), "layers": ["layer1.*.conv1"]}
    whole = sweep(model, groups, digits.validation, **options)  # type: ignore[arg-type]
    file = tmp_path / "sweep.part"
    saves = 0
    saved = sweep_layers._Sweep.save

    def dies(*arguments: Any) -> None:
        nonlocal saves
        saved(*arguments)
        saves += 1
        if saves == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(sweep_layers._Sweep, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            sweep(model, groups, digits.validation, path=file, **options)  # type: ignore[arg-type]
    assert json.loads(file.read_text())["done"] == 60
    other = {**options, "ratios": (0.25,)}
    with pytest.raises(ConfigError, match="is the beginning of another sweep"):
        sweep(model, groups, digits.validation, path=file, **other)  # type: ignore[arg-type]
    again = sweep(model, groups, digits.validation, path=file, **options)  # type: ignore[arg-type]
    assert again.layers == whole.layers
    assert sweep(model, groups, digits.validation, path=file, **options).layers == whole.layers  # type: ignore[arg-type]
    file.write_text("{")
    with pytest.raises(RecordError, match="not the beginning of a sweep"):
        sweep(model, groups, digits.validation, path=file, **options)  # type: ignore[arg-type]


class Peeking(nn.Module):
    """Reads the second layer's weights before it calls the first: running its end alone would be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 10, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.first(images * self.second.weight.abs().sum()))
        return self.second(features).mean((2, 3))


def test_a_layer_whose_short_cut_is_wrong_is_measured_by_full_passes(
    digits: ImageData, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = Peeking()
    groups = tuple(replace(group, frozen=None) for group in trace(model, digits.example) if group.name == "first")
    found = sweep(model, groups, digits.validation, ratios=[0.5], images=20)
    assert [layer.partial for layer in found.layers] == [False]
    assert "gives other outputs" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": [1.5]}, "ratio 1.5: the share of filters to remove must lie between 0 and 1"),
        ({"ratios": []}, "nothing to measure"),
        ({"criteria": ["l1", "l1"]}, "given twice"),
        ({"layers": ["nothing*"]}, "matches no layer"),
        ({"images": 0}, "give at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(
    model: nn.Module, groups: Traced, digits: ImageData, options: dict[str, object], message: str
) -> None:
    with pytest.raises((ConfigError, SelectionError), match=message):
        sweep(model, groups, digits.validation, **options)  # type: ignore[arg-type]


def curves(drops: dict[str, list[float]], groups: Traced) -> Sensitivity:
    """A sweep in which the layers lose so many points at 25, 50 and 75 %."""
    layers = []
    for stage, (name, lost) in enumerate(drops.items(), 1):
        size = groups.by_name[name].size
        points = [
            Point("l1", ratio, int(size * (1 - ratio)), 90 - drop, 99.0, 1.0)
            for ratio, drop in zip((0.25, 0.5, 0.75), lost, strict=True)
        ]
        layers.append(Layer(name, size, (stage + 1) // 2, True, True, tuple(points)))
    return Sensitivity({"top1": 90.0, "top5": 99.0, "loss": 1.0}, 100, tuple(layers), 1.0, 1.0)


DROPS = {
    "layer1.0.conv1": [0.0, 0.5, 3.0],
    "layer1.1.conv1": [0.2, 0.4, 0.9],
    "layer2.1.conv1": [5.0, 6.0, 9.0],
    "layer2.2.conv1": [1.5, 0.1, 7.0],
}


def test_a_suggestion_takes_what_removes_most_and_skips_what_does_not_bear_it(
    model: nn.Module, groups: Traced, digits: ImageData
) -> None:
    cost = measure(model, digits.example)
    found = suggest(curves(DROPS, groups), groups, cost, loss=1.0)
    assert found.ratios == {1: 0.5, 2: 0}  # two layers at 50 % remove more than one at 75 %
    assert found.pruned == {1: ("layer1.0.conv1", "layer1.1.conv1"), 2: ()}
    assert found.skipped[2] == ("layer2.1.conv1", "layer2.2.conv1")
    assert found.keep == {"layer1.0.conv1": 0.5, "layer1.1.conv1": 0.5}
    plan = select(groups, score(groups, model), keep={group.name: 1.0 for group in groups} | found.keep)
    receipt = apply(plan, model)
    after = measure(model, digits.example)
    receipt.rollback()
    assert found.macs == pytest.approx(after.macs / cost.macs)


def test_a_suggestion_for_a_share_of_macs_is_the_mildest_that_reaches_it(
    model: nn.Module, groups: Traced, digits: ImageData
) -> None:
    cost, sweep_ = measure(model, digits.example), curves(DROPS, groups)
    losses = sorted({0.0, 0.2, 0.4, 0.5, 0.9, 1.5, 3.0, 5.0, 6.0, 7.0, 9.0})
    shares = {loss: suggest(sweep_, groups, cost, loss=loss).macs for loss in losses}
    for target in (0.95, 0.9, 0.85):
        mildest = min((loss for loss in losses if shares[loss] <= target), default=None)
        if mildest is None:
            with pytest.raises(SelectionError, match="can't be met"):
                suggest(sweep_, groups, cost, macs=target)
        else:
            assert suggest(sweep_, groups, cost, macs=target).loss == pytest.approx(mildest)
    with pytest.raises(SelectionError, match=r"macs=0.05 can't be met: the smallest share within reach is macs 0\."):
        suggest(sweep_, groups, cost, macs=0.05)
    with pytest.raises(ConfigError, match="one of the two"):
        suggest(sweep_, groups, cost)
    with pytest.raises(ConfigError, match="was not measured"):
        suggest(sweep_, groups, cost, loss=1, criterion="random")


def test_json_round_trip(groups: Traced, tmp_path: Path) -> None:
    found = curves(DROPS, groups)
    found.write(tmp_path / "sweep.json")
    assert Sensitivity.read(tmp_path / "sweep.json") == found
    assert found.ranked("l1", 0.75)[0] == ("layer2.1.conv1", 81.0)
    assert found.mean("l1", 0.25) == pytest.approx(90 - 6.7 / 4)
    (tmp_path / "sweep.json").write_text('{"format": 1}')
    with pytest.raises(RecordError, match="not a sensitivity sweep"):
        Sensitivity.read(tmp_path / "sweep.json")
    with pytest.raises(RecordError, match="no such file"):
        Sensitivity.read(tmp_path / "nothing.json")


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:efficientnet_b0", "torchvision:shufflenet_v2_x1_0"])
@pytest.mark.slow
def test_networks_of_other_libraries_take_the_short_cut_in_every_layer(name: str) -> None:
    torch.manual_seed(0)
    network = build(name, classes=4)
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    split = Split(pixels, torch.arange(4), ((0.5,) * 3, (0.25,) * 3))
    found = sweep(network, trace(network, torch.zeros(1, 3, 32, 32)), split, ratios=[0.5])
    assert len(found.layers) > 10
    assert all(layer.partial for layer in found.layers)
