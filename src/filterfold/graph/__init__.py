"""Finding the channel groups of a network."""

from __future__ import annotations

from ..groups import ChannelGroup
from .repair import UnrepairableError, repair
from .trace import Traced, trace, trace_and_measure

__all__ = ["ChannelGroup", "Traced", "UnrepairableError", "repair", "trace", "trace_and_measure"]
