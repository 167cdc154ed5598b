"""Online clustering in the library's own training loop, in the example, and on code that keeps its sizes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from filterfold import data, zoo
from filterfold.errors import CheckpointError, ConfigError
from filterfold.online import CutOptions, OnlineCallback, OnlineFilterClustering, Schedule
from filterfold.profiling.macs import measure
from filterfold.training import Recipe, train

pytestmark = pytest.mark.slow


class StopError(Exception):
    pass


def small() -> nn.Module:
    torch.manual_seed(0)
    return zoo.build("vgg_small", channels=1, image_size=8, width=0.25)


@pytest.fixture(scope="module")
def digits() -> data.ImageData:
    return data.load("digits", train_limit=300)


def run(model: nn.Module, digits: data.ImageData, callback: OnlineCallback, path: Path | None = None, check=None):
    recipe = Recipe(epochs=5, batch_size=50, lr=0.05)
    return train(model, digits, recipe, callbacks=(callback,), checkpoint=path, check=check, device="cpu")


def test_the_network_shrinks_while_it_trains(digits) -> None:
    model, callback = small(), OnlineCallback(keep=0.5, strength=0.01)
    history = run(model, digits, callback)
    macs = [row["macs"] for row in history.rows]
    assert macs == sorted(macs, reverse=True)
    assert macs[-1] < 0.4 * measure(small(), digits.example).macs
    assert any("fold" in event for row in history.rows for event in row["events"])
    assert any("mean cosine" in event for row in history.rows for event in row["events"])
    online = callback.online
    assert online is not None
    assert online.finished
    assert {row["epoch"] for row in online.history} == {1, 2}  # at 20, 35 and 50 % of 5 epochs


@pytest.mark.parametrize(
    "schedule",
    [
        "document",
        Schedule((1,), ((4, 1.0),), patience=1, change=0.5),
        {"updates": [1], "milestones": [[2, 0.5], [3, 1.0]]},
    ],
)
def test_an_interrupted_run_ends_the_same(digits, tmp_path, schedule) -> None:
    whole = small()
    first = OnlineCallback(keep=0.5, schedule=schedule, strength=0.1)
    run(whole, digits, first)
    seen = []

    def stop(seconds: float) -> None:
        seen.append(seconds)
        if len(seen) == 3:
            raise StopError

    with pytest.raises(StopError):
        run(small(), digits, OnlineCallback(keep=0.5, schedule=schedule, strength=0.1), tmp_path / "state", stop)
    again, second = small(), OnlineCallback(keep=0.5, schedule=schedule, strength=0.1)
    run(again, digits, second, tmp_path / "state")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    assert first.online is not None
    assert second.online is not None
    assert first.online.history == second.online.history
    assert first.online.plans == second.online.plans


def test_callback_refusals() -> None:
    with pytest.raises(ConfigError, match="no option 'stength'"):
        OnlineCallback(keep=0.5, stength=1)
    with pytest.raises(ConfigError, match="schedule='sometimes'"):
        OnlineCallback(keep=0.5, schedule="sometimes")
    with pytest.raises(CheckpointError, match="has not started"):
        OnlineCallback(keep=0.5).state_dict()


class OwnSizes(nn.Module):
    """Code that writes its width down, and uses it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.width = 8
        self.conv, self.next = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8 * 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        x = x.reshape(len(x), self.width, 4, -1).mean(3)
        return self.next(x.reshape(len(x), self.width * 4))


@pytest.mark.parametrize("verify", [True, False])
def test_sizes_in_user_code_follow(verify: bool) -> None:
    model = OwnSizes()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    options = {"averaged": averaged, "cutting": CutOptions(verify=verify)}
    online = OnlineFilterClustering(model, torch.zeros(1, 1, 4, 4), None, keep=0.5, **options)
    result = online.cluster_and_prune()
    assert (model.width, averaged.module.width) == (4, 4)
    assert [change.attribute for change in result.plan.attributes] == ["width"]
    assert model(torch.randn(2, 1, 4, 4)).shape == averaged(torch.randn(2, 1, 4, 4)).shape == (2, 2)


def test_the_example_runs(capsys) -> None:
    path = Path(__file__).resolve().parents[2] / "examples" / "online_plain_pytorch.py"
    spec = importlib.util.spec_from_file_location("online_plain_pytorch", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main() > 93
    assert "x fewer multiply-accumulates" in capsys.readouterr().out


def test_schedule_objects_are_taken_as_they_are(digits) -> None:
    schedule = Schedule((), ((1, 1.0),))
    callback = OnlineCallback(clusters=4, schedule=schedule, method="l1")
    run(small(), digits, callback)
    assert callback.online is not None
    assert callback.online.schedule is schedule
    assert callback.online.groups[0].size == 4


def test_the_run_tells_when_it_levels_off(digits) -> None:
    schedule = Schedule((), ((3, 0.5), (4, 1.0)), patience=1, change=0.99)  # a loss that falls by less has levelled off
    callback = OnlineCallback(keep=0.5, schedule=schedule)
    history = run(small(), digits, callback)
    assert [len(row["events"]) for row in history.rows] == [0, 1, 0, 1, 0]
    schedule = Schedule((), ((3, 0.5), (4, 1.0)), patience=1, change=0.0)
    history = run(small(), digits, OnlineCallback(keep=0.5, schedule=schedule))
    assert [len(row["events"]) for row in history.rows][:3] == [0, 0, 1]  # it still falls: at the latest
