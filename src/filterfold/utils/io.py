"""Writing files atomically, and reading them without executing anything.

Trees of tensors and plain values go into one safetensors file: tensors by path, the rest as JSON
in the header. There is no pickle anywhere.
"""

from __future__ import annotations

import glob
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from errno import EISDIR
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError, OutputError, one_line, pass_on_exhaustion

_TENSOR = "__tensor__"


_TUPLE = "__tuple__"


_INT_KEYS = "__int_keys__"


CHECKSUM = "checksum"
"""Entry of a header. Files without it are from versions that wrote none, or from others."""


_PART = ".part"
"""How the names of temporary files end."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)` and move the result to `path`: readers see the old file or the new one.

    What writers of the same file left behind when they were killed is removed: temporary files that nobody holds.

    **Raises:** `OutputError` naming the path, if it can't be written.
    """
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*{_PART}"):
            _remove_unless_held(leftover)
        _write_and_move(path, write)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise OutputError(f"{path}: can't be written ({reason})") from error


def check_output(path: Path, *, folder: bool) -> None:
    """Find out before any work whether a file or folder can be written; nothing is changed.

    **Raises:** `OutputError` naming the path.
    """
    with _told(path):
        if folder and path.is_symlink():
            path.stat()
        if not folder and path.is_dir():
            raise IsADirectoryError(EISDIR, "it is a folder")
        place = path if folder else path.parent
        while not os.path.lexists(place):
            place = place.parent
        Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=place)).rmdir()


def _write_and_move(path: Path, write: Callable[[Path], object]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PART)
    temporary = Path(name)
    try:
        _hold(handle)
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        os.close(handle)
        temporary.unlink(missing_ok=True)


def _hold(handle: int) -> bool:
    """Lock an open file, until it is closed or its process ends; whether that could be done."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # somebody holds it, or the file system knows no locks
        return False
    return True


def _remove_unless_held(temporary: Path) -> None:
    with suppress(OSError), temporary.open("rb") as file:
        if _hold(file.fileno()):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented for people."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def save_tree(path: Path, tree: Any) -> None:
    """Write nested dicts, lists and tuples of tensors, numbers, strings, booleans and None.

    Atomic. Dictionary keys are strings or ints (optimizer states have int keys). Tensors are
    written contiguous and on their own, so shared storage does not survive.
    """
    tensors: dict[str, Tensor] = {}

    def take_apart(value: Any, where: str) -> Any:
        """The value with every tensor replaced by the name under which it is in `tensors`."""
        if isinstance(value, Tensor):
            tensors[where] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {_TENSOR: where}
        if isinstance(value, dict):
            parts = {str(key): take_apart(item, f"{where}/{key}") for key, item in value.items()}
            return {_INT_KEYS: parts} if value and all(isinstance(key, int) for key in value) else parts
        if isinstance(value, list | tuple):
            items = [take_apart(item, f"{where}/{index}") for index, item in enumerate(value)]
            return {_TUPLE: items} if isinstance(value, tuple) else items
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"{where or 'the tree'}: can't store a {type(value).__name__}")

    write_tensors(path, tensors, {"format": "filterfold-tree-1", "tree": json.dumps(take_apart(tree, ""))})


def load_tree(path: Path, device: str | torch.device = "cpu") -> Any:
    """Read what `save_tree` wrote. Raises `CheckpointError` if the file is missing, cut off or foreign."""
    header, tensors = read_safetensors(path, device)
    if header.get("format") != "filterfold-tree-1":
        raise CheckpointError(f"{path}: a safetensors file, but not one of Filterfold's training states")
    with damage_told(path, "damaged training state"):
        return _put_together(json.loads(header["tree"]), tensors)


@contextmanager
def damage_told(path: Path, what: str) -> Iterator[None]:
    """What goes wrong with the content of a damaged file is a `CheckpointError` that names it."""
    try:
        yield
    except (CheckpointError, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever Python or PyTorch makes of values that are not what they should be
        pass_on_exhaustion(error)
        raise CheckpointError(f"{path}: {what}: {one_line(error)}") from error


def write_tensors(path: Path, tensors: dict[str, Tensor], header: Mapping[str, str]) -> None:
    """Write a safetensors file, atomically, with a checksum of all that is in it."""
    checked = {**header, CHECKSUM: _checksum(header, tensors)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=checked))


def _checksum(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of the header's entries and the tensors' names, shapes, types and bytes."""
    found = zlib.crc32(repr(sorted((key, text) for key, text in header.items() if key != CHECKSUM)).encode())
    for name, tensor in sorted(tensors.items()):
        found = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), found)
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found = zlib.crc32(content.numpy().data, found) if len(content) else found
    return f"{found:08x}"


def read_safetensors(path: Path, device: str | torch.device = "cpu") -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header metadata and tensors of a safetensors file; `CheckpointError` if it can't be read or is damaged."""
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header, tensors = dict(file.metadata() or {}), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: not a whole safetensors file ({reason})") from error
    if CHECKSUM in header and header[CHECKSUM] != _checksum(header, tensors):
        raise CheckpointError(f"{path}: damaged: its content does not match its checksum; take another copy of it")
    return header, tensors


def _put_together(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_put_together(item, tensors) for item in value]
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        if set(value) == {_TUPLE}:
            return tuple(_put_together(item, tensors) for item in value[_TUPLE])
        if set(value) == {_INT_KEYS}:
            return {int(key): _put_together(item, tensors) for key, item in value[_INT_KEYS].items()}
        return {key: _put_together(item, tensors) for key, item in value.items()}
    return value
