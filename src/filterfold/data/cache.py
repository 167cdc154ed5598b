"""Decoded data on disk, by fingerprint of what it was decoded from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from ..storage import read_safetensors, write_atomically
from .sources import Place
from .splits import Normalization

logger = logging.getLogger(__name__)

FORMAT = "filterfold-images-1"


@dataclass(frozen=True)
class Decoded:
    """A data set in memory: role ("train", "validation", "test") → (uint8 images, labels).

    `statistics` are the training split's mean and standard deviation.
    """

    classes: tuple[str, ...]
    splits: dict[str, tuple[Tensor, Tensor]]
    statistics: Normalization


def folder(given: Path | str | None) -> Path:
    """Where decoded data is kept: the argument, `$FILTERFOLD_CACHE`, or `~/.cache/filterfold`."""
    return Path(given or os.environ.get("FILTERFOLD_CACHE") or "~/.cache/filterfold").expanduser()


def file_for(place: Place, options: dict[str, Any], given: Path | str | None) -> Path:
    """The cache file for a place and the options that decide what its pixels become.

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


def read(path: Path) -> Decoded | None:
    """What is cached in a file, or None if there is nothing that can be used."""
    if not path.is_file():
        return None
    try:
        header, tensors = read_safetensors(path)
        described = json.loads(header[FORMAT])
        splits = {role: (tensors[f"{role}.images"], tensors[f"{role}.labels"]) for role in described["splits"]}
        mean, deviation = described["statistics"]
    except (CheckpointError, KeyError, ValueError) as error:
        logger.warning("%s is damaged and will be written anew (%s)", path, error)
        return None
    return Decoded(tuple(described["classes"]), splits, (tuple(mean), tuple(deviation)))


def write(path: Path, decoded: Decoded) -> None:
    """Keep decoded data; a cache that can't be written only costs time, so it is logged and let be."""
    tensors = {}
    for role, (images, labels) in decoded.splits.items():
        tensors[f"{role}.images"], tensors[f"{role}.labels"] = images.contiguous(), labels
    described = {"classes": decoded.classes, "splits": list(decoded.splits), "statistics": decoded.statistics}
    try:
        write_atomically(path, lambda temporary: save_file(tensors, temporary, {FORMAT: json.dumps(described)}))
    except OSError as error:
        logger.warning("decoded images can't be cached at %s (%s); they will be decoded again next time", path, error)
