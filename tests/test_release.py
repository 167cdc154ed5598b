"""What a release is made of says the same everywhere, and the check before it finds what does not."""

from __future__ import annotations

import re
import runpy
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml

import filterfold

ROOT = Path(__file__).resolve().parents[1]
problem = runpy.run_path(str(ROOT / ".github" / "check_release.py"))["problem"]
FILES = ("src/filterfold/__init__.py", "CITATION.cff", "CHANGELOG.md", "pyproject.toml")


def test_the_check_before_a_release(tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)

    def change(name: str, old: str, new: str) -> None:
        text = (tmp_path / name).read_text(encoding="utf-8")
        changed = re.sub(old, new, text, flags=re.MULTILINE)
        (tmp_path / name).write_text(changed, encoding="utf-8")

    version = filterfold.__version__
    change("CHANGELOG.md", rf"^## \[{version}\].*$", f"## [{version}] - 2026-12-01")
    change("pyproject.toml", r"filterfold\.example", "filterfold.test")
    assert problem(version, tmp_path) is None
    assert problem("9.9.9", tmp_path) == f"src/filterfold/__init__.py is of version {version}, the tag of 9.9.9"
    change("pyproject.toml", r"filterfold\.test", "filterfold.example")
    assert problem(version, tmp_path).endswith("is a stand-in; give the project's own address")
    change("CHANGELOG.md", " - 2026-12-01", "")
    assert problem(version, tmp_path).startswith("CHANGELOG.md has no section")
    change("CITATION.cff", "^version: .*$", "version: 0.0.1")
    assert problem(version, tmp_path) == f"CITATION.cff is of version 0.0.1, the tag of {version}"


def test_the_workflow_tries_the_versions_of_python_that_the_package_names() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [line.rsplit(" ", 1)[1] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert workflow["jobs"]["try"]["strategy"]["matrix"]["python"] == named
    assert project["requires-python"] == f">={named[0]}"
    assert workflow["jobs"]["publish"]["needs"] == "try"
    assert workflow["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert workflow["permissions"] == {"contents": "read"}


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_issue_templates_are_forms(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert form == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "body"} <= set(form)
    assert all(entry["type"] in ("textarea", "input") and entry["attributes"]["label"] for entry in form["body"])


def test_the_citation_is_complete() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == filterfold.__version__
    assert citation["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
