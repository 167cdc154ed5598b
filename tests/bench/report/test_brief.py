"""The page's first look and the terminal's ten lines: the winner first, its batch sizes, its files, few words."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest

from filterfold.bench.report import brief, build

pytestmark = pytest.mark.slow


def unfolded(page: str) -> str:
    """What a reader sees before opening anything: no plots, no hints for phones."""
    for hidden in (r"<style>.*?</style>", r"<svg.*?</svg>", r'<p class="cue".*?</p>'):
        page = re.sub(hidden, "", page, flags=re.DOTALL)
    page = re.sub(r"(<details[^>]*>\s*<summary>.*?</summary>).*?</details>", r"\1", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", " ", page))


@pytest.fixture
def winning(make: Any) -> list[dict[str, Any]]:
    """One setting is faster and as accurate as the control, another one is not."""
    top1 = {"dense": 90.0, "l1": 90.0, "random": 80.0}
    seconds = {"dense": 4.0, "l1": 2.0, "random": 2.0}
    made = []
    for method in ("dense", "random", "l1"):
        for seed in range(5):
            spread = 0.01 * (seed * (3 if method == "l1" else 1) % 5)
            record = make(method, seed, top1=top1[method] + spread, inference_seconds=seconds[method] + spread)
            record["timing"]["batches"] = {"1": [seconds[method] ** 0.5 * 1e-3], "64": [seconds[method] * 1e-2]}
            made.append(record)
    return made


def test_the_winner_comes_first_with_its_batch_sizes(winning: list[dict[str, Any]]) -> None:
    lines = brief(winning)
    assert "l1 wins: 1.99× faster than dense over the test set, 1.41× at batch 1, and no worse" in lines[0]
    assert [line.split()[0] for line in lines[1:4]] == ["dense", "l1", "random"]


def test_the_page_links_the_winners_networks(winning: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "l1-s0.safetensors").write_bytes(b"")
    page = build(winning, tmp_path).read_text(encoding="utf-8")
    assert '<a href="models/l1-s0.safetensors">seed 0</a>' in page
    assert "models/l1-s1.safetensors" not in page
    assert page.index("<span>l1</span>") < page.index("<span>random</span>")


def test_a_thousand_words_at_most_before_anything_is_unfolded(records: list[dict[str, Any]], tmp_path: Path) -> None:
    page = build(records, tmp_path).read_text(encoding="utf-8")
    seen = unfolded(page)
    assert len(seen.split()) <= 1000
    assert "Kruskal" not in seen
    assert "Kruskal" in page
    assert "not shown" not in seen


def test_ten_lines_in_the_terminal(records: list[dict[str, Any]]) -> None:
    assert len(brief(records)) <= 12


def test_marks_of_the_same_cost_stand_side_by_side(make: Any, tmp_path: Path) -> None:
    """Two methods of the very same MACs: their means are drawn at different places."""
    made = [make(method, seed, macs=1000, top1=90.0 + seed) for method in ("l1", "random") for seed in range(3)]
    made += [make("dense", seed, macs=3000, top1=91.0 + seed) for seed in range(3)]
    build(made, tmp_path)
    plot = (tmp_path / "plots" / "accuracy_macs.svg").read_text(encoding="utf-8")
    places = re.findall(r'<use xlink:href="#[^"]*" x="([\d.]+)"', plot)
    ours = sorted({round(float(x)) for x in places if float(x) < 150})
    assert len(ours) >= 2
    assert "side by side" in (tmp_path / "report.html").read_text(encoding="utf-8")
