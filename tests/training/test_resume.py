"""A run that is interrupted ends with the weights of one that was not."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from filterfold import data, zoo
from filterfold.data import ImageData
from filterfold.errors import CheckpointError, ConfigError
from filterfold.plan import Cut, Plan, Slice, keep_units
from filterfold.surgery.apply import apply
from filterfold.training import Callback, History, Recipe, Run, train
from filterfold.utils.io import load_tree, save_tree

pytestmark = pytest.mark.slow

RECIPE = Recipe(epochs=5, batch_size=50, lr=0.1, schedule="cosine")


def network(seed: int = 0) -> nn.Module:
    """With dropout, so that the random state matters."""
    torch.manual_seed(seed)
    model = zoo.build("vgg_small", channels=1, image_size=8, width=0.25)
    model.classifier[2] = nn.Sequential(nn.ReLU(), nn.Dropout(0.3))
    return model


class Pruner(Callback):
    """Cuts four filters of the first layer after epoch 2; keeps count of epochs and a random tensor."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.noise = torch.zeros(3)

    def on_batch_loss(self, run: Run) -> Tensor | None:
        return 1e-4 * run.model.features[0].weight.square().sum()  # type: ignore[index,union-attr,return-value]

    def on_epoch_end(self, run: Run) -> None:
        self.seen.append(run.epoch)
        self.noise = self.noise + torch.rand(3)
        if run.epoch == 2:
            units = tuple(range(8))
            names = ("features.1.weight", "features.1.bias", "features.1.running_mean", "features.1.running_var")
            producers = (
                Slice("features.0.weight", 0, units, "filter"),
                *(Slice(name, 0, units, "norm") for name in names),
            )
            cut = Cut(
                "features.0", keep_units(8, [1, 2, 4, 7]), producers, (Slice("features.3.weight", 1, units, "kernel"),)
            )
            apply(Plan((cut,)), run.model, optimizer=run.optimizer)
            run.structure_changed()
            run.event("pruned")

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "noise": self.noise}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen, self.noise = list(state["seen"]), state["noise"]


class Interrupt(Callback):
    """Stops in the middle of an epoch, as Ctrl-C does."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_batch_loss(self, run: Run) -> None:
        if run.step == self.step:
            raise KeyboardInterrupt


def states_equal(left: nn.Module, right: nn.Module) -> bool:
    first, second = left.state_dict(), right.state_dict()
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def without_times(history: History) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history.rows]


@pytest.mark.parametrize("options", [{}, {"channels_last": True}, {"precision": "bf16-mixed"}])
@pytest.mark.parametrize("step", [2, 6, 10, 17])  # four batches an epoch: in the first, second, third and last
def test_interrupted_equals_undisturbed(digits: ImageData, tmp_path: Path, step: int, options: dict[str, Any]) -> None:
    recipe = Recipe(epochs=5, batch_size=50, lr=0.1, schedule="cosine", **options)
    whole, pruner = network(), Pruner()
    expected = train(whole, digits, recipe, callbacks=[pruner, Interrupt(None)], device="cpu")
    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(network(), digits, recipe, callbacks=[Pruner(), Interrupt(step)], checkpoint=path, device="cpu")
    assert path.exists() == (step >= 4)
    torch.rand(7)
    resumed, again = network(), Pruner()
    found = train(resumed, digits, recipe, callbacks=[again, Interrupt(None)], checkpoint=path, device="cpu")
    assert states_equal(whole, resumed)
    assert resumed.features[0].out_channels == 4
    assert without_times(found) == without_times(expected)
    assert again.seen == [1, 2, 3, 4, 5]
    assert torch.equal(again.noise, pruner.noise)


def test_a_finished_run_is_only_loaded(digits: ImageData, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    first, second = network(), network(seed=1)
    history = train(first, digits, RECIPE, checkpoint=path, device="cpu")
    stamp = path.stat().st_mtime_ns
    started = network(seed=1)
    assert not states_equal(second, first)
    assert train(started, digits, RECIPE, checkpoint=path, device="cpu") == history
    assert states_equal(started, first)
    assert path.stat().st_mtime_ns == stamp


def test_a_caller_can_stop_a_run_after_an_epoch(digits: ImageData, tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    asked = []

    def check(seconds: float) -> None:
        asked.append(seconds)
        if len(asked) == 3:
            raise Enough

    path = tmp_path / "run.safetensors"
    with pytest.raises(Enough):
        train(network(), digits, RECIPE, checkpoint=path, checkpoint_seconds=1e9, check=check, device="cpu")
    assert all(seconds > 0 for seconds in asked)
    assert load_tree(path)["epoch"] == 3
    resumed, whole = network(), network()
    train(resumed, digits, RECIPE, checkpoint=path, device="cpu")
    train(whole, digits, RECIPE, device="cpu")
    assert states_equal(resumed, whole)


SCRIPT = """
import sys, time, torch
sys.path.insert(0, sys.argv[2])
torch.set_num_threads(1)
from test_resume import Callback, Pruner, RECIPE, network, data, train

class Slow(Callback):
    def on_batch_loss(self, run):
        if run.epoch == 4:
            print("in epoch 4", flush=True)
            time.sleep(60)

train(network(), data.load("digits", train_limit=200, validation=100), RECIPE, callbacks=[Pruner(), Slow()],
      checkpoint=sys.argv[1], device="cpu")
"""


class Slow(Callback):
    """Stands in for the callback of that name in the killed process."""


def test_killed_in_the_middle_of_an_epoch(digits: ImageData, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    command = [sys.executable, "-c", SCRIPT, str(path), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in epoch 4\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    assert load_tree(path)["epoch"] == 3
    whole, resumed = network(), network()
    train(whole, digits, RECIPE, callbacks=[Pruner()], device="cpu")
    train(resumed, digits, RECIPE, callbacks=[Pruner(), Slow()], checkpoint=path, device="cpu")
    assert states_equal(whole, resumed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"recipe": Recipe(epochs=5, batch_size=50, lr=0.2, schedule="cosine")}, "recipe.lr is 0.1 there, 0.2 here"),
        ({"callbacks": [Pruner()]}, "callbacks is [] there, ['Pruner'] here"),
        ({"phase": "retrain"}, "phase is 'train' there, 'retrain' here"),
        ({"model": "wide"}, "features.0.weight is [[8, 1, 3, 3], 'float32'] there, [[16, 1, 3, 3], 'float32'] here"),
        ({"data": "other"}, "data.train is 200 there, 190 here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    digits: ImageData, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    path = tmp_path / "run.safetensors"
    model = zoo.build("vgg_small", channels=1, image_size=8, width=0.25)
    train(model, digits, RECIPE, checkpoint=path, device="cpu")
    width = 0.5 if changed.pop("model", None) else 0.25
    here = data.load("digits", train_limit=190, validation=100) if changed.pop("data", None) else digits
    before = path.read_bytes()
    other = zoo.build("vgg_small", channels=1, image_size=8, width=width)
    with pytest.raises(ConfigError) as caught:
        train(other, here, **{"recipe": RECIPE, "checkpoint": path, "device": "cpu", **changed})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_damaged_checkpoints_are_refused(digits: ImageData, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    train(network(), digits, RECIPE, checkpoint=path, device="cpu")
    content, tree = path.read_bytes(), load_tree(path)
    for damaged in (content[:100], content[:-100], b"not one"):
        path.unlink()  # the tree above is mapped from the old file
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            train(network(), digits, RECIPE, checkpoint=path, device="cpu")
        assert path.read_bytes() == damaged
    save_tree(path, {"format": 1})
    with pytest.raises(CheckpointError, match="not a training checkpoint"):
        train(network(), digits, RECIPE, checkpoint=path, device="cpu")
    del tree["model"]["features.0.weight"]
    save_tree(path, tree)
    with pytest.raises(CheckpointError, match="does not fit the run"):
        train(network(), digits, RECIPE, checkpoint=path, device="cpu")
