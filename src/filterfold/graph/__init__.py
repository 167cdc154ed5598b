"""Finding the channel groups of a network."""

from __future__ import annotations

from ..plan import ChannelGroup
from .dispatch import Call, Tracer
from .labels import FIXED, FREE
from .rules.custom import tracing_rule
from .stale_sizes import UnrepairableError, groups_behind_numbers, rewrite_stale_sizes
from .trace import Traced, locked, tied, trace, trace_and_measure, whole_heads
from .unread_sizes import unread_sizes

__all__ = [
    "FIXED",
    "FREE",
    "Call",
    "ChannelGroup",
    "Traced",
    "Tracer",
    "UnrepairableError",
    "groups_behind_numbers",
    "locked",
    "rewrite_stale_sizes",
    "tied",
    "trace",
    "trace_and_measure",
    "tracing_rule",
    "unread_sizes",
    "whole_heads",
]
