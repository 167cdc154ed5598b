"""A network whose forward and backward passes are replayed as CUDA graphs.

A small network keeps a GPU waiting for Python: hundreds of kernels of a few microseconds each. Recorded once and
replayed, they run one after the other. Loss, callbacks and the optimizer's step stay outside, so everything that may
change between batches may still change.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


class Graphed(nn.Module):
    """Records a network for one batch size.

    In eval mode the network runs as it is. Nothing is done to the network itself, so after a cut it can be recorded
    again.

    **Arguments:**

    - `model`: in training mode, on the GPU.
    - `images`: a batch of the size, type and memory format of those to come.
    - `dtype`: of autocast, or None.
    """

    def __init__(self, model: nn.Module, images: Tensor, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.training = model.training  # not train(), which would wake frozen batch norms
        kept = [(buffer, buffer.clone()) for buffer in model.buffers()]  # the rehearsals move running statistics
        autocast: AbstractContextManager[object] = nullcontext()
        if dtype is not None:  # casts that are remembered outside a graph are gone when it is replayed
            autocast = torch.autocast(images.device.type, dtype=dtype, cache_enabled=False)
        devices = [images.device] if images.device.type == "cuda" else []
        with torch.random.fork_rng(devices), autocast:
            torch.cuda.make_graphed_callables(self, (images,), allow_unused_input=True)
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)

    def forward(self, images: Tensor) -> Tensor:
        """The network's logits."""
        logits: Tensor = self.model(images)
        return logits
