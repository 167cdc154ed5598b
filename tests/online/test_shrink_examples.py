"""The examples of families run, at a small size: a segmentation network, a detector, EfficientNet-Lite0."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

SIZES: dict[str, dict[str, Any]] = {
    "shrink_segmentation": {"epochs": 3, "images": 32},
    "shrink_detector": {"epochs": 3, "images": 64},
    "shrink_efficientnet_lite0": {"epochs": 1, "images": 32, "size": 64},
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.slow
def test_the_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).resolve().parents[2] / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    found = example.main(**SIZES[name])
    whole = found["uncut"][0]
    assert len(found) == 3
    for share, (macs, quality) in found.items():
        if share != "uncut":
            assert 0.95 * float(share) < macs / whole <= float(share)
        assert 0 < quality <= 100
    assert capsys.readouterr().out.count("multiply-accumulates") == 3
