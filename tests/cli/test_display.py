from __future__ import annotations

import pytest

from filterfold.cli.display import console, table


@pytest.mark.parametrize("width", [80, 140])
def test_figures_stay_whole_at_eighty_columns(monkeypatch, width):
    monkeypatch.setattr(console, "_width", width)
    figures = ["98.61 ± 0.20", "99.89 ± 0.25", "0.0477 ± 0.0027", "313.5 M", "14.98 M", "1234 ± 12.5"]
    with console.capture() as capture:
        table(
            "A comparison",
            ["Method", "Top-1 %", "Top-5 %", "Inference s", "MACs", "Parameters", "Training s"],
            [["online-l1 keep=0.25", *figures]],
        )
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    for figure in ["online-l1", "keep=0.25", "Parameters", *" ".join(figures).split()]:
        assert figure in words
