"""How long networks and layers take, measured so that the figures hold up.

Fixed threads, warm-up, eval and inference mode, the same input for all, the networks timed in turn
(so that a slow phase of the machine hits all of them), medians with intervals, and the first network
timed a second time under another name: that A/A control must give 1.00, or the differences mean nothing.
"""

from __future__ import annotations

from .latency import MODES, Mode, Timer, in_turn, inference_seconds, measure_latency, threads_set
from .latency_results import CONTROL, Latency, LatencyComparison, median_interval
from .layer_latency import LayerCall, LayerTimes, friendly_step, layer_calls, wasted_widths

__all__ = [
    "CONTROL",
    "MODES",
    "Latency",
    "LatencyComparison",
    "LayerCall",
    "LayerTimes",
    "Mode",
    "Timer",
    "friendly_step",
    "in_turn",
    "inference_seconds",
    "layer_calls",
    "measure_latency",
    "median_interval",
    "threads_set",
    "wasted_widths",
]
