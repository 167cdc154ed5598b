"""What a report says, as figures for scripts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .. import stats
from .build import verdict
from .study import COMPARED, Record, Study, studies
from .verdict import Judgement, judge
from .warnings import find_warnings


def summary(records: Iterable[Record], *, margin: float = 0.5, control: str = "dense") -> dict[str, Any]:
    """Means with spreads and intervals of every group, and the verdict on each, as plain values and dataclasses.

    **Arguments:** as of `build`.

    >>> record = {"status": "finished", "method": "dense", "label": "dense", "result": {"top1": 90.0}}
    >>> found = summary([record | {"seed": 0}, record | {"seed": 1}])
    >>> found["studies"][0]["groups"][0]["top1"].mean, found["margin"]
    (90.0, 0.5)
    """
    records = list(records)
    return {
        "margin": margin,
        "verdict": verdict(records, margin=margin, control=control),
        "studies": [_study(study, judge(study, margin)) for study in studies(records, control)],
    }


def _study(study: Study, judgements: list[Judgement]) -> dict[str, Any]:
    judged = {j.group.label: _judgement(j) for j in judgements}
    groups = []
    for group in study.groups:
        measured = {m.key: stats.summarise(values) for m in COMPARED if (values := group.values(m))}
        groups.append({"label": group.label, "n": group.n, **measured, "against_control": judged.get(group.label)})
    return {
        "model": study.model,
        "data": study.data,
        "control": study.control,
        "groups": groups,
        "failed": [{"label": r.get("label"), "seed": r.get("seed"), "reason": r.get("reason")} for r in study.failed],
        "warnings": [{"title": one.title, "text": one.text} for one in find_warnings(study, judgements)],
    }


def _judgement(j: Judgement) -> dict[str, Any]:
    return {
        "accuracy": j.accuracy,
        "pace": j.pace,
        "paired": j.paired,
        "top1": j.top1,
        "speedup": j.speedup,
        "macs_ratio": j.macs_ratio,
        "p_not_worse": j.p_not_worse,
        "p_differs": j.p_differs,
        "p_pace": j.p_pace,
    }
