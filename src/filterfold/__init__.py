"""Filterfold makes ConvNets small and fast while they train.

```python
>>> import torch, filterfold as ff
>>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
>>> result = ff.prune(model, torch.zeros(1, 3, 8, 8), criterion="l1", keep=0.5)
>>> model[0].out_channels
4

```
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import FilterfoldError
from .graph import trace, tracing_rule
from .online.folding.fold import from_clusters
from .plan import ChannelGroup, Cut, Plan, Slice
from .profiling import measure_latency
from .profiling.macs import Cost, measure
from .pruning.budgets import LatencyBudget, Selection, select
from .pruning.criteria import CRITERIA, criterion, score
from .pruning.prune import prune
from .pruning.reconstruction import Repair, reestimate, repair
from .pruning.scored import PruneResult, Scoring
from .surgery.apply import Receipt, apply
from .surgery.checkpoint import load, save
from .surgery.masking import masked
from .surgery.verdict import Verification
from .surgery.verify import verify
from .surgery.weights import Loaded, load_weights

if TYPE_CHECKING:
    from .export.formats import to_executorch, to_openvino, to_torchscript
    from .export.int8 import to_int8
    from .export.onnx_network import OnnxNetwork
    from .export.program import ExportOptions, to_onnx, to_program
    from .online import Child, Distillation, OnlineFilterClustering, Schedule, shrink
    from .surgery.model_card import Card
    from .surgery.pretrained import from_pretrained, push_to_hub, save_pretrained


__version__ = "0.2.0"


__all__ = [
    "CRITERIA",
    "Card",
    "ChannelGroup",
    "Child",
    "Cost",
    "Cut",
    "Distillation",
    "ExportOptions",
    "FilterfoldError",
    "LatencyBudget",
    "Loaded",
    "OnlineFilterClustering",
    "OnnxNetwork",
    "Plan",
    "PruneResult",
    "Receipt",
    "Repair",
    "Schedule",
    "Scoring",
    "Selection",
    "Slice",
    "Verification",
    "apply",
    "criterion",
    "from_clusters",
    "from_pretrained",
    "load",
    "load_weights",
    "masked",
    "measure",
    "measure_latency",
    "prune",
    "push_to_hub",
    "reestimate",
    "repair",
    "save",
    "save_pretrained",
    "score",
    "select",
    "shrink",
    "to_executorch",
    "to_int8",
    "to_onnx",
    "to_openvino",
    "to_program",
    "to_torchscript",
    "trace",
    "tracing_rule",
    "verify",
]


_LAZY = {
    "Card": "surgery.model_card",
    "Child": "online",
    "Distillation": "online",
    "ExportOptions": "export.program",
    "OnlineFilterClustering": "online",
    "OnnxNetwork": "export.onnx_network",
    "Schedule": "online",
    "from_pretrained": "surgery.pretrained",
    "push_to_hub": "surgery.pretrained",
    "save_pretrained": "surgery.pretrained",
    "shrink": "online",
    "to_executorch": "export.formats",
    "to_int8": "export.int8",
    "to_onnx": "export.program",
    "to_openvino": "export.formats",
    "to_program": "export.program",
    "to_torchscript": "export.formats",
}
"""Names that are imported when first used, and the modules they come from."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
