"""The centripetal rule against its formula, its rate, and the fold that follows."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from filterfold import data, zoo
from filterfold.errors import ConfigError
from filterfold.online import CutOptions, OnlineCallback, OnlineFilterClustering, Pull, Schedule
from filterfold.training import Recipe, train

pytestmark = pytest.mark.slow

X = torch.zeros(1, 1, 6, 6, dtype=torch.float64)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(6 * 36, 10), nn.ReLU(), nn.Linear(10, 3)),
    )
    net[1].weight.data[[1, 4]] *= -1
    return net.double()


class Residual(nn.Module):
    """A stage of two coupled convolutions, the second one depthwise with a pointwise one behind it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.branch = nn.Sequential(
            *(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)),
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.relu(x + self.branch(x)).mean((2, 3)))


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(8, 1, 6, 6, generator=generator, dtype=torch.float64)
        yield x, x.mean((1, 2, 3)).mul(10).long().clamp(-1, 1) + 1


def steps(model: nn.Module, online: OnlineFilterClustering, optimizer: torch.optim.Optimizer, count: int) -> None:
    for x, y in batches(count):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        online.merge_gradients()
        optimizer.step()


def test_gradients_follow_the_formula() -> None:
    model = plain()
    online = OnlineFilterClustering(model, X, None, keep=0.5, pull=Pull("centripetal", 0.3))
    online.update_clusters()
    x, y = next(batches(1))
    functional.cross_entropy(model(x), y).backward()
    before = {name: value.grad.clone() for name, value in model.named_parameters()}
    online.merge_gradients()
    # layer, then which of its entries count as their negatives where the batch norm's scale is negative
    table = [("0", "0.weight", 0.3, True), ("0", "0.bias", 0.3, True), ("0", "1.weight", 0.03, True)]
    table += [("0", "1.bias", 0.03, False), ("7", "7.weight", 0.3, False), ("7", "7.bias", 0.3, False)]
    for group, name, strength, signed in table:
        labels, value = online.labels[group], model.get_parameter(name)
        sign = torch.where(model[1].weight < 0, -1.0, 1.0) if signed and group == "0" else torch.ones(len(labels))
        sign = sign.view(-1, *[1] * (value.ndim - 1)).double()
        for unit, label in enumerate(labels.tolist()):
            own = labels == label
            mean, centre = (sign * before[name])[own].mean(0), (sign * value)[own].mean(0)
            wanted = sign[unit] * (mean + strength * (sign[unit] * value[unit] - centre))
            torch.testing.assert_close(value.grad[unit], wanted)
    assert torch.equal(model[9].weight.grad, before["9.weight"])


@pytest.mark.parametrize("make", [plain, Residual])
def test_differences_shrink_by_one_factor_a_step_and_the_fold_is_lossless(make) -> None:
    model, rate, strength = make(), 0.1, 4.0
    model.double().train()
    optimizer = torch.optim.SGD(model.parameters(), rate)
    online = OnlineFilterClustering(
        model, X, optimizer, keep=0.5, pull=Pull("centripetal", strength), cutting=CutOptions(features="filters")
    )
    online.update_clusters()

    def differences(tensor: Tensor, group: str) -> Tensor:
        labels = online.labels[group]
        mean = torch.stack([tensor[labels == label].mean(0) for label in range(int(labels.max()) + 1)])
        return tensor.detach() - mean[labels].detach()

    stem, norm = (model[3], model[4]) if make is plain else (model.stem[0], model.stem[1])
    group = "3" if make is plain else "stem.0"
    first = [differences(value, group) for value in (stem.weight, norm.weight, norm.bias)]
    assert first[0].norm() > 0.1
    steps(model, online, optimizer, 5)
    then = [differences(value, group) for value in (stem.weight, norm.weight, norm.bias)]
    torch.testing.assert_close(then[0], first[0] * (1 - rate * strength) ** 5, rtol=1e-9, atol=1e-12)
    for one, two in zip(first[1:], then[1:], strict=True):
        torch.testing.assert_close(two, one * (1 - rate * strength / 10) ** 5, rtol=1e-9, atol=1e-12)
    steps(model, online, optimizer, 900)
    result = online.cluster_and_prune()
    x = next(batches(1))[0]
    assert result.exact
    assert result.change < 1e-10
    assert result.macs[1] < 0.6 * result.macs[0]
    assert model(x).shape == (8, 3)
    assert not online.labels
    online.merge_gradients()  # nothing left to merge


@pytest.mark.parametrize("make", [plain, Residual])
def test_without_it_the_same_fold_loses(make) -> None:
    model = make().double().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    online = OnlineFilterClustering(model, X, optimizer, keep=0.5, pull=Pull(strength=0))
    online.update_clusters()
    steps(model, online, optimizer, 100)
    assert online.cluster_and_prune().change > 1e-3


def test_identical_up_to_sign_behind_negative_scales() -> None:
    model = plain().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5)
    online = OnlineFilterClustering(model, X, optimizer, clusters={"0": 2}, pull=Pull("centripetal", 4.0))
    online.update_clusters()
    assert len(set(online.labels["0"][[1, 4]].tolist()) & set(online.labels["0"][[0, 2, 3, 5, 6, 7]].tolist())) > 0
    steps(model, online, optimizer, 900)
    assert bool((model[1].weight < 0).any())
    x = next(batches(1))[0]
    model.eval()
    before = model(x)
    assert online.cluster_and_prune().exact
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)


def test_missing_and_frozen_gradients_are_left_alone() -> None:
    model = plain()
    model[0].weight.requires_grad_(False)
    online = OnlineFilterClustering(model, X, None, keep=0.5, pull="centripetal")
    assert (online.pull.strength, online.loss().item(), online.pulls) == (0.05, 0, False)
    online.update_clusters()
    x, y = next(batches(1))
    functional.cross_entropy(model(x), y).backward()
    model[1].bias.grad = None
    model[3].weight.grad = None
    kept = copy.deepcopy(model.state_dict())
    online.merge_gradients()
    assert [value.grad is None for value in (model[0].weight, model[1].bias, model[3].weight)] == [True] * 3
    assert all(torch.equal(one, two) for one, two in zip(kept.values(), model.state_dict().values(), strict=True))


def test_it_takes_part_in_the_training_loop() -> None:
    torch.manual_seed(0)
    model = zoo.build("vgg_small", channels=1, image_size=8, width=0.25)
    schedule = Schedule((1,), ((4, 1.0),))
    callback = OnlineCallback(keep=0.5, pull="centripetal", strength=20.0, schedule=schedule)
    images = data.load("digits", train_limit=300)
    train(model, images, Recipe(epochs=5, batch_size=25, lr=0.03), callbacks=(callback,), device="cpu")
    assert callback.online is not None
    pulled = callback.online.cuts[0].change
    torch.manual_seed(0)
    model = zoo.build("vgg_small", channels=1, image_size=8, width=0.25)
    callback = OnlineCallback(keep=0.5, pull="cosine", strength=0.0, schedule=schedule)
    train(model, images, Recipe(epochs=5, batch_size=25, lr=0.03), callbacks=(callback,), device="cpu")
    assert callback.online is not None
    assert pulled < 0.2 * callback.online.cuts[0].change


def test_unknown_pull() -> None:
    with pytest.raises(ConfigError, match="unknown pull 'hard': cosine or centripetal"):
        OnlineFilterClustering(plain(), X, None, keep=0.5, pull="hard")  # type: ignore[arg-type]
