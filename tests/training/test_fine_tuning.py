"""AdamW, clipping, frozen norms, the moving average: against loops by hand with PyTorch's own parts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from filterfold import apply, data, zoo
from filterfold.data import ImageData
from filterfold.online import OnlineCallback, Schedule
from filterfold.training import Recipe, evaluate, train

STEPS = 4  # of 50 images an epoch


def network() -> nn.Module:
    torch.manual_seed(0)
    return zoo.build("vgg_small", channels=1, image_size=8, width=0.25)


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(first, second) for first, second in pairs)


def feed(digits: ImageData, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    for epoch in range(1, epochs + 1):
        yield from data.batches(
            digits.train, 50, shuffle=True, augment=digits.augment, seed=0, epoch=epoch, device="cpu", drop_last=True
        )


def by_hand(digits: ImageData, recipe: Recipe, optimizer: Any, after: Any = None, clip: float = 0.0) -> nn.Module:
    """A plain loop; `optimizer`: from a network; `after`: called with the network after every step."""
    model = network().train()
    stepper = optimizer(model)
    rates = [group["lr"] / recipe.lr for group in stepper.param_groups]
    for step, (images, labels) in enumerate(feed(digits, recipe.epochs)):
        for group, relative in zip(stepper.param_groups, rates, strict=True):
            group["lr"] = recipe.rate(step, STEPS) * relative
        stepper.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        stepper.step()
        if after is not None:
            after(model)
    return model


def test_adamw_takes_the_steps_of_torchs(digits: ImageData) -> None:
    recipe = Recipe(
        epochs=2, batch_size=50, lr=0.002, optimizer="adamw", weight_decay=0.05, schedule="warmup-cosine", head_lr=3
    )
    model = network()
    train(model, digits, recipe, device="cpu")

    def optimizer(hand: Any) -> torch.optim.Optimizer:
        *body, weight, bias = hand.parameters()
        groups = [{"params": body}, {"params": [weight, bias], "lr": 0.006}]
        return torch.optim.AdamW(groups, lr=0.002, weight_decay=0.05)

    assert same(model, by_hand(digits, recipe, optimizer))


def test_large_gradients_are_clipped(digits: ImageData) -> None:
    recipe = Recipe(epochs=2, batch_size=50, lr=0.1, schedule="constant", clip=0.5)
    model, free = network(), network()
    train(model, digits, recipe, device="cpu")
    train(free, digits, Recipe(epochs=2, batch_size=50, lr=0.1, schedule="constant"), device="cpu")
    assert not same(model, free)

    def optimizer(hand: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(hand.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    assert same(model, by_hand(digits, recipe, optimizer, clip=0.5))


def test_frozen_norms_keep_their_statistics(digits: ImageData) -> None:
    model = network()
    train(model, digits, Recipe(epochs=1, batch_size=50, lr=0.05), device="cpu")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    train(model, digits, Recipe(epochs=1, batch_size=50, lr=0.05, freeze_norms=True), device="cpu")
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name, _ in model.named_parameters()}  # scales and shifts too, running statistics not
    assert all(module.training for module in model.modules())


def test_the_average_is_torchs_with_a_decay_that_starts_low(digits: ImageData) -> None:
    recipe = Recipe(epochs=3, batch_size=50, lr=0.1, schedule="constant", ema=0.4)
    model = network()
    rows = train(model, digits, recipe, device="cpu").rows
    hand = torch.optim.swa_utils.AveragedModel(
        network(),
        avg_fn=lambda one, other, n: (share := min(0.4, (1 + n) / (10 + n))) * one + (1 - share) * other,
        use_buffers=True,
    )
    hand.n_averaged += 1  # it would take the first network as it is; ours begins with the one before

    def optimizer(own: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(own.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    last = by_hand(digits, recipe, optimizer, hand.update_parameters)
    for (name, one), two in zip(model.state_dict().items(), hand.module.state_dict().values(), strict=True):
        if one.is_floating_point():
            torch.testing.assert_close(one, two, msg=name)
    assert not torch.equal(model.features[0].weight, last.features[0].weight)  # type: ignore[index,union-attr]
    assert rows[-1]["validation_top1"] == evaluate(model, digits.validation).top1


@pytest.mark.parametrize("remedy", [None, "norms", "kernels"])
def test_the_average_is_cut_by_the_same_plan(digits: ImageData, remedy: Any) -> None:
    """After the last step: then what is left of the average is that of the uncut run, cut, and mended likewise."""
    recipe = Recipe(epochs=2, batch_size=50, lr=0.1, schedule="constant", ema=0.9)
    whole, model = network(), network()
    train(whole, digits, recipe, device="cpu")
    batches = [images for images, _ in data.batches(digits.train, 100)]
    callback = OnlineCallback(
        keep=0.5, schedule=Schedule((), ((2 * STEPS, 1.0),), unit="step"), remedy=remedy, loader=batches
    )
    train(model, digits, recipe, callbacks=[callback], device="cpu")  # type: ignore[list-item]
    assert callback.online is not None
    [plan] = callback.online.plans
    wanted = copy.deepcopy(whole)
    apply(plan, wanted)
    if remedy == "kernels":
        from filterfold import repair

        repair(wanted, whole, plan, batches)
    elif remedy == "norms":
        from filterfold import reestimate

        reestimate(wanted, batches)
    assert same(model, wanted)


def test_the_average_resumes(digits: ImageData, tmp_path: Path) -> None:
    recipe = Recipe(epochs=3, batch_size=50, lr=0.002, optimizer="adamw", ema=0.9, clip=1.0, freeze_norms=True)
    whole = network()
    expected = train(whole, digits, recipe, device="cpu")
    path = tmp_path / "state"

    def stop(_seconds: float) -> None:
        raise InterruptedError

    for _ in range(2):
        with pytest.raises(InterruptedError):
            train(network(), digits, recipe, checkpoint=path, check=stop, device="cpu")
    for _ in range(2):  # the second time it is finished, and just loaded
        again = network()
        found = train(again, digits, recipe, checkpoint=path, device="cpu")
        assert same(whole, again)
        assert [{**row, "seconds": 0} for row in found.rows] == [{**row, "seconds": 0} for row in expected.rows]
