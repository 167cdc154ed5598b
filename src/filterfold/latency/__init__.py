"""How long networks and layers take, measured so that the figures hold up.

Fixed threads, warm-up, eval and inference mode, the same input for all, the networks timed in turn
(so that a slow phase of the machine hits all of them), medians with intervals, and the first network
timed a second time under another name: that A/A control must give 1.00, or the differences mean nothing.
"""

from .clock import Timer, threads_set
from .layers import LayerCall, LayerTimes, layer_calls
from .measuring import inference_seconds, measure_latency
from .results import CONTROL, Comparison, Latency, median_interval
from .runners import MODES, Mode
from .widths import friendly_step, wasted_widths

__all__ = [
    "CONTROL",
    "MODES",
    "Comparison",
    "Latency",
    "LayerCall",
    "LayerTimes",
    "Mode",
    "Timer",
    "friendly_step",
    "inference_seconds",
    "layer_calls",
    "measure_latency",
    "median_interval",
    "threads_set",
    "wasted_widths",
]
