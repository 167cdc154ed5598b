"""Finding the channel groups of a network."""

from __future__ import annotations

from ..plan import ChannelGroup
from .stale_sizes import UnrepairableError, rewrite_stale_sizes
from .trace import Traced, trace, trace_and_measure

__all__ = ["ChannelGroup", "Traced", "UnrepairableError", "rewrite_stale_sizes", "trace", "trace_and_measure"]
