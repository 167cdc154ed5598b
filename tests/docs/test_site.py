"""What the documentation shows is what the code does. Blocks of pages are doctests, `make docs` runs the notebooks."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_the_picture_is_what_a_trace_finds():
    assert (ROOT / "docs/pictures/labels.svg").read_text() == module("docs/pictures/labels.py").svg()


@pytest.mark.slow
def test_the_example_of_an_image_folder_runs(capsys):
    pytest.importorskip("timm")
    assert module("examples/image_folder.py").main() > 90
    assert capsys.readouterr().out.startswith("0.5: ")


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *PAGES], ids=lambda page: page.stem)
def test_links_between_files_lead_somewhere(page):
    made = ("api/", "notebooks/")  # by the site
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(made):
            assert (page.parent / target).exists(), target
