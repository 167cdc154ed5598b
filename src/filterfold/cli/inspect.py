"""`filterfold inspect`: which layers can be pruned, why the others can't, and what it would save."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ..errors import ConfigError, SelectionError
from .display import console, count, live, say, table
from .figures import Figures
from .options import MODEL_HELP, Width

if TYPE_CHECKING:
    from ..plan import ChannelGroup, Slice
    from ..profiling.macs import Cost


EXAMPLES = """
Examples:

  filterfold inspect vgg16

  filterfold inspect resnet56 --layers --svg coupling.svg

  filterfold inspect timm:efficientnet_b0 --input 3x224x224 --classes 1000

  filterfold inspect model.py:factory --json > groups.json
"""


def inspect(
    model: Annotated[str, Argument(help=MODEL_HELP)],
    image: Annotated[str, Option("--input", help="Input shape: channels x height x width.")] = "3x32x32",
    classes: Annotated[int, Option(help="Number of outputs.")] = 10,
    width: Width = 1.0,
    layers: Annotated[bool, Option("--layers", help="Also show it layer by layer.")] = False,
    svg: Annotated[
        Path | None, Option(help="Also draw which layers are coupled, as an SVG file for a browser.")
    ] = None,
) -> Figures:
    """Show which layers can be pruned, why the others can't and what to do about it, and what pruning would save.

    Layers whose filters must go together make one group. Saved at half: what share of the network's MACs goes if this
    group alone loses half its units.
    """
    import torch

    from ..bench.report.coupling import drawing
    from ..graph import trace
    from ..profiling.macs import measure
    from ..utils.io import check_output, write_text
    from ..zoo import build

    shape = image_shape(image)
    if svg is not None:
        check_output(svg, folder=False)
    with live():
        network = build(model, classes=classes, channels=shape[0], width=width, image_size=shape[1])
        example = torch.zeros(1, *shape)
        cost = measure(network, example)
        groups = trace(network, example)
        found = _document(model, groups, cost)
    if svg is not None:
        write_text(svg, drawing(model, found["layers"], found["groups"]))
    return Figures(found, partial(_show, found, layers, svg))


def image_shape(text: str) -> tuple[int, int, int]:
    """Channels, height, width.

    >>> image_shape("3x32x32")
    (3, 32, 32)
    """
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--input {text}: give channels x height x width, such as 3x32x32")
    channels, height, width = map(int, parts)
    return channels, height, width


def _document(model: str, groups: Sequence[ChannelGroup], cost: Cost) -> dict[str, Any]:
    makers = {part.tensor: group for group in groups for part in group.producers if part.role in _MAKERS}
    readers = {part.tensor: group for group in groups for part in group.consumers}
    layers = [
        {
            **asdict(layer),
            "macs_share": layer.macs / max(1, cost.macs),
            "makes": makers[layer.tensor].name if layer.tensor in makers else None,
            "reads": readers[layer.tensor].name if layer.tensor in readers else None,
        }
        for layer in cost.layers
    ]
    return {
        "model": model,
        "macs": cost.macs,
        "parameters": cost.parameters,
        "weights": cost.weights,
        "layers": layers,
        "groups": [_group(group, layers, cost) for group in groups],
        "saved_at_half": _saved([group for group in groups if group.frozen is None], cost),
    }


_MAKERS = ("filter", "depthwise")


def _group(group: ChannelGroup, layers: Iterable[Mapping[str, Any]], cost: Cost) -> dict[str, Any]:
    from ..graph.remedies import remedy

    return {
        "name": group.name,
        "size": group.size,
        "exact": group.exact,
        "remark": group.remark,
        "frozen": group.frozen,
        "remedy": remedy(group.frozen) if group.frozen else None,
        "macs_share": sum(layer["macs_share"] for layer in layers if layer["makes"] == group.name),
        "saved_at_half": _saved([group], cost) if group.frozen is None else None,
        "producers": _slices(group.producers),
        "consumers": _slices(group.consumers),
    }


def _slices(parts: Iterable[Slice]) -> list[dict[str, Any]]:
    return [{"tensor": part.tensor, "axis": part.axis, "role": part.role} for part in parts]


def _saved(groups: Sequence[ChannelGroup], cost: Cost) -> dict[str, float]:
    """The shares of MACs and parameters that go with half the units of these groups."""
    import torch

    from ..pruning.budgets import select

    try:
        plan = select(groups, {group.name: torch.zeros(group.size) for group in groups}, keep=0.5, cost=cost)
    except SelectionError:  # a single unit
        return {"macs": 0.0, "parameters": 0.0}
    return {name: 1 - plan.notes["achieved"][name] for name in ("macs", "parameters")}


def _show(found: Mapping[str, Any], layers: bool, svg: Path | None) -> None:
    groups = found["groups"]
    numbers = {group["name"]: str(place) for place, group in enumerate(groups, 1)}
    rows = []
    for group in groups:
        made = {part["tensor"] for part in group["producers"] if part["role"] in _MAKERS}
        saved = "" if group["frozen"] else f"{group['saved_at_half']['macs']:.1%}"
        figures = (str(group["size"]), str(len(made)), f"{group['macs_share']:.1%}", saved)
        rows.append((numbers[group["name"]], _short(group["name"]), _state(group), *figures))
    heads = ("", "channel group", "can be cut", "units", "layers", "share of MACs", "saved at half")
    table("Channel groups", heads, rows, texts=3)
    if layers:
        table("Layers", ("layer", "kind", "weights", "share of MACs", "group"), _layers(found, numbers), texts=2)
    _explain(groups, numbers)
    cuttable = [group for group in groups if not group["frozen"]]
    say(
        f"{len(cuttable)} of {len(groups)} channel groups can be cut ({sum(group['size'] for group in cuttable)} of "
        f"{sum(group['size'] for group in groups)} units)"
    )
    say(
        f"all at half: {found['saved_at_half']['macs']:.1%} of {count(found['macs'])} MACs saved, "
        f"{found['saved_at_half']['parameters']:.1%} of {count(found['parameters'])} parameters"
    )
    say(f"in full: {found['macs']:,} MACs, {found['parameters']:,} parameters ({found['weights']:,} of them weights)")
    if svg is not None:
        say(f"drawing: {svg}")


def _state(group: Mapping[str, Any]) -> str:
    return "no" if group["frozen"] else "yes" if group["exact"] else "yes *"


def _layers(found: Mapping[str, Any], numbers: Mapping[str, str]) -> list[tuple[str, ...]]:
    """One row a layer; its group says whether its filters can be cut."""
    states = {group["name"]: _state(group) for group in found["groups"]}
    rows: list[tuple[str, ...]] = []
    for layer in found["layers"]:
        own = layer["makes"]
        group = f"{numbers[own]}: {states[own]}" if own else ""
        name, kind = _short(layer["name"] or layer["tensor"]), layer["kind"]
        rows.append((name, kind, f"{layer['weights']:,}", f"{layer['macs_share']:.1%}", group))
    return rows


ROOM = 34
"""Longest name that fits beside the figures at 80 columns."""


def _short(name: str) -> str:
    """A long name without its middle; --json has all of it.

    >>> _short("features.denseblock3.denselayer12.conv1"), _short("conv1")
    ('features.densebl…enselayer12.conv1', 'conv1')
    """
    return name if len(name) <= ROOM else f"{name[: ROOM // 2 - 1]}…{name[-ROOM // 2 :]}"


def _explain(groups: Sequence[Mapping[str, Any]], numbers: Mapping[str, str]) -> None:
    """Why groups can't be cut, and what to do; once for each reason."""
    reasons: dict[str, list[str]] = {}
    for group in groups:
        if group["frozen"]:
            text = f"{group['frozen']}. Remedy: {group['remedy']}."
            reasons.setdefault(text, []).append(numbers[group["name"]])
        elif not group["exact"]:
            text = f"not the same as zeroing units ({group['remark']}), so it is verified in another way."
            reasons.setdefault(text, []).append(f"*{numbers[group['name']]}")
    for text, own in reasons.items():
        what = "can be cut" if own[0].startswith("*") else "can’t be cut"
        names = _ranges([int(name.lstrip("*")) for name in own])
        line = f"{'group' if len(own) == 1 else 'groups'} {names} {what}: {text}"
        say("\n".join(wrap(line, console.width, subsequent_indent="  ", break_long_words=False)))


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers with those that follow one another as a range.

    >>> _ranges([1, 2, 3, 7, 9, 10])
    '1-3, 7, 9-10'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
