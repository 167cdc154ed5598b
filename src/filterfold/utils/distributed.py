"""One training run in several processes: their numbers, exchanging values, and renewing DDP after a cut."""

from __future__ import annotations

import atexit
import inspect
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import ConfigError, SurgeryError
from .modules import WRAPPERS

T = TypeVar("T")


PATIENCE = timedelta(days=7)
"""How long a rank waits for a value from rank 0: as long as any job lasts."""


_control: dict[int, Any] = {}


def launched() -> bool:
    """Whether torchrun started this process, as one of several or not."""
    return dist.is_available() and dist.is_torchelastic_launched()


def world_size() -> int:
    """Number of processes that train together; 1 until they have joined.

    >>> world_size(), rank(), is_first()
    (1, 0, True)
    """
    return dist.get_world_size() if _joined() else 1


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if _joined() else 0


def is_first() -> bool:
    """Whether this process is the one that decides, writes and shows: rank 0, or the only one."""
    return rank() == 0


def local_world_size() -> int:
    """Number of the processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if _joined() else 1


def local_rank() -> int:
    """The number of this process among those on this machine; it computes on the GPU of this number."""
    return int(os.environ.get("LOCAL_RANK", rank() % local_world_size())) if _joined() else 0


def join() -> None:
    """Join the other processes that torchrun started. Does nothing in a program that runs by itself, or twice.

    Tensors on the CPU are exchanged by gloo, those on a GPU by NCCL.

    **Raises:** `ConfigError` if there are more processes on this machine than GPUs, and there are GPUs.
    """
    if not launched() or _joined():
        return
    gpus = torch.cuda.device_count()
    own, together = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if gpus and together > gpus and own >= gpus:
        raise ConfigError(f"torchrun started {together} processes on a machine with {gpus} GPUs: give each one of them")
    if gpus:
        torch.cuda.set_device(own)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    atexit.register(leave)


def refuse_under_torchrun(what: str) -> None:
    """Refuse what can't be done in processes that torchrun started.

    **Raises:** `ConfigError`.
    """
    if launched():
        raise ConfigError(f"torchrun has every process train the same network, so no {what}: one or the other")


def leave() -> None:
    """Leave the other processes."""
    if _joined():
        _control.clear()
        dist.destroy_process_group()


def agreed(value: T) -> T:
    """Rank 0's value, in every process. All must call it, in the same order; the other processes' values are dropped.

    **Arguments:** `value`: anything that can be pickled; tensors on the CPU.

    >>> agreed([1, 2])
    [1, 2]
    """
    if world_size() == 1:
        return value
    told = [value if is_first() else None]
    dist.broadcast_object_list(told, src=0, group=control())
    return told[0]  # type: ignore[return-value]


def decided(decide: Callable[[], T]) -> T:
    """What a function gives when rank 0 calls it; if it raises there, that is raised in every process.

    >>> decided(lambda: 3)
    3
    """
    if world_size() == 1:
        return decide()
    value: Any = None
    error: BaseException | None = None
    if is_first():
        try:
            value = decide()
        except BaseException as raised:
            error = raised
    value, theirs = agreed((value, error))
    if is_first() and error is not None:
        raise error
    if theirs is not None:
        raise theirs
    return value  # type: ignore[no-any-return]


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place; bit for bit the same in each."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def averaged(tensors: Iterable[Tensor]) -> None:
    """Put the mean over all processes into floating-point tensors, and rank 0's values into others."""
    if world_size() == 1:
        return
    for tensor in tensors:
        if tensor.is_floating_point():
            summed(tensor).div_(world_size())
        else:
            dist.broadcast(tensor, src=0)


def shared(tensors: Iterable[Tensor]) -> None:
    """Put rank 0's values into tensors of equal shapes."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def own_part(length: int) -> slice:
    """The part of `length` things that this process takes: equal parts as far as possible, in order.

    >>> own_part(5)
    slice(0, 5, None)
    """
    return slice(rank() * length // world_size(), (rank() + 1) * length // world_size())


def control() -> Any:
    """The group of processes for objects other than tensors, practically without a time limit."""
    world = id(dist.group.WORLD)
    if world not in _control:
        _control.clear()
        _control[world] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _control[world]


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


INNER = WRAPPERS | {"_FabricModule": "_forward_module"}
"""Class name of a wrapper → the next module inwards, as Fabric keeps DDP beside the user's own module."""


_OPTIONS = ("device_ids", "output_device", "dim", "process_group", "find_unused_parameters", "gradient_as_bucket_view",
            "static_graph", "skip_all_reduce_unused_params", "batched_grad_copy")  # fmt: skip


def check_wrappers(model: nn.Module) -> None:
    """Refuse wrappers that `renew` could not renew after a cut.

    **Raises:** `SurgeryError` for DDP with options that can't be told from the wrapper.
    """
    for wrapper in _data_parallel(model):
        if getattr(wrapper, "mixed_precision", None) is not None or getattr(wrapper, "_delay_all_reduce_params", None):
            raise SurgeryError(
                "DDP with mixed_precision or delayed all-reduce can't be renewed in place: "
                "give the module inside, and wrap it again after each cut"
            )


def renew(model: nn.Module) -> None:
    """Make the DDP wrappers around a network follow its parameters' new sizes, in place; without any, do nothing.

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
