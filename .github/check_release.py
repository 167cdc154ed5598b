"""Refuse to release what is not ready: `python .github/check_release.py 0.2.0` says why in one line, or nothing."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def problem(version: str, root: Path = ROOT) -> str | None:
    """What keeps this version from being released, or None."""
    package, citation, changelog, project = (
        (root / name).read_text(encoding="utf-8")
        for name in ("src/filterfold/__init__.py", "CITATION.cff", "CHANGELOG.md", "pyproject.toml")
    )
    for name, pattern, text in (
        ("src/filterfold/__init__.py", r'^__version__ = "(.+)"$', package),
        ("CITATION.cff", r"^version: (.+)$", citation),
    ):
        found = re.search(pattern, text, re.MULTILINE)
        if found is None or found[1] != version:
            return f"{name} is of version {found and found[1]}, the tag of {version}"
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        return f"CHANGELOG.md has no section '## [{version}] - YYYY-MM-DD'"
    for name, address in tomllib.loads(project)["project"]["urls"].items():
        if re.search(r"\.example(/|$)", address):
            return f"pyproject.toml: {name} = {address} is a stand-in; give the project's own address"
    return None


if __name__ == "__main__":
    sys.exit(problem(sys.argv[1]))
