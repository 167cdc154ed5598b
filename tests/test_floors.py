"""The house's one-way street: a room imports from lower floors only, and `import filterfold` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "filterfold"

FLOORS: list[set[str]] = [
    {"errors", "plan", "groups", "storage", "progress", "modes", "ranks"},
    {"cost", "clustering", "stats", "structure", "zoo", "data", "replay", "recipes", "axes", "borrowing", "export"},
    {"latency"},
    {"graph", "criteria", "selection", "surgery", "verify", "judge", "oracles", "folding", "reconstruction"},
    {"prune", "online", "sensitivity", "training", "checkpoint"},
    {"experiment"},
    {"report"},
    {"cli", "__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

SIBLINGS = {
    ("storage", "errors"),
    ("plan", "errors"),
    ("groups", "plan"),
    ("ranks", "errors"),
    ("__main__", "cli"),
    ("axes", "structure"),
    ("borrowing", "structure"),
    ("cost", "structure"),
    ("export", "structure"),
    ("criteria", "reconstruction"),
    ("verify", "judge"),
    ("judge", "surgery"),
    ("judge", "oracles"),
    ("verify", "surgery"),
    ("verify", "oracles"),
}
"""Imports within one floor that are wanted, as (importer, imported)."""

ABOVE_ALL = {"__init__"}
HEAVY = (
    "torchvision",
    "timm",
    "ray",
    "onnx",
    "onnxruntime",
    "matplotlib",
    "sklearn",
    "datasets",
    "statsmodels",
    "lightning_fabric",
    "pandas",
    "scipy.stats",
)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """First-level rooms that a file imports, wherever in the file the import stands."""
    package = ("filterfold", *path.relative_to(PACKAGE).parts[:-1])
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            names = [module] if module != "filterfold" else [f"filterfold.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("filterfold.")}
    return found & set(FLOOR)


FILES = sorted(path for path in PACKAGE.rglob("*.py") if room_of(path) not in ABOVE_ALL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path) -> None:
    room = room_of(path)
    assert room in FLOOR, f"{room} is on no floor: add it to FLOORS"
    wrong = {
        other
        for other in imported_rooms(path)
        if other != room and FLOOR[other] >= FLOOR[room] and (room, other) not in SIBLINGS
    }
    assert not wrong, f"{path.name} (floor {FLOOR[room]}) imports {sorted(wrong)} from its own floor or above"


def test_no_room_is_missing_from_the_plan() -> None:
    rooms = {room_of(path) for path in FILES}
    assert rooms <= set(FLOOR)


@pytest.mark.slow
def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import sys, filterfold; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
