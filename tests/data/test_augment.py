"""Crops, flips and batches against plain slicing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from filterfold.data import Split, batches, splits
from filterfold.data.augment import Draws, crop_and_flip, draw, seeded
from filterfold.errors import ConfigError, DataError

NEUTRAL = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def some_split(count: int = 50, size: int = 16) -> Split:
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=seeded(9))
    return Split(images, torch.arange(count) % 5, NEUTRAL)


@pytest.mark.parametrize(("channels", "height", "width", "pad"), [(1, 8, 8, 1), (3, 16, 16, 2), (2, 5, 9, 3)])
def test_crop_and_flip_equals_slicing(channels: int, height: int, width: int, pad: int) -> None:
    images = torch.randint(0, 256, (40, channels, height, width), dtype=torch.uint8)
    rows, columns = torch.randint(0, 2 * pad + 1, (2, 40))
    flips = torch.rand(40) < 0.5
    result = crop_and_flip(images, Draws(rows, columns, flips, pad)).numpy()
    for index in range(40):
        padded = np.pad(images[index].numpy(), ((0, 0), (pad, pad), (pad, pad)))
        part = padded[:, rows[index] : rows[index] + height, columns[index] : columns[index] + width]
        np.testing.assert_array_equal(result[index], part[:, :, ::-1] if flips[index] else part)


def test_every_offset_and_both_flips_are_drawn_evenly() -> None:
    draws = draw("crop-flip", 20000, 32, seeded(0), torch.device("cpu"))
    assert draws is not None
    assert draws.pad == 4
    for offsets in (draws.rows, draws.columns):
        counts = torch.bincount(offsets, minlength=9)
        assert len(counts) == 9
        assert (counts - 20000 / 9).abs().max() < 5 * (20000 / 9) ** 0.5
    assert abs(draws.flips.float().mean().item() - 0.5) < 0.02
    crop = draw("crop", 100, 8, seeded(0), torch.device("cpu"))
    assert crop is not None
    assert crop.pad == 1
    assert not crop.flips.any()


def test_batches_normalise_and_cover_the_split_once() -> None:
    split = some_split()
    split = Split(split.images, split.labels, ((0.5, 0.4, 0.3), (0.2, 0.25, 0.5)))
    mean = np.array([0.5, 0.4, 0.3]).reshape(1, 3, 1, 1)
    deviation = np.array([0.2, 0.25, 0.5]).reshape(1, 3, 1, 1)
    expected = (split.images.numpy() / 255 - mean) / deviation
    found = list(batches(split, 16))
    assert [len(labels) for _, labels in found] == [16, 16, 16, 2]
    np.testing.assert_allclose(torch.cat([images for images, _ in found]).numpy(), expected, atol=1e-5)
    assert torch.equal(torch.cat([labels for _, labels in found]), split.labels)
    assert [len(labels) for _, labels in batches(split, 16, drop_last=True)] == [16, 16, 16]


def test_order_and_augmentation_depend_on_seed_and_epoch_only() -> None:
    split = some_split()

    def run(size: int, **options: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.rand(3)  # the global random state must not matter
        found = list(batches(split, size, shuffle=True, augment="crop-flip", **options))  # type: ignore[arg-type]
        return torch.cat([images for images, _ in found]), torch.cat([labels for _, labels in found])

    first, labels = run(16, seed=1, epoch=2)
    again, same = run(7, seed=1, epoch=2)
    assert torch.equal(first, again)
    assert torch.equal(labels, same)
    assert labels.sort().values.tolist() == split.labels.sort().values.tolist()
    for other in ({"seed": 1, "epoch": 3}, {"seed": 2, "epoch": 2}, {"seed": 2, "epoch": 1}):
        assert not torch.equal(first, run(16, **other)[0])


def test_batches_leave_the_global_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    list(batches(some_split(), 16, shuffle=True, augment="crop-flip"))
    assert torch.equal(before, torch.random.get_rng_state())


def test_dtype_and_memory_format() -> None:
    images, _ = next(batches(some_split(), 8, dtype=torch.bfloat16, channels_last=True))
    assert images.dtype == torch.bfloat16
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_refusals() -> None:
    split = some_split(4)
    with pytest.raises(ConfigError, match="augment='mirror' is not one of none, crop, crop-flip"):
        next(batches(split, 2, augment="mirror"))
    with pytest.raises(DataError, match="no images"):
        batches(split.take(torch.arange(0)), 2)
    with pytest.raises(DataError, match="batch_size=0"):
        batches(split, 0)
    with pytest.raises(DataError, match="must be uint8"):
        Split(split.images.float(), split.labels, NEUTRAL)
    with pytest.raises(DataError, match=r"labels must be int64 of shape \(4,\)"):
        Split(split.images, split.labels[:2], NEUTRAL)
    with pytest.raises(DataError, match="one for each channel"):
        Split(split.images, split.labels, ((0.0,), (1.0,)))


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_the_parts_of_a_batch_are_the_batch(augment: str) -> None:
    images = some_split(100)
    options = {"shuffle": True, "augment": augment, "seed": 3, "epoch": 2}
    whole = list(batches(images, 32, **options))  # type: ignore[arg-type]
    parts = [
        list(batches(images, 32, part=lambda n, i=i: slice(i * n // 3, (i + 1) * n // 3), **options))  # type: ignore[misc, arg-type]
        for i in range(3)
    ]
    assert [len(labels) for _, labels in whole] == [32, 32, 32, 4]
    assert [len(labels) for _, labels in parts[1]] == [11, 11, 11, 1]
    for number, (pixels, labels) in enumerate(whole):
        assert torch.equal(torch.cat([part[number][0] for part in parts]), pixels)
        assert torch.equal(torch.cat([part[number][1] for part in parts]), labels)


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_augmenting_many_batches_at_once_changes_nothing(augment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    split = some_split(100)
    singly = list(batches(split, 16, shuffle=True, augment=augment, channels_last=True))
    monkeypatch.setattr(splits, "BLOCKS", {"cpu": 50})
    together = list(batches(split, 16, shuffle=True, augment=augment, channels_last=True))
    assert [len(labels) for _, labels in together] == [16] * 6 + [4]
    for one, two in zip(singly, together, strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
        assert two[0].is_contiguous(memory_format=torch.channels_last)
