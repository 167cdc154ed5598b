"""Shared fixtures, and the list of claims that a run did not test."""

from __future__ import annotations

import os
import random
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conformance.torchvision_shim import declare_missing_operators

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


declare_missing_operators()  # a CUDA build of torchvision then imports beside a CPU build of torch

CHECKOUT = Path(__file__).resolve().parents[1]

WHERE_TO_GET_DATA = (
    "needs data/cifar10 (the Parquet files of uoft-cs/cifar10) and weights/resnet*-cifar10.safetensors"
    " (github.com/akamaster/pytorch_resnet_cifar10) in the folder that $FILTERFOLD_DATA names; looked in {folder}"
)


@pytest.fixture(scope="session")
def shared() -> Path:
    """A folder with `data/` and `weights/`.

    `$FILTERFOLD_DATA` names it, or its `data/`, which is what the library means by that variable. Without it: `shared/`
    beside the checkout.
    """
    folder = Path(os.environ.get("FILTERFOLD_DATA") or CHECKOUT.parent / "shared").resolve()
    for root in (folder, folder.parent):
        if (root / "data" / "cifar10").is_dir() and (root / "weights").is_dir():
            return root
    pytest.skip(WHERE_TO_GET_DATA.format(folder=folder))


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder with Table 1 of Li et al. (exact counts) and the 35 trials of the document's Figures 4 and 5."""
    return CHECKOUT / "docs"


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without plots, which take longer to draw than small networks to train; for claims about anything else."""
    monkeypatch.setattr(import_module("filterfold.bench.report.build"), "all_plots", lambda *_: [])


# --- order ---------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="files in random order, and the tests of each file")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (seed := config.getoption("--shuffle")) is not None:
        rng = random.Random(seed)
        files = {item.path: rng.random() for item in items}
        items.sort(key=lambda item: (files[item.path], rng.random()))  # by file: its fixtures are made once


# --- what was not tested ------------------------------------------------------------------------

WANTS = {
    "data and weights": ("in the folder that $FILTERFOLD_DATA names",),
    "a GPU": ("needs a GPU",),
    "a browser": ("no Chromium to open the page with",),
    "a package that make does not install": tuple(
        f"could not import '{name}" for name in ("mlflow", "openvino", "executorch")
    ),
    "a package under another licence, which make does not install": ("could not import 'ultralytics",),
}
"""What a machine for continuous integration may lack, and how the reason of such a skip may be told.

Any other skipped test fails the run where `$CI` is true.
"""


def want(reason: str) -> str | None:
    """Which entry of `WANTS` a reason for skipping belongs to."""
    return next((name for name, told in WANTS.items() if any(words in reason for words in told)), None)


def skipped(config: pytest.Config) -> list[tuple[str, str]]:
    """(test, reason) of all that was skipped, in all worker processes."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reports = reporter.stats.get("skipped", []) if reporter else []
    return [(report.nodeid.split("[")[0], report.longrepr[2].removeprefix("Skipped: ")) for report in reports]


def forbidden(config: pytest.Config) -> list[tuple[str, str]]:
    """What was skipped and could have been tested: nothing, unless `$CI` is true."""
    if os.environ.get("CI", "").lower() not in ("true", "1"):
        return []
    return [(test, reason) for test, reason in skipped(config) if want(reason) is None]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.exitstatus == pytest.ExitCode.OK and forbidden(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    groups: dict[str, Counter[str]] = {}
    for test, reason in skipped(config):
        groups.setdefault(reason, Counter())[test] += 1
    if groups:
        terminalreporter.section("claims that were not tested")
    for reason, tests in groups.items():
        name = want(reason)
        terminalreporter.line(f"for want of {name} ({reason}):" if name else f"{reason}:")
        for test, times in tests.items():
            terminalreporter.line(f"  {test}" + (f" ({times} cases)" if times > 1 else ""))
    for test, reason in forbidden(config):
        terminalreporter.line(f"FAILED: CI is true, and nothing keeps {test} from running ({reason})", red=True)
