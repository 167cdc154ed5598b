"""Decoding images to arrays of one size, and the cache of decoded data sets."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError, DataError
from ..utils.io import read_safetensors, write_atomically
from ..utils.progress import track
from .sources import Place
from .splits import Split

Pixels = npt.NDArray[np.uint8]


_CHUNK = 512


_THREADS_PAY_ABOVE = 16384
"""Encoded bytes above which threads help: with smaller images they mostly wait for the interpreter lock."""


def encoded(entry: Mapping[str, Any] | None, roots: tuple[Path, ...]) -> bytes:
    """The bytes of an entry {"bytes": ..., "path": ...} of an undecoded image column.

    **Arguments:** `roots`: the folders that paths may lead into.

    **Raises:** `DataError` for an empty entry, or a path out of the folder or to what is no ordinary file.
    """
    if entry is None or (entry.get("bytes") is None and not entry.get("path")):
        raise DataError("the entry is empty")
    if (content := entry.get("bytes")) is not None:
        return bytes(content)
    path = Path(os.path.abspath(entry["path"]))  # noqa: PTH100  # links in the folder are its owner's
    if not any(path.is_relative_to(root) for root in roots) or not path.is_file():
        raise DataError("its path is no ordinary file in the folder of the data set")
    return path.read_bytes()


def open_image(entry: Mapping[str, Any] | None, roots: tuple[Path, ...], hint: tuple[str, ...] | None = None) -> Any:
    """Open an entry of an undecoded image column with Pillow; `roots` as for `encoded`.

    `hint` names the likely format: trying every format in turn takes as long as decoding 32×32 pixels.
    """
    from PIL import Image, UnidentifiedImageError

    content = encoded(entry, roots)
    if hint:
        try:
            return Image.open(io.BytesIO(content), formats=hint)
        except UnidentifiedImageError:
            pass
    return Image.open(io.BytesIO(content))


def convert(image: Any, channels: int) -> Any:
    """An image in 8-bit grey or RGB; 16-bit and floating-point ones are refused."""
    if image.mode[0] in "IF":
        raise DataError(f"its mode is {image.mode}; convert such images to 8 bits first")
    if image.mode == "P" and channels == 3:  # palettes may carry transparency, which RGB can't take directly
        image = image.convert("RGBA")
    wanted = "L" if channels == 1 else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def to_array(image: Any) -> Pixels:
    """(channels, height, width), uint8."""
    array = np.asarray(image, dtype=np.uint8)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def fit(image: Any, size: int) -> Any:
    """Scale the shorter side to `size` and cut out the middle."""
    from PIL import Image

    width, height = image.size
    if (width, height) == (size, size):
        return image
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))


def unreadable(name: str, split: str, row: int, entry: Any, error: Exception) -> DataError:
    """The error for an image that can't be decoded."""
    path = entry.get("path") if isinstance(entry, Mapping) else None
    where = f" ({path})" if path else ""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(f"{name}: image {row} of split {split!r}{where} can't be read: {reason}; replace or remove it")


def decode_all(
    name: str,
    split: str,
    entries: Callable[[int, int], Sequence[Any]],
    count: int,
    *,
    channels: int,
    size: int,
    roots: tuple[Path, ...] = (),
) -> Tensor:
    """Decode a whole split.

    **Arguments:**

    - `name`, `split`: for messages.
    - `entries`: `entries(start, stop)` gives the undecoded column's entries.
    - `count`: number of rows.
    - `channels`: 1 or 3.
    - `size`: height and width; other shapes are scaled and cut.
    - `roots`: see `encoded`.

    **Returns:** uint8, shape (count, channels, size, size).

    **Raises:** `DataError` naming the row that can't be read.
    """
    images = np.empty((count, channels, size, size), dtype=np.uint8)
    hint: tuple[str, ...] | None = None

    def decode(row: int, entry: Any) -> None:
        nonlocal hint
        try:
            image = open_image(entry, roots, hint)
            if hint is None and image.format:
                hint = (image.format,)
            images[row] = to_array(fit(convert(image, channels), size))
        except Exception as error:  # Pillow's plugins raise anything, struct.error and SyntaxError included
            raise unreadable(name, split, row, entry, error) from error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in track(range(0, count, _CHUNK), f"decoding {name} {split}", -(-count // _CHUNK)):
            part = entries(start, min(start + _CHUNK, count))
            if _mean_bytes(part) > _THREADS_PAY_ABOVE:
                list(pool.map(decode, range(start, start + len(part)), part))
            else:
                for row, entry in enumerate(part, start):
                    decode(row, entry)
    return torch.from_numpy(images)


def _mean_bytes(entries: Sequence[Any]) -> float:
    sizes = [len(entry["bytes"]) if entry and entry.get("bytes") else _THREADS_PAY_ABOVE + 1 for entry in entries]
    return sum(sizes) / max(1, len(sizes))


logger = logging.getLogger(__name__)


FORMAT = "filterfold-images-1"


def folder(given: Path | str | None) -> Path:
    """Where decoded data is kept: the argument, `$FILTERFOLD_CACHE`, or `~/.cache/filterfold`."""
    return Path(given or os.environ.get("FILTERFOLD_CACHE") or "~/.cache/filterfold").expanduser()


def file_for(place: Place, options: dict[str, Any], given: Path | str | None) -> Path:
    """The cache file for a data set, and the options that its pixels depend on.

    Local data is known by its files' names, sizes and modification times, hub data by id and
    revision: what was cached from the hub is used without asking it again.
    """
    content: dict[str, Any] = {"format": FORMAT, "hub": place.hub_id, **options}
    if place.path is not None:
        root = place.path
        files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
        content["path"] = str(root)
        content["files"] = [
            [str(path.relative_to(root)), stat.st_size, stat.st_mtime_ns]
            for path, stat in ((path, path.stat()) for path in files)
        ]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    return folder(given) / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', place.name)}-{digest}.safetensors"


def read(path: Path) -> tuple[tuple[str, ...], dict[str, Split]] | None:
    """The classes and splits in a cache file, or None if it is missing or damaged."""
    if not path.is_file():
        return None
    try:
        header, tensors = read_safetensors(path)
        described = json.loads(header[FORMAT])
        mean, deviation = described["statistics"]
        statistics = tuple(mean), tuple(deviation)
        roles = described["splits"]
        splits = {role: Split(tensors[f"{role}.images"], tensors[f"{role}.labels"], statistics) for role in roles}
        return tuple(described["classes"]), splits
    except (CheckpointError, KeyError, ValueError) as error:
        logger.warning("%s is damaged and will be written anew (%s)", path, error)
        return None


def write(path: Path, classes: tuple[str, ...], splits: Mapping[str, Split]) -> None:
    """Cache decoded data. A cache that can't be written only costs time, so that is logged and not raised."""
    tensors = {}
    for role, split in splits.items():
        tensors[f"{role}.images"], tensors[f"{role}.labels"] = split.images.contiguous(), split.labels
    described = {"classes": classes, "splits": list(splits), "statistics": splits["train"].normalization}
    try:
        write_atomically(path, lambda temporary: save_file(tensors, temporary, {FORMAT: json.dumps(described)}))
    except OSError as error:
        logger.warning("decoded images can't be cached at %s (%s); they will be decoded again next time", path, error)
