"""Schedules and options against figures worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from torch import nn

from filterfold.errors import ConfigError
from filterfold.training import Recipe


def test_the_default_is_the_documents_recipe() -> None:
    recipe = Recipe()
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.schedule) == (100, 128, 0.02, "step")
    for epoch, expected in ((0, 0.02), (59, 0.02), (60, 0.004), (99, 0.004)):
        assert recipe.rate(epoch * 351 + 350, 351) == pytest.approx(expected)
    assert Recipe(epochs=200).rate(130, 1) == pytest.approx(0.02 / 25)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.8] * 5),
        ("cosine", [0.8, 0.8 * (1 + 0.5**0.5) / 2, 0.4, 0.8 * (1 - 0.5**0.5) / 2]),
        # 4 epochs of 2 batches, a quarter of them up: middles 1/16 and 3/16 of the way, then down
        ("onecycle", [0.8 * 1 / 4, 0.8 * (1 - 5 / 16) / 0.75, 0.8 * (1 - 9 / 16) / 0.75, 0.8 * (1 - 13 / 16) / 0.75]),
        # likewise up, then half a cosine over what is left
        ("warmup-cosine", [0.8 / 4, *(0.4 * (1 + math.cos(math.pi * (n / 16 - 0.25) / 0.75)) for n in (5, 9, 13))]),
    ],
)
def test_schedules(schedule: Any, expected: list[float]) -> None:
    recipe = Recipe(epochs=4, lr=0.8, schedule=schedule, warmup=0.25)
    for index, rate in enumerate(expected[:4]):
        assert recipe.rate(2 * index, 2) == pytest.approx(rate)


def test_onecycle_peaks_below_the_rate_and_never_reaches_zero() -> None:
    recipe = Recipe(epochs=10, lr=1.0, schedule="onecycle", warmup=0)
    rates = [recipe.rate(step, 5) for step in range(50)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(0.99)
    assert rates[-1] == pytest.approx(0.01)


def test_weight_decay_can_leave_norms_and_biases_out() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    groups = Recipe(decay_norms=False).make_optimizer(model).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(2, 5e-4), (4, 0.0)]
    model[0].requires_grad_(False)
    (group,) = Recipe().make_optimizer(model).param_groups
    assert len(group["params"]) == 4
    with pytest.raises(ConfigError, match="nothing to train"):
        Recipe().make_optimizer(model.requires_grad_(False))


def test_the_classifier_can_learn_at_a_rate_of_its_own() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2), nn.Linear(2, 3))
    groups = Recipe(lr=0.1, head_lr=10).make_optimizer(model, 3).param_groups
    assert [group["lr"] for group in groups] == [0.1, 1.0]
    assert [id(parameter) for parameter in groups[1]["params"]] == [id(model[4].weight), id(model[4].bias)]
    groups = (
        Recipe(optimizer="adamw", lr=0.1, head_lr=10, decay_norms=False, momentum=0.8)
        .make_optimizer(model)
        .param_groups
    )
    assert [(group["lr"], group["weight_decay"], len(group["params"])) for group in groups] == [
        (0.1, 5e-4, 2), (0.1, 0.0, 4), (1.0, 5e-4, 1), (1.0, 0.0, 1)
    ]  # fmt: skip
    assert {group["betas"] for group in groups} == {(0.8, 0.999)}
    with pytest.raises(ConfigError, match="no layer of the network has 7 outputs"):
        Recipe(head_lr=10).make_optimizer(model, 7)


def test_what_came_later_is_not_in_old_descriptions() -> None:
    """The ids of trials are made from these values."""
    assert sorted(Recipe().to_dict()) == sorted([
        "epochs", "batch_size", "lr", "momentum", "nesterov", "weight_decay", "decay_norms", "schedule", "step_every",
        "step_factor", "warmup", "label_smoothing", "augment", "precision", "channels_last", "compile", "deterministic",
        "seed",
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("lr", 0.0),
        ("momentum", 1.0),
        ("weight_decay", -1e-4),
        ("schedule", "steps"),
        ("step_every", 0),
        ("step_factor", 0),
        ("warmup", 1.0),
        ("label_smoothing", 1.0),
        ("precision", "fp16"),
        ("optimizer", "adam"),
        ("head_lr", 0.0),
        ("ema", 1.0),
        ("clip", -1.0),
    ],
)
def test_values_that_make_no_sense(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe(**{name: value})
    assert f"recipe: {name}={value!r} makes no sense" in str(caught.value)


def test_nesterov_is_of_sgd() -> None:
    with pytest.raises(ConfigError, match="nesterov=True makes no sense; it must be False unless by SGD"):
        Recipe(optimizer="adamw", nesterov=True)
