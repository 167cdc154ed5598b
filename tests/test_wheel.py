"""The two wings as a user gets them: the wheel beside nothing but PyTorch, NumPy, SciPy and safetensors."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest

from filterfold.cli import LAB

from .test_floors import LAB as LAB_ROOMS

CHECKOUT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
LIBRARY = {"torch", "numpy", "scipy", "safetensors"}
IMPORTED_AS = {"pillow": "PIL", "scikit-learn": "sklearn"}

DOCTESTS = f"""
import doctest, importlib, pkgutil, filterfold
from pathlib import Path
assert Path(filterfold.__file__).is_relative_to(PREFIX), filterfold.__file__
lab, trainers = {sorted(LAB_ROOMS)!r}, ("filterfold.online.lightning", "filterfold.online.huggingface")
tried, failed = 0, []
for module in pkgutil.walk_packages(filterfold.__path__, "filterfold.", onerror=lambda name: None):
    room = module.name.split(".")[1]
    if room not in lab and module.name not in trainers:
        found = doctest.testmod(
            importlib.import_module(module.name), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
        )
        tried += found.attempted
        failed += [module.name] * found.failed
assert not failed, failed
import filterfold.data.splits
print(tried)
"""

ROUND = """
import torch, filterfold as ff
from torch.nn import functional

def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3),
        torch.nn.Flatten(), torch.nn.Linear(128, 4))

images, labels = torch.randn(16, 3, 8, 8), torch.arange(16) % 4
model = network()
ff.prune(model, images[:1], criterion="l1", keep=0.5)
ff.save(model, "small.safetensors")
small = ff.load("small.safetensors", network)
assert torch.equal(small.eval()(images), model.eval()(images))
assert small[0].out_channels == 4
online = ff.OnlineFilterClustering(
    small.train(), images[:1], torch.optim.SGD(small.parameters(), 0.05), keep=0.5,
    schedule=ff.Schedule(updates=(1,), milestones=((2, 1.0),)))
losses = []
for epoch in range(1, 21):
    loss = functional.cross_entropy(small(images), labels)
    online.optimizer.zero_grad()
    (loss + online.loss()).backward()
    online.optimizer.step()
    online.step(epoch)
    losses.append(loss.item())
assert small[0].out_channels == 2
assert losses[-1] < losses[2], losses  # after the second cut
"""


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[A-Za-z0-9_.-]+", requirement)[0].lower() for requirement in requirements}  # type: ignore[index]


def test_the_library_requires_four_packages_and_the_command_line_knows_the_others() -> None:
    assert names(PROJECT["dependencies"]) == LIBRARY
    lab = {IMPORTED_AS.get(name, name).replace("-", "_") for name in names(PROJECT["optional-dependencies"]["lab"])}
    assert set(LAB) == lab


def needed(wanted: set[str]) -> dict[str, Distribution]:
    """The installed distributions of these names, and all that they require."""
    found: dict[str, Distribution] = {}
    while wanted:
        name = wanted.pop()
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # for another system, or another version of Python
            continue
        wanted |= names([line for line in found[name].requires or [] if "extra ==" not in line]) - set(found)
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that holds the wheel, and links to just the packages that the library may have."""
    pytest.importorskip("hatchling", reason="the wheel is built offline, which needs hatchling installed")
    folder = tmp_path_factory.mktemp("wheel")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    for one in needed(set(LIBRARY)).values():
        for top in {file.parts[0] for file in one.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(one.locate_file(top))
    source = shutil.copytree(CHECKOUT / "src", folder / "checkout" / "src").parent
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    offline = ["--no-index", "--no-cache-dir"]
    subprocess.run(
        [*pip, "wheel", *offline, "--no-deps", "--no-build-isolation", "-w", folder, source], check=True, timeout=300
    )
    python = folder / "venv" / "bin" / "python"
    wheel = next(folder.glob("filterfold-*.whl"))
    subprocess.run([*pip, "--python", python, "install", *offline, wheel], check=True, timeout=300)  # with its needs
    return python


def call(*command: str | Path, at: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=400, cwd=at, env=alone, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_the_library_works_without_the_lab(bare: Path, tmp_path: Path) -> None:
    doctests = f"PREFIX = {str(bare.parents[1])!r}\n{DOCTESTS}"
    assert int(call(bare, "-c", doctests, at=tmp_path).stdout) > 100
    call(bare, "-W", "error", "-c", ROUND, at=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("command", [["filterfold", "--help"], ["python", "-m", "filterfold"], ["filterfold", "demo"]])
def test_the_command_says_what_to_install(bare: Path, tmp_path: Path, command: list[str]) -> None:
    done = call(bare.with_name(command[0]), *command[1:], at=tmp_path, code=2)
    assert done.stdout == ""
    missing = ", ".join(name for name in LAB if name not in ("filelock", "jinja2"))  # these PyTorch requires
    assert done.stderr == f"filterfold: the command line needs {missing}; install with: pip install 'filterfold[lab]'\n"
