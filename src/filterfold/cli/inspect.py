"""`filterfold inspect`: what a network consists of, what can be cut, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from ..errors import ConfigError
from .display import count, live, say, table
from .options import MODEL_HELP, Width

if TYPE_CHECKING:
    from ..plan import ChannelGroup, Slice
    from ..profiling.macs import Cost


EXAMPLES = """
Examples:

  filterfold inspect vgg16

  filterfold inspect resnet56 --layers

  filterfold inspect timm:efficientnet_b0 --input 3x224x224 --classes 1000

  filterfold inspect model.py:factory --json > groups.json
"""


def inspect(
    model: Annotated[str, Argument(help=MODEL_HELP)],
    image: Annotated[str, Option("--input", help="Input shape: channels x height x width.")] = "3x32x32",
    classes: Annotated[int, Option(help="Number of outputs.")] = 10,
    width: Width = 1.0,
    layers: Annotated[bool, Option("--layers", help="Also show the cost layer by layer.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print everything as JSON instead.")] = False,
) -> None:
    """Show a model's channel groups, what couples them, what is frozen and why, and its cost."""
    import torch

    from ..graph import trace
    from ..profiling.macs import measure
    from ..zoo import build

    shape = image_shape(image)
    with live():
        network = build(model, classes=classes, channels=shape[0], width=width, image_size=shape[1])
        example = torch.zeros(1, *shape)
        cost = measure(network, example)
        groups = trace(network, example)
    if as_json:
        typer.echo(json.dumps(_document(model, groups, cost), indent=2))
        return
    _show_groups(groups)
    if layers:
        rows = [
            (layer.name or layer.tensor, layer.kind, "x".join(map(str, layer.shape)), f"{layer.macs:,}")
            for layer in cost.layers
        ]
        table("Layers", ("layer", "kind", "shape", "MACs"), rows, texts=2)
    cuttable = [group for group in groups if group.frozen is None]
    say(
        f"{model}: {count(cost.macs)} MACs ({cost.macs:,}), {count(cost.parameters)} parameters ({cost.parameters:,}), "
        f"{cost.weights:,} of them convolution and linear weights"
    )
    say(
        f"{len(cuttable)} of {len(groups)} channel groups can be cut "
        f"({sum(group.size for group in cuttable)} of {sum(group.size for group in groups)} units)"
    )


def _show_groups(groups: Sequence[ChannelGroup]) -> None:
    rows = []
    for group in groups:
        makers = [part.tensor for part in group.producers if part.role in ("filter", "depthwise")]
        state = "frozen" if group.frozen else "yes" if group.exact else "yes, not mask-exact"
        readers = [part.tensor for part in group.consumers]
        rows.append((group.name, _shortened(makers), _shortened(readers), state, str(group.size)))
    table("Channel groups", ("group", "made by", "read by", "can be cut", "units"), rows, texts=4)
    for group in groups:
        if group.frozen:
            say(f"{group.name} is frozen: {group.frozen}")


def _shortened(tensors: Iterable[str], limit: int = 4) -> str:
    names = list(dict.fromkeys(tensors))
    shown = ", ".join(name.removesuffix(".weight") for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


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


def _document(model: str, groups: Iterable[ChannelGroup], cost: Cost) -> dict[str, Any]:
    return {
        "model": model,
        "macs": cost.macs,
        "parameters": cost.parameters,
        "weights": cost.weights,
        "layers": [asdict(layer) for layer in cost.layers],
        "groups": [
            {
                "name": group.name,
                "size": group.size,
                "exact": group.exact,
                "frozen": group.frozen,
                "producers": _slices(group.producers),
                "consumers": _slices(group.consumers),
            }
            for group in groups
        ],
    }


def _slices(parts: Iterable[Slice]) -> list[dict[str, Any]]:
    return [{"tensor": part.tensor, "axis": part.axis, "role": part.role} for part in parts]
