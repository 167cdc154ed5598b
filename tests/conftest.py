"""Shared fixtures; the shim lets a CUDA build of torchvision import beside a CPU torch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from conformance.torchvision_shim import declare_missing_operators

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


declare_missing_operators()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and weights that lies beside a developer's checkout."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not (path / "data" / "cifar10").is_dir():
        pytest.skip(f"needs real data and weights, which are not at {path}")
    return path
