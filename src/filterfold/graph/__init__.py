"""Finding the channel groups of a network."""

from __future__ import annotations

from ..groups import ChannelGroup
from .trace import Traced, trace

__all__ = ["ChannelGroup", "Traced", "trace"]
