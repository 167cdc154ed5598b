"""Accuracy against NumPy, and against what the shared weights are known to reach."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from filterfold import data, zoo
from filterfold.data import Split
from filterfold.errors import ConfigError, DataError, ModelError
from filterfold.training import evaluate


class Flat(nn.Sequential):
    """A linear network, whose logits NumPy can compute."""

    def __init__(self, classes: int = 7) -> None:
        super().__init__(nn.Flatten(), nn.Dropout(0.5), nn.Linear(2 * 4 * 4, classes))


def split(count: int = 103, classes: int = 7) -> Split:
    images = torch.randint(0, 256, (count, 2, 4, 4), dtype=torch.uint8)
    return Split(images, torch.arange(count) % classes, ((0.5, 0.4), (0.3, 0.2)))


@pytest.mark.parametrize(("classes", "batch_size"), [(7, 500), (7, 10), (3, 20)])
def test_metrics_equal_numpy(classes: int, batch_size: int) -> None:
    torch.manual_seed(0)
    model, held = Flat(classes), split(classes=classes)
    images = (held.images.numpy() / 255 - np.array([0.5, 0.4]).reshape(2, 1, 1)) / np.array([0.3, 0.2]).reshape(2, 1, 1)
    weight, bias = (p.detach().double().numpy() for p in (model[2].weight, model[2].bias))
    logits = images.reshape(103, -1) @ weight.T + bias
    labels = held.labels.numpy()
    ranks = (logits > logits[np.arange(103), labels][:, None]).sum(1)
    loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(103), labels]
    found = evaluate(model, held, batch_size=batch_size)
    assert found.images == 103
    assert found.top1 == pytest.approx(100 * (ranks < 1).mean())
    assert found.top5 == pytest.approx(100 * (ranks < 5).mean())
    assert found.loss == pytest.approx(loss.mean(), rel=1e-5)
    assert found.seconds > 0


def test_the_model_is_given_back_as_it_was() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(32), nn.Dropout().eval(), nn.Linear(32, 7))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    evaluate(model, split())
    assert [module.training for module in model] == [True, True, False, True]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_autocast_and_memory_format() -> None:
    seen = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(2, 7, 4)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            out = self.inner(images)
            seen.append((out.dtype, images.is_contiguous(memory_format=torch.channels_last)))
            return out.flatten(1)

    evaluate(Spy(), split(), precision="bf16-mixed", channels_last=True)
    assert seen[-1] == (torch.bfloat16, True)


def test_refusals() -> None:
    with pytest.raises(DataError, match="the network has 3 outputs, the data 7 classes"):
        evaluate(Flat(3), split())
    with pytest.raises(DataError, match="the network has 9 outputs, the data 7 classes"):
        evaluate(Flat(9), split(), classes=7)
    with pytest.raises(ModelError, match="Conv2d can't take images of 2x4x4: "):
        evaluate(nn.Conv2d(3, 7, 3), split())
    with pytest.raises(ModelError, match=r"returns a tensor of shape \(1, 7, 2, 2\)"):
        evaluate(nn.Conv2d(2, 7, 3), split())
    with pytest.raises(ConfigError, match="precision='half'"):
        evaluate(Flat(), split(), precision="half")
    with pytest.raises(DataError, match="no images"):
        evaluate(Flat(), split(0))


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "expected"), [(20, 91.73), (56, 93.39)])
def test_the_shared_weights_reach_what_they_are_known_for(
    shared: Path, request: pytest.FixtureRequest, depth: int, expected: float
) -> None:
    cache = request.config.cache.mkdir("filterfold")  # type: ignore[union-attr]
    cifar = data.load(str(shared / "data" / "cifar10"), normalization="imagenet", cache_dir=cache)
    model = zoo.build(f"resnet{depth}")
    missing = model.load_state_dict(load_file(shared / "weights" / f"resnet{depth}-cifar10.safetensors"), strict=False)
    assert not missing.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in missing.missing_keys)
    found = evaluate(model, cifar.test, batch_size=50, channels_last=True)
    assert found.images == 10000
    assert found.top1 == pytest.approx(expected, abs=0.02)
