"""Draws `labels.svg`: labels flowing through a residual block, as a real trace finds them.

python docs/pictures/labels.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import filterfold as ff

COLOURS = {"stem": ("#00796b", "#b2dfdb"), "conv1": ("#d84315", "#ffccbc"), "fc": ("#616161", "#e0e0e0")}
"""Group → line and filling."""

TEXTS = {
    "stem": "convolution: new labels",
    "conv1": "convolution: reads 0–3, new labels",
    "bn1": "batch norm: lets them through",
    "relu": "ReLU: lets them through",
    "conv2": "convolution: reads 0–5, new labels",
    "bn2": "batch norm: lets them through",
    "add": "addition: joins both sides",
    "relu_1": "ReLU: lets them through",
    "mean": "mean over places: lets them through",
    "fc": "linear layer: reads 0–3; the output, frozen",
}
"""What each operation does, in the order in which they run."""

ROW, BOX, LEFT, RIGHT = 44, 22, 60, 250


class Block(nn.Module):
    """A residual block between a first convolution and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = self.stem(x)
        y = self.bn1(self.conv1(x)).relu()
        x = (x + self.bn2(self.conv2(y))).relu()
        return self.fc(x.mean((2, 3)))


def operations() -> list[tuple[str, str, list[int]]]:
    """(name, group, units) of every operation's result along its channels, from `ff.trace`."""
    groups = ff.trace(Block(), torch.zeros(1, 3, 8, 8))
    found: list[tuple[str, str, list[int]]] = []
    for step in groups.sizes.steps:
        axis = step.outputs[0].layout[1] if len(step.outputs[0].layout) > 1 else ()
        if not axis or step.op == "t":  # `t` turns the linear layer's weight
            continue
        labels = axis[0]
        owner = groups[int(groups.sizes.assembly.group_of[labels[0]])].name
        name = step.stack[-1] or step.op
        name += "_1" if name in [other for other, *_ in found] else ""
        found.append((name, owner, groups.sizes.assembly.unit_of[labels].tolist()))
    return found


def svg() -> str:
    """The picture."""
    steps = operations()
    assert [name for name, *_ in steps] == list(TEXTS), steps
    parts, places = [], {}
    for row, (name, group, units) in enumerate(steps):
        inside = name in ("conv1", "bn1", "relu", "conv2", "bn2")
        x, y = RIGHT if inside else LEFT, 16 + row * ROW
        places[name] = x, y
        line, filling = COLOURS[group]
        for place, unit in enumerate(units):
            left = x + place * BOX - len(units) * BOX / 2
            parts.append(
                f'<rect x="{left:g}" y="{y}" width="{BOX}" height="{BOX}" fill="{filling}" stroke="{line}"/>'
                f'<text x="{left + BOX / 2:g}" y="{y + 15}" text-anchor="middle">{unit}</text>'
            )
        middle = x + len(units) * BOX / 2 + 10
        parts.append(f'<text x="{middle:g}" y="{y + 15}"><tspan font-weight="bold">{name.removesuffix("_1")}</tspan> ')
        parts.append(f"{TEXTS[name]}</text>")

    def arrow(first: str, last: str) -> None:
        (x1, y1), (x2, y2) = places[first], places[last]
        start, end = y1 + BOX, y2 - 4
        bend = f"V {start + 11} H {x2}" if x1 < x2 else f"V {end - 9} H {x2}" if x1 > x2 else ""
        parts.append(f'<path d="M {x1} {start} {bend} V {end}" marker-end="url(#tip)"/>')

    for pair in zip(list(TEXTS)[:-1], list(TEXTS)[1:], strict=True):
        arrow(*pair)
    arrow("stem", "add")
    height = 16 + len(steps) * ROW
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 590 {height}" font-family="sans-serif" font-size="13">'
        "<style>path{fill:none;stroke:#757575;stroke-width:1.5} text{fill:#212121}</style>"
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" style="fill:#757575;stroke:none"/></marker></defs>' + "".join(parts) + "</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_name("labels.svg").write_text(svg())
