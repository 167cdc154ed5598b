"""What to do about a group that can't be cut, or not exactly."""

from __future__ import annotations

import re

from .labels import OUTPUT

_OWN_CODE = "index by names or whole axes in the model's code there, or leave the group whole"

REMEDIES = {
    OUTPUT: "none is needed: these units are the network's answers",
    "tied to constant padding": "pad with a 1x1 convolution instead of constants, or cut inside the blocks",
    "no rule for": "say how the operation treats channels with ff.tracing_rule",
    "belongs to a": "none: cut the layers before and after it",
    "the first state of|kept by the model from one call": "none: states keep their size; cut what the layer reads",
    "fixed axis|fixed size|made by no layer|never written": "let the tensor that it meets there follow the channels",
    "merged into one|merged in another way|unequal size": "keep the channels on an axis of their own there",
    "by position|by index|by data|by a fixed number|compared as a whole": _OWN_CODE,
    "slides over|resamples|transformed over|pools": "none while an operation runs along the channels themselves",
    "scale of .* follows": "keep the number as a constant in the model's code",
    "offset or a weight": "none: their number is the number of taps",
}
"""Pattern in a reason of `trace` → remedy."""


def remedy(reason: str) -> str:
    """What to do about a reason for which `filterfold.trace` froze a group.

    >>> remedy("no rule for foldl in stem")
    'say how the operation treats channels with ff.tracing_rule'
    """
    return next((text for pattern, text in REMEDIES.items() if re.search(pattern, reason)), _OWN_CODE)
