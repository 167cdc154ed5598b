"""Finding a data set, its splits and its columns, through Hugging Face `datasets`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError

HUB_IDS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
"""Short names, and where their data lies on the hub."""


IMAGE_COLUMNS = ("image", "img", "images", "jpg", "png", "picture")


LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "y", "cls")


SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
"""Names that are looked for when none is given, in this order."""


@dataclass(frozen=True)
class Columns:
    """Names that the user gives where the usual ones do not fit; None: find them."""

    image: str | None = None
    label: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None


@dataclass(frozen=True)
class Place:
    """Where a data set is: a local file or folder, or an id on the hub."""

    name: str
    path: Path | None
    hub_id: str | None
    looked: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """One split as it lies in its files: rows with undecoded images, and labels as indices."""

    rows: Any
    image_column: str
    labels: Tensor


@dataclass(frozen=True)
class Opened:
    """A data set whose images are not decoded yet, and the folders in which those lie that are files of their own."""

    classes: tuple[str, ...]
    splits: dict[str, Table]
    roots: tuple[Path, ...]


def locate(source: str) -> Place:
    """Find a source: a path, a folder of that name in a known place, or else the hub.

    Known places are `$FILTERFOLD_DATA/NAME` and `./data/NAME`.
    """
    path = Path(source).expanduser()
    if path.exists() and ("/" in source or os.sep in source or path.suffix == ".parquet" or path.is_dir()):
        return Place(path.resolve().name, path.resolve(), None, (str(path),))
    if source.startswith((".", "/", "~")) or path.suffix == ".parquet":
        raise DataError(f"no data at {path}; give a Parquet file, a folder of Parquet files or images, or a hub id")
    looked = [Path("data") / source]
    if root := os.environ.get("FILTERFOLD_DATA"):
        looked.insert(0, Path(root).expanduser() / source)
    found = next((place for place in looked if place.is_dir()), None)
    if found:
        return Place(source, found.resolve(), None, (str(found),))
    hub_id = HUB_IDS.get(source, source if source.count("/") == 1 else None)
    if hub_id is None:
        raise DataError(
            f"no data set {source!r}: there is no {' or '.join(map(str, looked))}, and it is no hub id (owner/name); "
            f"known names are digits, {', '.join(HUB_IDS)}"
        )
    return Place(source, None, hub_id, tuple(map(str, looked)))


def open_place(place: Place, names: Columns, revision: str | None = None) -> Opened:
    """Open the splits, find the columns, and turn labels into indices.

    **Raises:** `DataError` naming what is missing and what is there.
    """
    sets = _load(place, revision)
    chosen = _choose_splits(place.name, sets, names)
    features = sets[chosen["train"]].features
    image = _image_column(place.name, features, names.image)
    label = _label_column(place.name, features, names.label)
    for split in chosen.values():
        for column in (image, label):
            if column not in sets[split].features:
                raise DataError(
                    f"{place.name}: split {split!r} has no column {column!r}, only {_listed(sets[split].features)}"
                )
    classes, numbers = _classes(place.name, features[label], sets[chosen["train"]].with_format(None)[label])
    splits = {}
    for role, split in chosen.items():
        labels = _indices(place.name, split, sets[split][label], numbers, len(classes))
        splits[role] = Table(_undecoded(sets[split], image), image, labels)
    return Opened(classes, splits, _roots(place))


def _roots(place: Place) -> tuple[Path, ...]:
    """Where the files of a data set are: in its own folder; what comes from the hub, in the folders kept for that."""
    if place.path is not None:
        return (place.path if place.path.is_dir() else place.path.parent,)
    import datasets

    kept = datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH
    return tuple(Path(os.path.abspath(folder)) for folder in kept)  # noqa: PTH100  # as paths in the rows are


def _load(place: Place, revision: str | None) -> Mapping[str, Any]:
    import datasets

    try:
        with _quiet():
            if place.path is None:
                found = datasets.load_dataset(place.hub_id, revision=revision)
            elif place.path.is_file():
                found = datasets.load_dataset("parquet", data_files=str(place.path))
            else:
                found = datasets.load_dataset(str(place.path))
    except Exception as error:  # network, cache, format: `datasets` has no common base class
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        if place.path is not None:
            raise DataError(
                f"{place.path}: no Parquet or image data that can be read ({type(error).__name__}: {reason})"
            ) from error
        raise DataError(
            f"{place.name}: not in {' or '.join(place.looked)}, and {place.hub_id} could not be had from the hub "
            f"({type(error).__name__}: {reason}); put its Parquet files there, set FILTERFOLD_DATA, or go online once"
        ) from error
    return dict(found)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of `datasets`: the command line draws its own."""
    import datasets

    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not shown:
            datasets.enable_progress_bars()


def _choose_splits(name: str, sets: Mapping[str, Any], names: Columns) -> dict[str, str]:
    chosen = {}
    given = {role: value for role in SPLITS if (value := getattr(names, role)) is not None}
    for role, usual in SPLITS.items():
        if role in given and given[role] not in sets:
            raise DataError(f"{name}: no split {given[role]!r}; there are {_listed(sets)}")
        free = [candidate for candidate in usual if candidate in sets and candidate not in given.values()]
        found = given.get(role) or next(iter(free), None)
        if found is not None:
            chosen[role] = found
    if "train" not in chosen:
        left = [split for split in sets if split not in chosen.values()]
        if len(left) != 1:
            raise DataError(f"{name}: no training split among {_listed(sets)}; name it with train_split")
        chosen["train"] = left[0]
    if "test" not in chosen and "validation" in chosen:
        chosen["test"] = chosen.pop("validation")
    return chosen


def _image_column(name: str, features: Mapping[str, Any], given: str | None) -> str:
    import datasets

    images = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    if given is not None:
        kind = _given(name, features, given)
        if given not in images and not _encoded(kind):
            raise DataError(f"{name}: column {given!r} holds no images but {kind}")
        return given
    usual = [column for column in IMAGE_COLUMNS if column in images or _encoded(features.get(column))]
    if len(images) == 1 or usual:
        return images[0] if len(images) == 1 else usual[0]
    raise DataError(f"{name}: which column holds the images? There are {_listed(features)}; name it with image_column")


def _given(name: str, features: Mapping[str, Any], column: str) -> Any:
    """The kind of a column that the user names."""
    if column not in features:
        raise DataError(f"{name}: no column {column!r}; there are {_listed(features)}")
    return features[column]


def _encoded(kind: Any) -> bool:
    """Whether a column without a schema holds structs {bytes, path}, which is how images are stored."""
    return isinstance(kind, dict) and {"bytes", "path"} <= set(kind)


def _label_column(name: str, features: Mapping[str, Any], given: str | None) -> str:
    import datasets

    if given is not None:
        _given(name, features, given)
        return given
    usual = [column for column in LABEL_COLUMNS if column in features]
    labels = [column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if usual or len(labels) == 1:
        return usual[0] if usual else labels[0]
    raise DataError(f"{name}: which column holds the labels? There are {_listed(features)}; name it with label_column")


def _classes(name: str, kind: Any, values: Any) -> tuple[tuple[str, ...], dict[Any, int] | None]:
    """Class names, and the index of every label value; None where labels are indices already."""
    names = getattr(kind, "names", None)
    if names:
        return tuple(names), None
    found = set(values) if all(isinstance(value, int | str) for value in values) else set()
    if not found:
        raise DataError(f"{name}: labels must be integers or strings, not {kind}; name the column with label_column")
    ordered = sorted(found)
    return tuple(map(str, ordered)), {value: index for index, value in enumerate(ordered)}


def _indices(name: str, split: str, values: Any, numbers: dict[Any, int] | None, classes: int) -> Tensor:
    listed = list(values)
    if numbers is not None:
        strange = next((value for value in listed if value not in numbers), None)
        if strange is not None:
            raise DataError(f"{name}: split {split!r} has label {strange!r}, which never occurs in training")
        return torch.tensor([numbers[value] for value in listed], dtype=torch.int64)
    row = next((r for r, value in enumerate(listed) if value is None or not 0 <= value < classes), None)
    if row is not None:
        raise DataError(
            f"{name}: row {row} of split {split!r} has label {listed[row]}, outside 0..{classes - 1} "
            f"(an unlabelled split? choose another one)"
        )
    return torch.tensor(listed, dtype=torch.int64)


def _undecoded(rows: Any, column: str) -> Any:
    import datasets

    if isinstance(rows.features[column], datasets.Image):
        return rows.cast_column(column, datasets.Image(decode=False))
    return rows


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, names)) or "none"
