"""Lets a CUDA build of torchvision import beside a CPU build of torch."""

from __future__ import annotations

import importlib.util
import re
from contextlib import suppress
from pathlib import Path

import torch

_LIBRARIES: list[torch.library.Library] = []
"""Kept, since a library's definitions live as long as it does."""


def declare_missing_operators() -> None:
    """Declare the operators that torchvision registers kernels for but that its binary could not bring.

    Where torchvision's compiled library does not match torch (no CUDA), its operators stay undeclared
    and `import torchvision` fails in `_meta_registrations.py`; no classification or segmentation network uses
    them, so their schemas don't matter. Call it before torchvision is first imported; calling it again does nothing.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or torch.cuda.is_available():
        return
    for binary in Path(spec.origin).parent.glob("_C*"):
        with suppress(OSError):
            torch.ops.load_library(binary)  # it matches torch, and torchvision finds it loaded
    names: set[str] = set()
    for file in ("_meta_registrations.py", "_autograd_registrations.py"):
        path = Path(spec.origin).with_name(file)
        if path.exists():
            names |= set(re.findall(r"torchvision::(\w+)", path.read_text()))
            names |= set(re.findall(r"register_meta\(\"(\w+)\"", path.read_text()))
    missing = [name for name in sorted(names) if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "DEF" if not _LIBRARIES else "FRAGMENT")
        for name in missing:
            library.define(f"{name}(Tensor x) -> Tensor")
        _LIBRARIES.append(library)
