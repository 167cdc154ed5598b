"""Images and tables that are damaged, odd or hostile: read as they should be, or refused by name."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from filterfold.data import batches, load
from filterfold.errors import DataError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def own_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("FILTERFOLD_CACHE", str(tmp_path / "cache"))


def drawn(mode: str = "RGB", size: tuple[int, int] = (12, 12), form: str = "PNG", **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    held = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(held, form, **options)
    return held.getvalue()


def of_size(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and is not."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def deep() -> bytes:
    held = io.BytesIO()
    Image.fromarray(np.zeros((12, 12), np.uint16)).save(held, "PNG")
    return held.getvalue()


READ = {
    "CMYK": drawn("CMYK", form="JPEG"), "YCbCr": drawn("YCbCr", form="JPEG"), "palette": drawn("P"),
    "palette with transparency": drawn("P", transparency=0), "alpha": drawn("RGBA"), "grey with alpha": drawn("LA"),
    "one bit": drawn("1"), "WebP": drawn(form="WEBP"), "one pixel": drawn(size=(1, 1)), "a line": drawn(size=(500, 1)),
    "animated": drawn(form="GIF", save_all=True, append_images=[Image.new("RGB", (12, 12))]),
}  # fmt: skip
REFUSED = {
    "truncated": drawn()[:80], "empty": b"", "text": b"hello", "16 bits": deep(), "no pixels": of_size(0, 0),
    "a bomb": of_size(60_000, 60_000), "the largest bomb": of_size(2**31 - 1, 2**31 - 1),
}  # fmt: skip


def folder(path: Path, odd: bytes) -> Path:
    for kind in ("a", "b"):
        (path / "train" / kind).mkdir(parents=True)
        for number in range(3):
            (path / "train" / kind / f"{number}.png").write_bytes(drawn())
    (path / "train" / "b" / "1.png").write_bytes(odd)
    return path


def read(path: Path, memory: int) -> int:
    """Images that come out."""
    data = load(str(path), validation=0, image_size=8, memory_limit=memory, workers=0)
    return sum(len(labels) for part in (data.train, data.test) for _, labels in batches(part, 4, augment="none"))


@pytest.mark.parametrize("memory", [1 << 30, 0], ids=["in memory", "streamed"])
@pytest.mark.parametrize("case", [*READ, *REFUSED])
def test_odd_images(tmp_path: Path, case: str, memory: int) -> None:
    place = folder(tmp_path / "set", (READ | REFUSED)[case])
    if case in READ:
        assert read(place, memory) == 6
        return
    with pytest.raises(DataError, match=r"image 4 of split 'train' \(.*/set/train/b/1.png\) can't be read: ") as caught:
        read(place, memory)
    assert "\n" not in str(caught.value)


def table(path: Path, entry: dict[str, Any], labels: list[Any], kind: Any) -> Path:
    path.mkdir()
    image = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    rows = {"img": [*[{"bytes": drawn(), "path": None}] * 5, entry], "label": labels}
    made = datasets.Dataset.from_dict(rows, features=datasets.Features({"img": image, "label": kind}))
    made.to_parquet(str(path / "train.parquet"))
    return path


def test_a_cell_opens_ordinary_files_of_its_folder_only(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["a", "b"])
    (tmp_path / "secret.png").write_bytes(drawn())
    os.mkfifo(tmp_path / "pipe")
    outside = ("/etc/passwd", "/dev/zero", "/tmp", "http://localhost/x.png", "zip://x::y", "a\0b", "")
    for number, path in enumerate((*outside, str(tmp_path / "pipe"), str(tmp_path / "secret.png"), "../secret.png")):
        place = table(tmp_path / str(number), {"bytes": None, "path": path}, [0, 1] * 3, names)
        for memory in (1 << 30, 0):
            with pytest.raises(DataError, match=r"image 5 of split 'train'.* can't be read: "):
                read(place, memory)
    place = tmp_path / "inside"
    table(place, {"bytes": None, "path": str(place / "own.png")}, [0, 1] * 3, names)
    (place / "own.png").write_bytes(drawn())
    assert read(place, 1 << 30) == 6


@pytest.mark.parametrize(
    ("last", "kind"),
    [
        (-1, "class"), (None, "class"), (None, "int64"), (0.5, "float32"), (float("nan"), "float32"), (None, "string"),
        ([0], "list"),
    ],
)  # fmt: skip
def test_labels_that_are_none(tmp_path: Path, last: Any, kind: str) -> None:
    types = {"class": datasets.ClassLabel(names=["a", "b"]), "list": datasets.Sequence(datasets.Value("int64"))}
    first = {"string": ["a", "b", "a", "b", "a"], "list": [[0]] * 5}.get(kind, [0, 1, 0, 1, 0])
    good = {"bytes": drawn(), "path": None}
    place = table(tmp_path / "set", good, [*first, last], types.get(kind) or datasets.Value(kind))
    with pytest.raises(DataError) as caught:
        read(place, 1 << 30)
    assert "\n" not in str(caught.value)
