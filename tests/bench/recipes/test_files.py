"""Reading recipe files, and what is refused."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from filterfold.bench import recipes
from filterfold.errors import ConfigError
from filterfold.training import Recipe

GOOD = """
name = "mine"
model = "vgg_small"
data = "digits"
[[prune]]
layers = ["features.*"]
ratio = 0.5
skip = ["features.0"]
"""


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_is_complete(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.name == name
    known = {field.name for field in fields(Recipe)}
    assert {"epochs", "lr", "schedule"} <= recipe.base.keys() <= known
    paper, cosine = recipe.retrain["paper"], recipe.retrain["cosine"]
    assert (paper["lr"], paper["schedule"]) == (0.001, "constant")
    assert paper["epochs"] == cosine["epochs"] == (20 if "34" in name else 40)
    assert (cosine["lr"], cosine["schedule"]) == (0.01, "cosine")
    assert (recipe.scratch is not None) == (recipe.paper.scratch.error is not None or "34" in name)


@pytest.mark.parametrize("name", recipes.names())
def test_what_is_written_reads_back_equal(name: str) -> None:
    recipe = recipes.load(name)
    assert recipes.read(recipes.to_toml(recipe, "two\nlines"), "text") == recipe


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(GOOD)
    recipe = recipes.load(file)
    assert recipe.keep == {"features.*": 0.5, "features.0": 1.0}
    assert (recipe.image_size, recipe.classes, recipe.criterion, recipe.scratch) == (32, 10, "l1", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("ratio = 0.5", "ratio = 1.5"), "ratio 1.5: the share of filters to remove must lie between"),
        (GOOD.replace('name = "mine"', ""), "lacks 'name'"),
        (GOOD + "[sauce]\nhot = true\n", "an entry 'sauce' of no meaning"),
        (GOOD.replace("ratio = 0.5", "ratio = "), "not a recipe"),
        (GOOD.replace("ratio = 0.5", ""), "lacks 'ratio'"),
        (GOOD.replace('layers = ["features.*"]', "layers = []"), "names no layers"),
        (GOOD + "[paper]\ndence = { error = 1.0 }\n", "an entry 'dence' of no meaning"),
        (GOOD + "[paper]\ndense = { error = 'low' }\n", "error must be a number"),
        (GOOD + "[retrain]\npaper = 3\n", "retrain.paper must be a table"),
        (GOOD + "criterium = 'l1'\n", "an entry 'criterium' of no meaning"),
        (GOOD.replace("[[prune]]", "image_size = 'big'\n[[prune]]"), "image_size must be a whole number"),
    ],
)
def test_malformed_files_are_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"^mine\.toml: ") as caught:
        recipes.read(text, "mine.toml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no recipe 'resnet56-c'; did you mean resnet56-"):
        recipes.load("resnet56-c")
    with pytest.raises(ConfigError, match="no such recipe file"):
        recipes.load("nowhere.toml")
    with pytest.raises(ConfigError, match="has no retraining 'none'; there is paper, cosine"):
        recipes.load("vgg16-a").schedule("none")
