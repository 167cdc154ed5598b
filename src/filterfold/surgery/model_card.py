"""The page that a saved network's folder opens with: a model card, with what the hub reads at its head."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..profiling.macs import Cost
from ..zoo import Expected

LOADING = r'ff\.from_pretrained\("[^"]*"'
"""Where a card says what the network is loaded from: what `load_command` writes."""


@dataclass(frozen=True, slots=True)
class Card:
    """What people need to know of a saved network, and it does not say itself.

    **Arguments:**

    - `license`: as the hub writes it, such as `"apache-2.0"`. A pruned network is under that of the weights it was cut
      from.
    - `base_model`: id of these on the hub.
    - `figures`: rows for the table, (of the uncut network, of this one), as they are to be shown.
    - `expects`: the images; of a network of timm or torchvision, `zoo.expected(name)`, unless it was trained on others.
    - `text`: what it was trained on, what it is for, what was measured how; Markdown.

    ```python
    >>> Card(license="mit", figures={"Top-1, %": (69.8, 69.1)}).license
    'mit'

    ```
    """

    license: str = "unknown"
    base_model: str | None = None
    figures: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    expects: Expected | None = None
    text: str = ""


def markdown(card: Card, factory: str | None, source: str, costs: tuple[Cost, Cost]) -> str:
    """The card as `README.md`.

    **Arguments:**

    - `factory`: the network's name in the zoo; None for code of the caller's own.
    - `source`: what the command loads it from.
    - `costs`: of the uncut network and of this one.
    """
    head = {"library_name": "filterfold", "license": card.license, "base_model": card.base_model}
    lines = ["---"]
    lines += [f"{name}: {json.dumps(value)}" for name, value in head.items() if value is not None]  # JSON is YAML
    lines += ["tags:", "- filterfold", "- pruning", "---", ""]
    before, after = costs
    share = after.macs / max(1, before.macs)
    lines += [f"# {factory or 'A network'} with {share:.0%} of its multiply-accumulates", ""]
    lines += ["Its layers have fewer channels. The rest is as in the uncut network, and there are no masks.", ""]
    lines += [card.text, ""] if card.text else []
    rows = [("", "uncut", "this network", "left"), ("---", "---:", "---:", "---:")]
    for name, old, new in (
        ("Multiply-accumulates per example", before.macs, after.macs),
        ("Parameters", before.parameters, after.parameters),
    ):
        rows.append((name, f"{old:,}", f"{new:,}", f"{new / max(1, old):.1%}"))
    rows += [(name, str(old), str(new), "") for name, (old, new) in card.figures.items()]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    if card.expects is not None:
        size, mean, std = card.expects.image_size, list(card.expects.mean), list(card.expects.std)
        lines += ["", f"Images: {size} x {size} pixels; values from 0 to 1, less {mean}, divided by {std}."]
    extras = "hub,zoo" if factory is not None and ":" in factory else "hub"
    end = ")" if factory is not None else ", your_factory)  # which builds the uncut network"
    lines += ["", "## Use", "", "```bash", f"pip install 'filterfold[{extras}]'", "```", "", "```python"]
    lines += ["import filterfold as ff", "", f"network = {load_command(source)}{end}", "```", ""]
    lines += ["The weights are safetensors; nothing that is downloaded is executed."]
    return "\n".join(lines) + "\n"


def load_command(source: str) -> str:
    """The beginning of the command that loads a network from a folder or the hub."""
    return f"ff.from_pretrained({json.dumps(source)}"
