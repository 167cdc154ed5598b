"""Prune half of every group of every network on the list, by Filterfold and by Torch-Pruning, model by model.

Each job is a process of its own, forked from one in which both libraries are loaded and have run once, with one
thread; a crash, a lack of memory or a time-out ends that job alone. Results are written after every network, and
those there already are skipped, so a run that was stopped goes on.

    python benchmarks/conformance/run.py [--list foreign] [--limit 60] [--peer-limit 60] [--jobs 1]
        [--only NAME ...] [--again NAME ...]
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing import connection
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from conformance.foreign import MODULES  # noqa: E402
from conformance.models import Entry, entries  # noqa: E402
from conformance.table import markdown  # noqa: E402
from conformance.torchvision_shim import declare_missing_operators  # noqa: E402

FORK = multiprocessing.get_context("fork")
DISTRIBUTIONS = {"smp": "segmentation-models-pytorch"}
"""Libraries that are installed by another name than the list gives them."""

WALL = 8
"""A job that has had this many times its limit in wall time hangs, and is ended."""


class OverLimitError(BaseException):
    """The job's processor time is used up. No `Exception`, so that no job catches it by mistake."""


def main() -> None:
    """Run what is missing and write the results after each network."""
    options = _options()
    declare_missing_operators()
    warm_up()
    report = _read(options.output)
    listed = entries(options.list)
    todo = [e for e in listed if not options.only or e.name in options.only]
    todo = [e for e in todo if e.name in options.again or e.name not in report["models"]]
    for library in {entry.name.partition(":")[0] for entry in todo}:
        importlib.import_module(MODULES.get(library, library))
    if todo:
        report.setdefault("runs", []).append(conditions(options))
    active: dict[Any, Entry] = {}
    while todo or active:
        while todo and len(active) < options.jobs:
            entry = todo.pop(0)
            active[_started(lambda entry=entry: both(entry, options.limit, options.peer_limit))[0]] = entry
        for pipe in connection.wait(list(active)):
            entry = active.pop(pipe)
            report["models"][entry.name] = {"shape": list(entry.shape), **_received(pipe)}
            _write(options.output, report, listed)
            print(_short(entry.name, report["models"][entry.name]), flush=True)
    _write(options.output, report, listed)


def both(entry: Entry, limit: float, peer_limit: float) -> dict[str, Any]:
    """Ours, then the peer on a fresh network; each in a process of its own."""
    from conformance.jobs import ours, peer

    mine = limited(lambda: ours(entry), limit)
    theirs = limited(lambda: peer(entry, mine.get("output_layers", ()), mine.get("inexact", 1) == 0), peer_limit)
    return {"ours": mine, "peer": theirs}


def limited(job: Callable[[], dict[str, Any]], limit: float) -> dict[str, Any]:
    """The job's result; or that it crashed, or that it took longer than `limit` seconds of processor time."""
    over = {"status": "over the limit", "seconds": limit}

    def guarded() -> dict[str, Any]:
        signal.signal(signal.SIGPROF, _over)
        signal.setitimer(signal.ITIMER_PROF, limit)
        try:
            return job()
        except OverLimitError:
            return over
        except Exception as reason:
            return {"status": "crash", "why": f"{type(reason).__name__}: {reason}"[:240]}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    pipe, process = _started(guarded)
    result = _received(pipe) if pipe.poll(WALL * limit) else over
    process.kill()
    process.join()
    return result


def _over(*_: object) -> None:
    raise OverLimitError


def _started(job: Callable[[], dict[str, Any]]) -> tuple[Any, Any]:
    here, there = FORK.Pipe(duplex=False)

    def work() -> None:
        warnings.simplefilter("ignore")
        there.send(job())

    process = FORK.Process(target=work)
    process.start()
    there.close()
    return here, process


def _received(pipe: Any) -> dict[str, Any]:
    try:
        return pipe.recv()
    except EOFError:
        return {"status": "crash", "why": "the process died"}


def warm_up() -> None:
    """Load everything and prune a toy by both, so that no job pays for imports."""
    import timm  # noqa: F401
    import torch
    import torch_pruning as tp
    import torchvision  # noqa: F401

    import filterfold as ff

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1)]
    inputs = torch.randn(1, 3, 8, 8)
    ff.prune(torch.nn.Sequential(*layers).eval(), inputs, keep=0.5)
    toy = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1))
    importance = tp.importance.MagnitudeImportance(p=1)
    tp.pruner.MagnitudePruner(toy, inputs, importance, pruning_ratio=0.5, ignored_layers=[toy[1]]).step()


def conditions(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    libraries = ["filterfold", "torch", "torchvision", "timm", "torch-pruning", "numpy"]
    if options.list == "foreign":
        libraries += [DISTRIBUTIONS.get(name, name) for name in {e.name.partition(":")[0] for e in entries("foreign")}]
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in dict.fromkeys(libraries)}},
        "commit": git("rev-parse", "--short", "HEAD"),
        "uncommitted_source": bool(git("status", "--porcelain", "--", "src")),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": [round(x, 1) for x in os.getloadavg()],
        "jobs_at_a_time": options.jobs,
        "limit_seconds": options.limit,
        "peer_limit_seconds": options.peer_limit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _short(name: str, row: dict[str, Any]) -> str:
    if "ours" not in row:
        return f"{name}: {row}"
    told = [f"{row[who]['status']} {row[who].get('seconds', float('nan')):.2f} s" for who in ("ours", "peer")]
    why = "; ".join(row["ours"].get("reasons", []))[:160] or row["ours"].get("why", "")
    return f"{name}: {told[0]} | peer {told[1]} {why}"


def _read(path: Path) -> dict[str, Any]:
    import json

    return json.loads(path.read_text()) if path.exists() else {"format": 1, "models": {}}


def _write(path: Path, report: dict[str, Any], listed: tuple[Entry, ...]) -> None:
    from filterfold.utils.io import write_json

    order = {entry.name: place for place, entry in enumerate(listed)}
    report["models"] = dict(sorted(report["models"].items(), key=lambda item: order.get(item[0], len(order))))
    write_json(path, report)
    path.with_suffix(".md").write_text(markdown(report))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=60, help="seconds of processor time per network")
    parser.add_argument("--peer-limit", type=float, default=60, help="the same for the peer")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time")
    parser.add_argument("--only", nargs="*", default=(), help="these networks only")
    parser.add_argument("--again", nargs="*", default=(), help="networks to run again though they have a result")
    parser.add_argument("--list", choices=("main", "foreign"), default="main", help="which list")
    parser.add_argument("--output", type=Path, help="default: results/conformance.json or conformance_foreign.json")
    options = parser.parse_args()
    name = "conformance.json" if options.list == "main" else "conformance_foreign.json"
    options.output = options.output or ROOT / "results" / name
    return options


if __name__ == "__main__":
    main()
