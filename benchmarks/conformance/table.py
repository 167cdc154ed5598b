"""The Markdown page of a conformance run."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

HIGHLIGHTED = ("torchvision:vgg16", "torchvision:densenet121", "timm:resnest14d")
"""The networks whose times have a bar of their own."""

STATUSES = {
    "wholly": "wholly cut, verified",
    "partly": "partly cut, verified, the rest frozen with its reason",
    "runs": "cut, runs, nothing wrong found",
    "nothing cut": "nothing cut",
    "refused": "refused with an error of its own",
    "over the limit": "over the time limit",
    "crash": "crash",
    "broken": "cut, but the network fails or its output has another shape",
    "wrong": "silently wrong: runs, but computes something else",
}
"""What a status means."""


def markdown(report: dict[str, Any]) -> str:
    """Totals, the highlighted networks, every network, and what was left whole and why."""
    rows = {name: row for name, row in report["models"].items() if "ours" in row}
    parts = ["# Conformance: half of every channel group, by L1", _conditions(report, len(rows))]
    parts += ["## Totals", _totals(rows), "## Networks with a bar of their own", _table(_named(rows, HIGHLIGHTED))]
    parts += ["## Every network", _table(rows), "## What was left whole, and why", _reasons(rows)]
    return "\n\n".join(parts) + "\n"


def _conditions(report: dict[str, Any], count: int) -> str:
    runs = report.get("runs", [])
    last = runs[-1] if runs else {}
    versions = ", ".join(f"{name} {number}" for name, number in last.get("versions", {}).items())
    lines = [
        f"{count} networks with random weights (seed 0); {versions}; {last.get('processor')}, {last.get('cores')} "
        "cores, one thread a job. Seconds are processor time of one run each on a shared machine; Filterfold's include "
        "tracing and verification, Torch-Pruning's its graph. What takes longer counts as the limit. "
        f"Made by `benchmarks/conformance/run.py` in {len(runs)} piece{'s' * (len(runs) != 1)}:",
        "",
    ]
    lines += [
        f"- {run['date']}, commit {run['commit']}{' and uncommitted source' if run['uncommitted_source'] else ''}, "
        f"{run['jobs_at_a_time']} at a time, load average {run['load_average'][0]}, limit {run['limit_seconds']:g} s, "
        f"for the peer {run['peer_limit_seconds']:g} s"
        for run in runs
    ]
    return "\n".join(lines)


def _totals(rows: dict[str, Any]) -> str:
    lines = ["| | Filterfold | Torch-Pruning |", "|---|---:|---:|"]
    counts = {who: Counter(row[who]["status"] for row in rows.values()) for who in ("ours", "peer")}
    statuses = [*STATUSES, *(status for count in counts.values() for status in count if status not in STATUSES)]
    lines += [f"| {STATUSES.get(s, s)} | {counts['ours'][s]} | {counts['peer'][s]} |" for s in statuses]
    times = {who: [row[who]["seconds"] for row in rows.values() if "seconds" in row[who]] for who in ("ours", "peer")}
    for name, fold in (("seconds in all", sum), ("median", statistics.median), ("longest", max)):
        if times["ours"] and times["peer"]:
            lines.append(f"| {name} | {fold(times['ours']):.2f} | {fold(times['peer']):.2f} |")
    both = [row for row in rows.values() if row["peer"]["status"] == "runs"]
    if both:
        sums = [sum(row[who]["seconds"] for row in both) for who in ("ours", "peer")]
        lines.append(f"| seconds in all, the {len(both)} networks that the peer cuts | {sums[0]:.2f} | {sums[1]:.2f} |")
    if sum(times["peer"]):
        lines.append(f"| share of the peer's time | {sum(times['ours']) / sum(times['peer']):.2f} | 1 |")
    return "\n".join(lines)


def _named(rows: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: rows[name] for name in names if name in rows}


def _table(rows: dict[str, Any]) -> str:
    lines = [
        "| network | input | Filterfold | groups cut | weights left | error | s | Torch-Pruning | left | s | ratio |",
        "|---|---|---|---:|---:|---:|---:|---|---:|---:|---:|",
    ]
    lines += [_line(name, row) for name, row in rows.items()]
    return "\n".join(lines)


def _line(name: str, row: dict[str, Any]) -> str:
    ours, peer = row["ours"], row["peer"]
    shown = f"**{name}**" if name in HIGHLIGHTED else name
    both = "seconds" in ours and "seconds" in peer
    cells = [
        shown,
        "x".join(map(str, row["shape"][2:])),
        ours["status"],
        f"{ours['cut']} of {ours['cut'] + len(ours['not_cut'])}" if "cut" in ours else "",
        _share(ours),
        f"{ours['error']:.0e}" if ours.get("error") is not None else "",
        _seconds(ours),
        peer["status"],
        _share(peer),
        _seconds(peer),
        f"{ours['seconds'] / max(peer['seconds'], 1e-3):.2f}" if both else "",
    ]
    return f"| {' | '.join(cells)} |"


def _share(result: dict[str, Any]) -> str:
    return f"{result['left']:.0%}" if "left" in result else ""


def _seconds(result: dict[str, Any]) -> str:
    if "seconds" not in result:
        return ""
    return f"{'over ' if result['status'] == 'over the limit' else ''}{result['seconds']:.2f}"


def _reasons(rows: dict[str, Any]) -> str:
    lines = []
    for name, row in rows.items():
        for who, tool in (("ours", "Filterfold"), ("peer", "Torch-Pruning")):
            result = row[who]
            told = [result["why"]] if "why" in result else result.get("reasons", [])
            if not told and result["status"] == "wrong":
                told = [f"differs from the masked network by {result.get('error') or float('nan'):.1e}"]
            if not told and result.get("not_cut"):
                told = [f"no smaller than its classes of units: {', '.join(result['not_cut'][:4])}"]
            shown = "; ".join(text.replace("|", "/") for text in told[:6])
            lines += [f"- {name}, {tool}, {result['status']}: {shown}"] if shown else []
    return "\n".join(lines) or "Nothing."
