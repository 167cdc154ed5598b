"""Cuts between batches of the training loop: the same as a loop by hand, and resumed to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from filterfold import data, zoo
from filterfold.bench.trials.config import Trial
from filterfold.bench.trials.context import RunContext
from filterfold.bench.trials.costs import paid_epochs
from filterfold.bench.trials.setting import Setting
from filterfold.bench.trials.trial import run_trial
from filterfold.errors import ConfigError
from filterfold.online import OnlineCallback, OnlineFilterClustering, Schedule
from filterfold.profiling.macs import measure
from filterfold.training import Recipe, train

pytestmark = pytest.mark.slow

RECIPE = Recipe(epochs=4, batch_size=50, lr=0.05)
STEPS = 6  # of 50 images an epoch


def small() -> nn.Module:
    torch.manual_seed(0)
    return zoo.build("vgg_small", channels=1, image_size=8, width=0.25)


@pytest.fixture(scope="module")
def digits() -> data.ImageData:
    return data.load("digits", train_limit=300, validation=50)


def run(
    model: nn.Module, digits: data.ImageData, callback: OnlineCallback, path: Path | None = None, check: Any = None
):
    return train(model, digits, RECIPE, callbacks=(callback,), checkpoint=path, check=check, device="cpu")


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(first, second) for first, second in pairs)


def test_the_loop_does_what_a_loop_by_hand_does(digits) -> None:
    schedule = Schedule((2, 4, 7), ((4, 0.5), (9, 1.0)), unit="step")
    model, callback = small(), OnlineCallback(keep=0.5, schedule=schedule, strength=0.01)
    rows = run(model, digits, callback).rows
    hand = small().train()
    optimizer = RECIPE.make_optimizer(hand)
    online = OnlineFilterClustering(
        hand, digits.example, optimizer, keep=0.5, schedule=schedule, pull=callback.options["pull"]
    )
    step, macs = 0, []
    for epoch in range(1, 5):
        feed = data.batches(
            digits.train, 50, shuffle=True, augment=digits.augment, seed=0, epoch=epoch, device="cpu", drop_last=True
        )
        for images, labels in feed:
            macs.append(measure(hand, digits.example).macs)
            optimizer.zero_grad(set_to_none=True)
            loss = functional.cross_entropy(hand(images), labels)
            loss.backward()
            online.add_gradients()
            optimizer.step()
            step += 1
            del loss
            online.step(step)
    assert same(model, hand)
    assert callback.online is not None
    assert callback.online.plans == online.plans
    assert [row["epoch"] for row in callback.history] == [-(-row["epoch"] // STEPS) for row in online.history]
    means = [sum(macs[STEPS * epoch : STEPS * (epoch + 1)]) / STEPS for epoch in range(4)]
    assert [row.get("mean_macs", row["macs"]) for row in rows] == pytest.approx(means)
    assert ["mean_macs" in row for row in rows] == [True, True, False, False]


@pytest.mark.parametrize("schedule", ["small-cuts", "0.1,0.45", Schedule.gradual(steps=24, every=5)])
def test_an_interrupted_run_ends_the_same(digits, tmp_path, schedule) -> None:
    def callback() -> OnlineCallback:
        return OnlineCallback(keep=0.5, schedule=schedule, strength=0.1, distill=1.0)

    whole, first, seen = small(), callback(), []
    rows = run(whole, digits, first).rows

    def stop(seconds: float) -> None:
        seen.append(seconds)
        raise InterruptedError

    for _ in range(3):
        with pytest.raises(InterruptedError):
            run(small(), digits, callback(), tmp_path / "state", stop)
    again, second = small(), callback()
    found = run(again, digits, second, tmp_path / "state").rows
    assert len(seen) == 3
    assert same(whole, again)
    assert first.online is not None
    assert second.online is not None
    assert first.online.plans == second.online.plans
    assert first.history == second.history
    assert [{**row, "seconds": 0} for row in found] == [{**row, "seconds": 0} for row in rows]


def test_a_teacher_from_the_middle_of_an_epoch_is_paid_for_by_the_step(digits) -> None:
    callback = OnlineCallback(keep=0.5, schedule=Schedule((), ((8, 1.0),), unit="step"), distill=1.0)
    rows = run(small(), digits, callback).rows
    full = measure(small(), digits.example).macs
    assert [row.get("extra_macs") for row in rows] == [None, pytest.approx(full * 4 / STEPS), full, full]
    assert isinstance(rows[2]["extra_macs"], int)


def test_a_plateau_is_waited_for_by_epochs() -> None:
    with pytest.raises(ConfigError, match="counts epochs"):
        OnlineCallback(keep=0.5, schedule=Schedule((), ((5, 1.0),), patience=2, unit="step"))


def test_a_trial_pays_for_each_batch_what_the_network_costs_then(tmp_path) -> None:
    setting = Setting(
        "vgg_small", "digits", width=0.25, data_options={"train_limit": 300, "validation": 0},
        recipe={"epochs": 4, "batch_size": 50, "lr": 0.05}, online={"schedule": "0.125,0.375"},
    )  # fmt: skip
    bench = RunContext(setting, tmp_path, "cpu")
    record = run_trial(Trial("online", 0, setting, macs=0.5), bench)
    assert record["result"] is not None
    assert record["dense"] is not None
    ends = [row["macs"] for row in record["history"]]  # cuts after 3 and after 9 of 24 batches
    batches = 3 * record["dense"]["macs"] + 6 * ends[0] + 15 * ends[1]
    assert record["result"]["train_macs"] == 3 * 50 * batches
    assert {row["epoch"] for row in record["clusters_history"]} == {1, 2}
    full = record["dense"]["macs"]  # beforehand: milestones take equal steps of the budget
    beforehand = (3 * full + 6 * int(0.75 * full) + 15 * int(0.5 * full)) / 6
    assert paid_epochs(Trial("scratch-long", 0, setting, macs=0.5), bench) == {
        "epochs": round(beforehand / int(0.5 * full))
    }
