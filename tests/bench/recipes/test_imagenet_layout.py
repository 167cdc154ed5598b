"""ResNet-34's recipe, end to end, on a small folder of photographs-like images that is streamed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from filterfold import data
from filterfold.bench import recipes
from filterfold.bench.recipes import trials as recipe_runs
from filterfold.bench.trials.context import RunContext
from filterfold.bench.trials.runner import compare
from filterfold.data import StreamedSplit
from filterfold.surgery.checkpoint import load

COLOURS = {"blue": (30, 60, 220), "green": (40, 200, 60), "red": (220, 40, 30)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train/ and val/ with one folder a class, images of several sizes, as ImageNet has them."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for name, colour in COLOURS.items():
            place = tmp_path / "images" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                height, width = generator.integers(60, 120, 2)
                noise = generator.normal(0, 40, (height, width, 3))
                pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.jpg")
    return tmp_path / "images"


@pytest.mark.slow
def test_resnet34_trains_is_pruned_by_its_shortcut_and_trains_again(folder: Path, tmp_path: Path) -> None:
    options = {"memory_limit": 0, "workers": 0, "image_size": 64}
    loaded = data.load(str(folder), **options)
    assert isinstance(loaded.train, StreamedSplit)
    assert loaded.augment == "resized-crop-flip"
    recipe = recipes.load("resnet34-c")
    small = replace(recipe, base={**recipe.base, "batch_size": 12, "lr": 0.02})
    chosen = recipe_runs.setting(small, data=str(folder), data_options=options, epochs_scale=0.01)
    assert (chosen.recipe["epochs"], chosen.retrain_epochs, chosen.follow) == (1, 1, "shortcut")
    trials = recipe_runs.comparison(small, chosen, scratch=False)
    outcome = compare(trials, tmp_path / "run", device="cpu", timing_rounds=1, batch_sizes=[])
    assert outcome.complete, [record["reason"] for record in outcome.failed]
    bench = RunContext(chosen, tmp_path / "run", "cpu")
    networks = recipe_runs.counted(small, outcome.records, bench)
    dense, pruned = (one.weights for one in networks)
    assert 1 - pruned / dense == pytest.approx(0.072 * 21.6 / 21.1, abs=0.002)  # of 1000 classes, 3 are left
    model = load(bench.model_file(outcome.records[1]["id"]), bench.build)
    assert model.get_parameter("layer3.0.downsample.0.weight").shape[0] == 204
    assert [row["phase"] for row in outcome.records[1]["history"]] == ["train", "retrain"]
