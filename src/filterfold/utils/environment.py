"""What a result was measured with: versions, hardware, commit; recorded beside it."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("numpy", "scipy", "lightning-fabric", "datasets", "scikit-learn")


def describe(device: str = "cpu") -> dict[str, Any]:
    """Everything about this machine and this installation that a result may depend on.

    **Arguments:**

    - `device`: the device that computes, `cpu` or `cuda[:N]`.

    **Returns:** a JSON-able dictionary; `commit` and `dirty` are None outside a checkout.

    >>> sorted(describe())[:4]
    ['commit', 'cpus', 'device', 'dirty']
    """
    import torch

    from .. import __version__
    from . import distributed

    commit, dirty = _commit()
    return {
        "filterfold": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
        "commit": commit,
        "dirty": dirty,
        "packages": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
    }


def processor() -> str:
    """The CPU's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """`cpu`, or the name of the GPU.

    >>> device_name("cpu")
    'cpu'
    """
    import torch

    if device.startswith("cuda") and torch.cuda.is_available():
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return device


def command() -> str:
    """The command line of this process, as it could be typed again."""
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name  # python -m filterfold
    return shlex.join([name, *sys.argv[1:]])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> tuple[str | None, bool | None]:
    """Commit of the checkout that this very file is tracked in, and whether tracked files differ from it.

    Records under `results/` don't count: a benchmark that goes on from committed records changes them.
    """
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None, None
    status = _git(here.parent, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)results")
    return _git(here.parent, "rev-parse", "HEAD"), None if status is None else bool(status)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
