"""Imports run downwards only, the library wing knows nothing of the lab, and `import filterfold` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "filterfold"

FLOORS: list[set[str]] = [
    {"errors"},
    {"utils"},
    {"plan", "export"},
    {"profiling", "zoo", "data"},
    {"graph", "surgery"},
    {"pruning"},
    {"online", "training"},
    {"bench"},
    {"cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
LAB = {"data", "training", "bench", "cli"}
"""Rooms that need `filterfold[lab]`; the library wing, all others, needs torch, numpy, scipy and safetensors only."""

HEAVY = (
    "torchvision",
    "timm",
    "ray",
    "onnx",
    "onnxruntime",
    "openvino",
    "executorch",
    "matplotlib",
    "sklearn",
    "datasets",
    "lightning_fabric",
    "pandas",
    "typer",
    "rich",
    "scipy.stats",
)


def room_of(path: Path) -> str:
    """The first part of a file's path; `__main__.py` is the door of the command line."""
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "cli" if name == "__main__" else name


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


FILES = sorted(path for path in PACKAGE.rglob("*.py") if room_of(path) != "__init__")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path) -> None:
    room = room_of(path)
    assert room in FLOOR, f"{room} is on no floor: add it to FLOORS"
    others = imported_rooms(path) - {room}
    above = {other for other in others if FLOOR[other] >= FLOOR[room]}
    assert not above, f"{path.name} (floor {FLOOR[room]}) imports {sorted(above)} from its own floor or above"
    assert room in LAB or not others & LAB, f"{path.name} (library) imports {sorted(others & LAB)} of the lab"


def test_no_room_is_missing_from_the_plan() -> None:
    assert {room_of(path) for path in FILES} == set(FLOOR)


@pytest.mark.slow
def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import sys, filterfold; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_the_architecture_document_names_every_room() -> None:
    """Rooms, and folders in them, with the floor and the wing that the tests above hold them to."""
    document = (PACKAGE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in document.splitlines() if line.startswith("|")
    ]
    named = {row[1].strip("`"): (row[0], row[3]) for row in rows if len(row) == 4 and row[3] in ("lab", "library")}
    folders = {str(path.parent.relative_to(PACKAGE)) for path in PACKAGE.rglob("__init__.py")} - {"."}
    assert set(named) == set(FLOOR) | folders
    for name, (floor, wing) in named.items():
        room = name.split("/")[0]
        assert wing == ("lab" if room in LAB else "library"), name
        assert floor == ("" if "/" in name else str(FLOOR[room])), name
