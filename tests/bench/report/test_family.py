"""The page of a family: figures from the records, warnings, everything escaped, seen by a browser."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from filterfold.bench.report.family import build_family, comparison
from filterfold.profiling.latency_results import CONTROL, Latency, LatencyComparison

from .test_page import look, read_page

pytestmark = pytest.mark.slow

NAMES = ("uncut", "0.8", "0.4")
EVIL = '<script>alert("1")</script>'


def family() -> dict[str, Any]:
    """Half the work takes two thirds of the time at batch 1, and half at batch 64."""
    seconds = {1: (3e-3, 2.5e-3, 2e-3, 3.3e-3), 64: (0.1, 0.08, 0.05, 0.1)}
    rows = [
        Latency(name, size, tuple(second * (1 + 0.01 * i) for i in range(8)))
        for size, entries in seconds.items()
        for name, second in zip((*NAMES, CONTROL), entries, strict=True)
    ]
    macs = {"uncut": 10_000_000, "0.8": 8_000_000, "0.4": 5_000_000}
    timing = LatencyComparison(tuple(rows), {"device": "cpu", "threads": 2, "load": None}, macs)
    records = {
        name: {"name": name, "macs": macs[name], "parameters": macs[name] // 10, "images": 1000, **figures}
        for name, figures in {
            "uncut": {"top1": 90.0, "agreement": 100.0},
            "0.8": {"top1": 90.5, "agreement": 97.0},
            "0.4": {
                "top1": 80.0,
                "agreement": 85.0,
                "training": {"epochs": 3, "seconds": 1.0},
                "before_training": {"top1": 60.0},
            },
        }.items()
    }
    return {
        "settings": {"model": EVIL, "seed": 0, "data_options": {"train_limit": 400}},
        "uncut": records["uncut"],
        "children": [records["0.8"], records["0.4"]],
        "timing": {**timing.to_dict(), "environment": {"torch": "2.13"}},
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    return build_family(family(), folder, lambda file: (f"load {file.name}", f"evaluate {EVIL} {file.name}"), EVIL)


def test_figures_of_the_table() -> None:
    rows = list(csv.DictReader(comparison(family()).csv().splitlines()))
    assert [row["Share of the MACs"] for row in rows] == list(NAMES)
    assert [float(row["Agreement, %"]) for row in rows] == [100, 97, 85]
    assert [round(float(row["Speed-up, batch 1"]), 3) for row in rows] == [1, 1.2, 1.5]
    assert [round(float(row["Speed-up, batch 64"]), 3) for row in rows] == [1, 1.25, 2]
    assert [float(row["MACs ratio"]) for row in rows] == [1, 1.25, 2]


def test_the_page_says_what_the_records_say(page: Path) -> None:
    reader = read_page(page)
    text = " ".join("".join(reader.text).split())
    assert "With 50 % of the multiply-accumulates the smallest child is 1.50× as fast at batch 1" in text
    assert "Its top-1 is 80.00 % (−10.00 points); it gives the uncut network’s class on 85.00 %" in text
    assert "5.00 M MACs (50.0 %), 500 k parameters (50.0 %); 3 epochs of training, from 60.00 % top-1." in text
    assert "batch 1: the A/A control gives 0.91x; the machine is too unsteady" in text
    assert "load macs-0.4.safetensors" in text
    assert "script" not in reader.tags
    assert text.count(EVIL) >= 4
    assert {"children", "warnings", "accuracy-against-speed", "comparison"} <= set(reader.ids)
    assert all(reference.startswith("#") for reference in reader.references)
    plots = {path.name for path in (page.parent / "plots").iterdir()}
    assert plots == {f"accuracy_speedup_{size}.{kind}" for size in (1, 64) for kind in ("svg", "png")}


@pytest.mark.parametrize(("width", "scheme"), [(1280, 1), (390, 1), (1280, 0)], ids=["desk", "phone", "dark"])
def test_a_browser_shows_it(page: Path, tmp_path: Path, width: int, scheme: int) -> None:
    look(page, tmp_path, width, scheme)
