"""Cutting a network that several processes train: what the wrapper of each must learn."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import SurgeryError
from ..structure import WRAPPERS

INNER = WRAPPERS | {"_FabricModule": "_forward_module"}
"""Class name of a wrapper → the next module inwards, as Fabric keeps DDP beside the user's own module."""

_OPTIONS = ("device_ids", "output_device", "dim", "process_group", "find_unused_parameters", "gradient_as_bucket_view",
            "static_graph", "skip_all_reduce_unused_params", "batched_grad_copy")  # fmt: skip


def check_wrappers(model: nn.Module) -> None:
    """Refuse now what could not be taken up after a cut.

    **Raises:** `SurgeryError` for DDP with options that can't be told from the wrapper.
    """
    for wrapper in _data_parallel(model):
        if getattr(wrapper, "mixed_precision", None) is not None or getattr(wrapper, "_delay_all_reduce_params", None):
            raise SurgeryError(
                "DDP with mixed_precision or delayed all-reduce can't be renewed in place: "
                "give the module inside, and wrap it again after each cut"
            )


def renew(model: nn.Module) -> None:
    """Let the DDP wrappers around a network take up its parameters' new sizes, in place; without any, do nothing.

    The wrapper is initialised again with the options, hooks and mode that it has, so whoever holds it goes on. All
    processes must call this; weights and, where DDP does so, buffers are rank 0's afterwards.
    """
    for wrapper in _data_parallel(model):
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        options: dict[str, Any] = {name: getattr(wrapper, name) for name in _OPTIONS if name in known}
        newer = "forward_sync_buffers" in known
        options["forward_sync_buffers" if newer else "broadcast_buffers"] = wrapper.broadcast_buffers
        if not wrapper.bucket_bytes_cap_default:
            options["bucket_cap_mb"] = wrapper.bucket_bytes_cap / 2**20
        kept = {name: value for name, value in vars(wrapper).items() if "hooks" in name and name in vars(nn.Module())}
        hooks, training = list(getattr(wrapper, "_comm_hooks", ())), wrapper.training
        del wrapper.reducer, wrapper.logger  # with them go their hooks on the gradients
        DistributedDataParallel.__init__(wrapper, wrapper.module, **options)
        vars(wrapper).update(kept, training=training)
        for hook, state in hooks:
            wrapper.register_comm_hook(state, hook)


def _data_parallel(model: nn.Module) -> list[Any]:
    """The DDP wrappers around a network, from outside inwards."""
    found = []
    while type(model).__name__ in INNER:
        if isinstance(model, DistributedDataParallel):
            found.append(model)
        model = getattr(model, INNER[type(model).__name__])
    return found
