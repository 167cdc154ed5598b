"""Loading: embedded digits, real CIFAR-10, and small Parquet and image folders made here."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from filterfold.data import ImageData, Split, StreamedSplit, batches, load
from filterfold.errors import ConfigError, DataError, FilterfoldError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def own_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("FILTERFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FILTERFOLD_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


def pictures(count: int, size: int = 12, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(count)]


def png(array: np.ndarray, mode: str = "RGB") -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(array).convert(mode).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_parquet(
    path: Path,
    images: Sequence[Any],
    labels: Sequence[Any],
    names: Sequence[str] | None = ("cat", "dog"),
    columns: tuple[str, str] = ("img", "label"),
) -> None:
    kind = (
        datasets.ClassLabel(names=list(names))
        if names
        else datasets.Value("string" if isinstance(labels[0], str) else "int64")
    )
    features = datasets.Features({columns[0]: datasets.Image(), columns[1]: kind})
    rows = datasets.Dataset.from_dict({columns[0]: list(images), columns[1]: list(labels)}, features=features)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(str(path))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Parquet folder with 20 training and 6 test images of two classes."""
    write_parquet(tmp_path / "pets" / "train.parquet", [png(p) for p in pictures(20)], [0, 1] * 10)
    write_parquet(tmp_path / "pets" / "test.parquet", [png(p) for p in pictures(6, seed=1)], [0, 1] * 3)
    return tmp_path / "pets"


def whole(data: ImageData) -> torch.Tensor:
    assert isinstance(data.train, Split)
    return data.train.images


def test_digits_equal_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    data = load("digits")
    parts = [data.train, data.validation, data.test]
    assert [len(part) for part in parts] == [1294, 144, 359]
    assert (data.channels, data.image_size, data.classes, data.augment) == (1, 8, tuple("0123456789"), "crop")
    found = sorted(
        (tuple(image.flatten().tolist()), int(label))
        for part in parts
        for image, label in zip(part.images, part.labels, strict=True)  # type: ignore[attr-defined]
    )
    raw = load_digits()
    expected = np.rint(raw.images * 255 / 16).astype(int).reshape(len(raw.images), -1)
    assert found == sorted((tuple(i.tolist()), int(k)) for i, k in zip(expected, raw.target, strict=True))
    for part in parts:
        counts = torch.bincount(part.labels)
        assert counts.max() - counts.min() <= 0.15 * counts.float().mean()


def test_the_split_follows_its_own_seed_and_the_test_set_none() -> None:
    first, again, other = load("digits"), load("digits"), load("digits", seed=1)
    assert torch.equal(whole(first), whole(again))
    assert not torch.equal(first.validation.images, other.validation.images)  # type: ignore[attr-defined]
    assert torch.equal(first.test.images, other.test.images)  # type: ignore[attr-defined]


def test_train_limit_and_validation_sizes() -> None:
    data = load("digits", validation=100, train_limit=200)
    assert (len(data.train), len(data.validation)) == (200, 100)
    assert torch.bincount(data.train.labels).tolist() == [20] * 10
    assert torch.equal(data.validation.images, load("digits", validation=100).validation.images)  # type: ignore[attr-defined]
    assert len(load("digits", validation=0).validation) == 0


def test_cifar10_is_the_official_one(shared: Path, request: pytest.FixtureRequest) -> None:
    cache = request.config.cache.mkdir("filterfold")  # type: ignore[union-attr]
    data = load(str(shared / "data" / "cifar10"), cache_dir=cache)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [45000, 5000, 10000]
    assert torch.bincount(data.validation.labels).tolist() == [500] * 10
    assert data.classes[0] == "airplane"
    mean, deviation = data.train.normalization
    assert mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=6e-5)
    assert deviation == pytest.approx((0.2470, 0.2435, 0.2616), abs=6e-5)


def test_a_parquet_folder_round_trips_and_is_cached(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = load(str(folder), validation=0)
    expected = torch.from_numpy(np.stack(pictures(20))).permute(0, 3, 1, 2)
    assert torch.equal(whole(data), expected)
    assert data.train.labels.tolist() == [0, 1] * 10
    assert (data.name, data.classes, data.channels, data.image_size) == ("pets", ("cat", "dog"), 3, 12)
    scaled = expected.double() / 255
    assert data.train.normalization[0] == pytest.approx(scaled.mean((0, 2, 3)).tolist())
    assert data.train.normalization[1] == pytest.approx(scaled.std((0, 2, 3), correction=0).tolist())
    (cached,) = (folder.parent / "cache").glob("pets-*.safetensors")
    stamp = cached.stat().st_mtime_ns
    again = load(str(folder), validation=0)
    assert torch.equal(whole(again), expected)
    assert again.train.normalization == data.train.normalization
    assert cached.stat().st_mtime_ns == stamp
    cached.write_bytes(cached.read_bytes()[:1000])
    with caplog.at_level(logging.WARNING):
        assert torch.equal(whole(load(str(folder), validation=0)), expected)
    assert "damaged" in caplog.text


def test_changed_files_are_decoded_anew(folder: Path) -> None:
    load(str(folder))
    write_parquet(folder / "train.parquet", [png(p) for p in pictures(20, seed=5)], [0, 1] * 10)
    expected = torch.from_numpy(np.stack(pictures(20, seed=5))).permute(0, 3, 1, 2)
    assert torch.equal(whole(load(str(folder), validation=0)), expected)


def test_names_are_looked_for_in_known_places(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FILTERFOLD_DATA", str(folder.parent))
    assert load("pets").name == "pets"
    monkeypatch.delenv("FILTERFOLD_DATA")
    (folder.parent / "data").mkdir()
    folder.rename(folder.parent / "data" / "cifar100")
    assert len(load("cifar100").test) == 6


def test_a_single_file_without_a_test_split(folder: Path) -> None:
    data = load(str(folder / "train.parquet"), validation=0)
    assert (len(data.train), len(data.test)) == (16, 4)
    assert torch.bincount(data.test.labels).tolist() == [2, 2]


def test_an_image_folder(tmp_path: Path) -> None:
    for split, count in (("train", 5), ("val", 2)):
        for index, kind in enumerate(("ant", "bee")):
            for number, array in enumerate(pictures(count, 10, seed=index)):
                path = tmp_path / "insects" / split / kind / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    data = load(str(tmp_path / "insects"))
    assert data.classes == ("ant", "bee")
    assert [len(part) for part in (data.train, data.validation, data.test)] == [9, 1, 4]


def test_odd_columns_splits_and_string_labels(tmp_path: Path) -> None:
    names = ("view", "species")
    write_parquet(tmp_path / "x" / "train.parquet", [png(p) for p in pictures(8)], ["b", "a"] * 4, None, names)
    write_parquet(tmp_path / "x" / "validation.parquet", [png(p) for p in pictures(4)], ["b", "a"] * 2, None, names)
    write_parquet(tmp_path / "x" / "test.parquet", [png(p) for p in pictures(2)], ["a", "b"], None, names)
    data = load(str(tmp_path / "x"), label_column="species")
    assert data.classes == ("a", "b")
    assert data.train.labels.tolist() == [1, 0] * 4
    assert [len(part) for part in (data.train, data.validation, data.test)] == [8, 4, 2]
    swapped = load(str(tmp_path / "x"), label_column="species", test_split="validation", validation=0)
    assert [len(part) for part in (swapped.train, swapped.validation, swapped.test)] == [8, 0, 4]
    with pytest.raises(DataError, match="which column holds the labels"):
        load(str(tmp_path / "x"))


def test_grey_images_and_scaling(tmp_path: Path) -> None:
    grey = [png(array, "L") for array in pictures(8, 16)]
    write_parquet(tmp_path / "grey" / "train.parquet", grey, [0, 1] * 4)
    data = load(str(tmp_path / "grey"), validation=0, image_size=8)
    assert (data.channels, data.image_size, data.augment) == (1, 8, "crop")
    assert load(str(tmp_path / "grey"), validation=0, channels=3).channels == 3
    assert load(str(tmp_path / "grey"), validation=0, augment="none").augment == "none"


def test_normalization_is_an_option(folder: Path) -> None:
    data = load(str(folder), normalization="imagenet")
    assert data.test.normalization == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert load(str(folder), normalization=([0, 0, 0], [1, 1, 1])).test.normalization[1] == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_gives_the_same_images_and_labels(folder: Path, workers: int) -> None:
    held = load(str(folder), image_size=12, validation=0.2)
    data = load(str(folder), image_size=14, validation=0.2, memory_limit=0, workers=workers)
    assert isinstance(data.train, StreamedSplit)
    assert data.augment == "resized-crop-flip"
    assert torch.equal(data.train.labels, held.train.labels)
    assert data.train.places.tolist() == [
        index for index, image in enumerate(pictures(20)) if _among(image, whole(held))
    ]
    before = torch.random.get_rng_state()
    first = list(batches(data.train, 5, shuffle=True, augment=data.augment, seed=3, epoch=1))
    again = list(batches(data.train, 8, shuffle=True, augment=data.augment, seed=3, epoch=1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert first[0][0].shape == (5, 3, 14, 14)
    assert torch.equal(torch.cat([i for i, _ in first]), torch.cat([i for i, _ in again]))
    assert torch.equal(torch.cat([k for _, k in first]), torch.cat([k for _, k in again]))
    other = next(batches(data.train, 5, shuffle=True, augment=data.augment, seed=3, epoch=2))
    assert not torch.equal(other[0], first[0][0])


def _among(image: np.ndarray, images: torch.Tensor) -> bool:
    return bool((images == torch.from_numpy(image).permute(2, 0, 1)).flatten(1).all(1).any())


def test_streamed_evaluation_is_a_scaled_centre(tmp_path: Path) -> None:
    array = np.zeros((32, 48, 3), dtype=np.uint8)
    array[2:30, 10:38] = 200  # the middle square of 28 pixels: 7/8 of the shorter side
    write_parquet(tmp_path / "one" / "train.parquet", [png(array)] * 4, [0, 1] * 2)
    write_parquet(tmp_path / "one" / "test.parquet", [png(array)] * 2, [0, 1])
    data = load(
        str(tmp_path / "one"),
        image_size=14,
        memory_limit=0,
        workers=0,
        validation=0,
        normalization=([0, 0, 0], [1, 1, 1]),
    )
    images, _ = next(batches(data.test, 2))
    torch.testing.assert_close(images, torch.full((2, 3, 14, 14), 200 / 255))
    # the mean of the data set is measured on the same crops
    assert load(str(tmp_path / "one"), image_size=14, memory_limit=0, workers=0, validation=0).train.normalization[
        0
    ] == pytest.approx([200 / 255] * 3)


def refused(source: object, **options: Any) -> str:
    with pytest.raises(FilterfoldError) as caught:
        load(str(source), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_data_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FILTERFOLD_DATA", "/nowhere")
    message = refused("cifar10")
    assert "not in /nowhere/cifar10 or data/cifar10" in message
    assert "uoft-cs/cifar10 could not be had from the hub" in message
    assert "nobody/nothing could not be had" in refused("nobody/nothing")
    assert "known names are digits, cifar10, cifar100" in refused("mnits")
    assert "no data at gone" in refused("./gone")
    (tmp_path / "empty").mkdir()
    assert "no Parquet or image data" in refused(tmp_path / "empty")


def test_wrong_columns_and_splits_list_what_there_is(folder: Path) -> None:
    assert "no column 'picture'; there are 'img', 'label'" in refused(folder, image_column="picture")
    assert "no column 'kind'; there are 'img', 'label'" in refused(folder, label_column="kind")
    assert "column 'label' holds no images" in refused(folder, image_column="label")
    assert "no split 'dev'; there are 'train', 'test'" in refused(folder, validation_split="dev")


def test_an_unreadable_image_is_named_by_its_row(folder: Path) -> None:
    rows: list[Any] = [png(p) for p in pictures(20)]
    rows[17] = {"bytes": rows[17]["bytes"][:60], "path": None}
    write_parquet(folder / "train.parquet", rows, [0, 1] * 10)
    assert "image 17 of split 'train' can't be read" in refused(folder)
    data = load(str(folder), image_size=10, memory_limit=0, workers=0, validation=0, normalization="imagenet")
    with pytest.raises(DataError, match="image 17 of split 'train' can't be read"):
        list(batches(data.train, 4))


def test_empty_classes_unlabelled_and_unknown_labels(folder: Path, tmp_path: Path) -> None:
    images = [png(p) for p in pictures(4)]
    write_parquet(tmp_path / "a" / "train.parquet", images, [0, 1, 0, 1], ("cat", "dog", "emu"))
    assert "class 'emu' has no training image" in refused(tmp_path / "a")
    write_parquet(folder / "test.parquet", images, [0, 1, -1, 1])
    assert "row 2 of split 'test' has label -1, outside 0..1" in refused(folder)
    write_parquet(tmp_path / "b" / "train.parquet", images, [3, 7, 3, 7], None)
    write_parquet(tmp_path / "b" / "test.parquet", images, [3, 7, 8, 7], None)
    assert "label 8, which never occurs in training" in refused(tmp_path / "b")


def test_images_of_several_sizes_need_a_size(tmp_path: Path) -> None:
    images = [png(p) for p in (*pictures(4, 12), *pictures(4, 10))]
    write_parquet(tmp_path / "mixed" / "train.parquet", images, [0, 1] * 4)
    assert "say which size with image_size" in refused(tmp_path / "mixed")
    assert load(str(tmp_path / "mixed"), image_size=8, validation=0).image_size == 8


def test_options_that_make_no_sense(folder: Path) -> None:
    assert "normalization='cifar'" in refused(folder, normalization="cifar")
    assert "normalization has 1 channels, the images have 3" in refused(folder, normalization=([0.5], [0.5]))
    assert "channels=4" in refused(folder, channels=4)
    assert "image_size=0" in refused(folder, image_size=0)
    assert "can't hold out 1.5" in refused(folder, validation=1.5)
    assert "1x8x8" in refused("digits", image_size=32)
    streamed = load(str(folder), memory_limit=0, workers=0, normalization="imagenet").train
    with pytest.raises(ConfigError, match="for streamed data"):
        next(batches(streamed, 2, augment="crop-flip"))


def test_a_cache_that_cannot_be_written_costs_only_time(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = folder.parent / "blocked"
    blocked.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert len(load(str(folder), cache_dir=blocked).train) == 18
    assert "can't be cached" in caplog.text
