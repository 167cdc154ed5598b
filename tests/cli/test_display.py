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


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_what_has_no_room_beside_goes_below_and_names_break(monkeypatch, width):
    monkeypatch.setattr(console, "_width", width)
    name = "online-keep0.5-s0-f13fb404d4.safetensors"
    heads = ["speed-up", "95 %", "MACs", "median ms", "95 % interval", "p90 ms", "examples/s", "10,000 images, s"]
    figures = ["2.75x", "1.29-52.56", "3.95x", "10.935", "14.132-151.053", "102.719", "18,706", "3.123"]
    with console.capture() as capture:
        table("Time of calls", ["model", "batch", *heads], [[name, "64", *figures]], texts=2)
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    assert all(figure in words for figure in figures)
    assert all(word in words for head in heads for word in head.split())
    letters = "".join(words)
    assert name[:20] in letters
    assert letters.count("batch") == {60: 4, 80: 2, 100: 2, 140: 1}[width]
