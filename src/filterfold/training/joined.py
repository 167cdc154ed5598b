"""What Lightning Fabric must know about processes that have joined already. Imported only where there are some."""

from __future__ import annotations

import inspect
from typing import Any

import torch.distributed as dist
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from .. import ranks


class Joined(TorchElasticEnvironment):
    """Ranks as `torch.distributed` has them, however the processes were started."""

    def world_size(self) -> int:
        """Number of processes."""
        return dist.get_world_size()

    def global_rank(self) -> int:
        """The number of this one."""
        return dist.get_rank()

    def local_rank(self) -> int:
        """Its number on its machine."""
        return ranks.place()

    def node_rank(self) -> int:
        """The number of its machine."""
        return ranks.rank() // ranks.here()


def strategy(*, unreached: bool) -> DDPStrategy:
    """DDP that leaves batch norm's running statistics to the training loop, which averages them once an epoch.

    **Arguments:**

    - `unreached`: whether some parameters get no gradient.
    """
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {buffers: False, "find_unused_parameters": unreached}
    return DDPStrategy(**options)
