"""What networks and layers cost: multiply-accumulates, and measured time.

Networks are timed with a fixed number of threads, after a warm-up, in eval and inference mode, on the same input, and
in turn, so that a slow phase of the machine affects all of them; the results are medians with intervals. The first
network is timed a second time under another name. The ratio of this A/A control to itself must be 1.00; where it is
not, differences of that size mean nothing.
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
