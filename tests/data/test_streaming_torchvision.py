"""Streamed augmentation by torchvision's own transforms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from filterfold.data import StreamedSplit, batches, load
from filterfold.data.augment import seeded
from filterfold.errors import ConfigError


@pytest.fixture
def split(tmp_path: Path) -> StreamedSplit:
    generator = np.random.default_rng(0)
    for kind in ("ant", "bee"):
        (tmp_path / "x" / "train" / kind).mkdir(parents=True)
        for number in range(6):
            pixels = generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "x" / "train" / kind / f"{number}.png")
    data = load(str(tmp_path / "x"), memory_limit=0, workers=0, image_size=24, validation=0)
    assert isinstance(data.train, StreamedSplit)
    return data.train


def test_images_are_what_torchvision_makes_of_them(split: StreamedSplit) -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2")
    state = torch.get_rng_state()
    [made] = split.pixels([torch.arange(len(split))], "torchvision", seed=3, epoch=5)
    assert torch.equal(torch.get_rng_state(), state)
    transform = v2.Compose([v2.RandomResizedCrop(24), v2.RandomHorizontalFlip()])
    for index, image in enumerate(made):
        entry = split.rows[int(split.places[index])][split.image_column]
        source = Image.open(entry["path"]) if entry.get("path") else entry
        torch.manual_seed(seeded(3, 5, index, 4).initial_seed())
        assert np.array_equal(np.asarray(transform(source.convert("RGB"))).transpose(2, 0, 1), image.numpy())


def test_batches_depend_on_seed_and_epoch_alone(split: StreamedSplit) -> None:
    pytest.importorskip("torchvision.transforms.v2")
    first, again, other = (
        torch.cat([images for images, _ in batches(split, size, augment="torchvision", seed=1, epoch=epoch)])
        for size, epoch in ((4, 1), (5, 1), (4, 2))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_unknown_policies_are_refused(split: StreamedSplit) -> None:
    with pytest.raises(ConfigError, match="is not one of none, resized-crop-flip, torchvision"):
        next(iter(batches(split, 2, augment="crop")))
