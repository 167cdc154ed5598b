"""A drawing of which layers are coupled: layers from top to bottom, channel groups as coloured lanes beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .figure import CONTROL, COOL, INK, LINE, METHODS, MUTED, PAPER, WARM, css

ROW, LANE, TOP, BAR = 22, 16, 96, 90
"""Pixels: height of a layer's row, width of a lane, space above the first row, length of the longest bar."""

_TURN = (*METHODS, *COOL[::2], *WARM[::2])


def drawing(title: str, layers: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> str:
    """An SVG file that a browser shows as it is, light or dark.

    **Arguments:**

    - `title`: the network's name.
    - `layers`: as `filterfold inspect --json` has them, in the order of first use.
    - `groups`: likewise. A group's lane runs from the first layer that makes its channels to the last that reads them:
      full marks make them, hollow ones read them. A grey dashed lane can't be cut.
    """
    rows = {layer["tensor"]: place for place, layer in enumerate(layers)}
    marks = [(_places(group["producers"], rows), _places(group["consumers"], rows)) for group in groups]
    lanes = _lanes([(min(a + b), max(a + b)) if a + b else None for a, b in marks])
    left = 34 + LANE * (1 + max((lane for lane in lanes if lane is not None), default=0))
    names = [layer["name"] or layer["tensor"] for layer in layers]
    text = left + 7 * max(map(len, names), default=0) + 20
    width, height = max(460, text + BAR + 70), TOP + ROW * len(layers) + 20
    most = max((layer["macs_share"] for layer in layers), default=0) or 1
    body = [_heading(title, text)]
    for place, (layer, name) in enumerate(zip(layers, names, strict=True)):
        y, share = TOP + ROW * place, layer["macs_share"]
        body.append(
            f"<g><title>{escape(name)}: {escape(layer['kind'])}, {'x'.join(map(str, layer['shape']))}</title>"
            f'<text x="{left}" y="{y + 4}" class="ink">{escape(name)}</text>'
            f'<rect x="{text}" y="{y - 5}" width="{max(1, BAR * share / most):.1f}" height="10" class="bar"/>'
            f'<text x="{text + BAR * share / most + 6:.1f}" y="{y + 4}">{share:.1%}</text></g>'
        )
    turn = 0
    for group, (makes, reads), lane in zip(groups, marks, lanes, strict=True):
        if lane is not None:
            colour = CONTROL.name if group["frozen"] else _TURN[turn % len(_TURN)].name
            turn += not group["frozen"]
            body.append(_lane(group, makes, reads, left - 24 - LANE * lane, colour))
    rules = (
        f":root {{ {css('light')} }}",
        f"@media (prefers-color-scheme: dark) {{ :root {{ {css('dark')} }} }}",
        f"svg {{ background: var(--{PAPER.name}); }} .ink {{ fill: var(--{INK.name}); }}",
        f"text {{ font: 12px system-ui, sans-serif; fill: var(--{MUTED.name}); }}",
        f".title {{ font-size: 15px; font-weight: 600; }} .bar {{ fill: var(--{LINE.name}); }}",
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    return "\n".join([head, f"<style>{' '.join(rules)}</style>", *body, "</svg>\n"])


def _heading(title: str, bars: float) -> str:
    return (
        f'<text x="16" y="26" class="ink title">{escape(title)}: coupled layers</text>'
        '<text x="16" y="46">One lane a channel group: ● makes its channels, ○ reads them.</text>'
        '<text x="16" y="62">Grey and dashed: can’t be cut.</text>'
        f'<text x="{bars}" y="{TOP - 14}">share of MACs</text>'
    )


def _places(parts: Sequence[Mapping[str, Any]], rows: Mapping[str, int]) -> list[int]:
    """The rows of the layers whose weights these slices are in."""
    return sorted({rows[part["tensor"]] for part in parts if part["tensor"] in rows})


def _lanes(spans: Sequence[tuple[int, int] | None]) -> list[int | None]:
    """For each span the first lane that is free where it runs; the longest get theirs last, at the outside.

    >>> _lanes([(0, 9), (0, 1), (1, 2), (3, 4), None])
    [2, 0, 1, 0, None]
    """
    taken: list[list[tuple[int, int]]] = []
    found: list[int | None] = [None] * len(spans)
    known = [(place, *span) for place, span in enumerate(spans) if span is not None]
    for place, first, last in sorted(known, key=lambda one: (one[2] - one[1], one[1])):
        free = (i for i, lane in enumerate(taken) if all(first > end or last < start for start, end in lane))
        lane = next(free, len(taken))
        taken += [[]] if lane == len(taken) else []
        taken[lane].append((first, last))
        found[place] = lane
    return found


def _lane(group: Mapping[str, Any], makes: Sequence[int], reads: Sequence[int], x: float, colour: str) -> str:
    def y(row: int) -> int:
        return TOP + ROW * row

    ends, look = (*makes, *reads), f"stroke:var(--{colour})"
    dashes = ' stroke-dasharray="4 4"' if group["frozen"] else ""
    state = f"can’t be cut: {group['frozen']}" if group["frozen"] else "can be cut"
    found = [
        f"<g><title>{escape(group['name'])}: {group['size']} units, {escape(state)}</title>",
        f'<path d="M{x} {y(min(ends))}V{y(max(ends))}" style="{look}" stroke-width="3"{dashes}/>',
    ]
    for row in sorted({*makes, *reads}):
        fill = f"var(--{colour})" if row in makes else f"var(--{PAPER.name})"
        found.append(f'<circle cx="{x}" cy="{y(row)}" r="5" style="{look};fill:{fill}" stroke-width="2.5"/>')
    return "".join([*found, "</g>"])
