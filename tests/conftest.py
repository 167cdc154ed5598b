"""Shared fixtures, and the shim that lets a CUDA build of torchvision import beside a CPU torch."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


def _declare_missing_torchvision_operators() -> list[torch.library.Library]:
    """Declare the operators that torchvision registers kernels for but that its binary could not bring.

    Where torchvision's compiled library does not match torch (no CUDA), its operators stay undeclared
    and `import torchvision` fails in `_meta_registrations.py`; their schemas don't matter to any test.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or torch.cuda.is_available():
        return []
    names: set[str] = set()
    for file in ("_meta_registrations.py", "_autograd_registrations.py"):
        path = Path(spec.origin).with_name(file)
        if path.exists():
            names |= set(re.findall(r"torchvision::(\w+)", path.read_text()))
            names |= set(re.findall(r"register_meta\(\"(\w+)\"", path.read_text()))
    library = torch.library.Library("torchvision", "DEF")
    for name in sorted(names):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor x) -> Tensor")
    return [library]


_LIBRARIES = _declare_missing_torchvision_operators()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and weights that lies beside a developer's checkout."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not (path / "data" / "cifar10").is_dir():
        pytest.skip(f"needs real data and weights, which are not at {path}")
    return path
