"""Lightning Fabric as `train` needs it, and commands of which torchrun starts several processes."""

from __future__ import annotations

import inspect
import logging
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import ConfigError, TrainingError
from ..utils import distributed
from ..utils.model_state import preserved
from ..zoo.registry import FILE_MODULE, load_file
from .recipe import Recipe

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from lightning_fabric.strategies.ddp import DDPStrategy


def _joined() -> ClusterEnvironment:
    """Tell Fabric the ranks that `torch.distributed` has, however the processes were started."""
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    class Joined(TorchElasticEnvironment):
        def world_size(self) -> int:
            return distributed.world_size()

        def global_rank(self) -> int:
            return distributed.rank()

        def local_rank(self) -> int:
            return distributed.local_rank()

        def node_rank(self) -> int:
            return distributed.rank() // distributed.local_world_size()

    return Joined()


def _strategy(*, unreached: bool) -> DDPStrategy:
    """DDP that leaves batch norm's running statistics to the training loop, which averages them once an epoch.

    **Arguments:**

    - `unreached`: whether some parameters get no gradient.
    """
    from lightning_fabric.strategies.ddp import DDPStrategy

    known = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {buffers: False, "find_unused_parameters": unreached}
    return DDPStrategy(**options)


def make(device: str, recipe: Recipe, model: nn.Module, example: Tensor) -> Fabric:
    """Make a Fabric for a device, with data-parallel training if several processes train together.

    **Arguments:**

    - `device`: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
    - `model`, `example`: to find out which parameters no gradient will reach.

    **Raises:** `ConfigError` for what this machine, or several processes, can't do.
    """
    from lightning_fabric import Fabric

    accelerator, index = _accelerator(device, recipe)
    if distributed.world_size() == 1:
        chosen: list[int] | int = [int(index)] if index else 1
        return Fabric(accelerator=accelerator, devices=chosen, precision=recipe.precision)

    if index:
        raise ConfigError(f"device={device!r}: each of several processes takes the GPU of its own number; give cuda")
    if accelerator == "mps" or recipe.cuda_graphs:
        what = "on mps" if accelerator == "mps" else "as CUDA graphs"
        raise ConfigError(f"several processes can't train {what}; leave that out")
    fabric = Fabric(
        accelerator=accelerator,
        devices=distributed.local_world_size(),
        num_nodes=distributed.world_size() // distributed.local_world_size(),
        strategy=_strategy(unreached=_unreached(model, example)),
        plugins=[_joined()],
        precision=recipe.precision,
    )
    fabric.launch()
    return fabric


def _accelerator(device: str, recipe: Recipe) -> tuple[str, str]:
    """The kind of device, and its number or ""."""
    accelerator, _, index = device.partition(":")
    if accelerator not in ("auto", "cpu", "cuda", "mps"):
        raise ConfigError(f"device={device!r} is not auto, cpu, cuda, cuda:N or mps")
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={device!r}: PyTorch sees no CUDA device here; use cpu")
    if accelerator != "cuda" and recipe.precision == "16-mixed":
        raise ConfigError(f"precision='16-mixed' needs a GPU, not {accelerator}; use bf16-mixed or 32-true")
    if accelerator != "cuda" and recipe.cuda_graphs:
        raise ConfigError(f"cuda_graphs=True needs a CUDA GPU, not {accelerator}; leave it out")
    return accelerator, index


def _unreached(model: nn.Module, example: Tensor) -> bool:
    """Whether some parameter takes no part in the output, so that DDP must not wait for its gradient."""
    wanted = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    where = next(model.parameters()).device
    try:
        with preserved(model), torch.enable_grad():
            logits = model(example.to(where))
    except (RuntimeError, ValueError, TypeError, AssertionError, SystemExit):
        return False  # `check_fit` will say what is wrong
    reached: set[int] = set()
    seen: set[Any] = set()
    nodes = [logits.grad_fn] if isinstance(logits, Tensor) else []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        reached.add(id(getattr(node, "variable", None)))
        nodes += [following for following, _ in node.next_functions]
    return not wanted <= reached


_LOG = logging.getLogger("filterfold.training")


PATIENCE = timedelta(minutes=1)
"""How long ranks that gave up wait for the others to give up as well."""


_waiting = False
"""Whether the other ranks wait for this one to hand out work."""


def lead_or_follow(command: Callable[[], object], work: Callable[[Any], object]) -> None:
    """Join the other ranks; rank 0 runs the command, the others do the work that it hands out until it ends.

    Only training is shared: rank 0 alone reads and writes files, cuts, times and reports, so no other part of a command
    needs to know that there are several processes.

    **Arguments:**

    - `command`: what rank 0 does.
    - `work`: what every other rank does with what it is handed.
    """
    global _waiting
    distributed.join()
    if not distributed.is_first():
        _follow(work)
        distributed.leave()
        return
    _waiting = distributed.world_size() > 1
    try:
        command()
    finally:
        if _waiting:
            _waiting = False
            distributed.agreed(None)
        distributed.leave()


@contextmanager
def handed_out(job: Any) -> Iterator[None]:
    """Hand a job to the waiting ranks, if there are any; they do it while this one does it in the `with` block.

    **Arguments:** `job`: something that can be pickled, with its tensors on the CPU.

    **Raises:** `TrainingError` if the job can't be sent; `SystemExit` if another rank is gone: only a new start from
    the checkpoint helps.
    """
    global _waiting
    if not _waiting:
        yield
        return
    # A follower must know the modules of a user's own files before it can take a job with classes from them.
    files = [str(module.__file__) for name, module in sys.modules.items() if name.startswith(FILE_MODULE)]
    distributed.agreed((files, torch.get_num_threads()))
    try:
        distributed.agreed(job)
    except (pickle.PicklingError, AttributeError, TypeError) as error:  # nothing has been sent yet
        distributed.agreed(None)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrainingError(
            f"the work can't be sent to the other processes ({reason}); train by a script that calls "
            "filterfold.training.train in every process"
        ) from error
    try:
        yield
    except Exception as error:
        try:
            _all_gave_up()
        except RuntimeError:
            _waiting = False
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise SystemExit(
                f"filterfold: another process is gone ({reason}); the same command goes on from here"
            ) from error
        raise


def _follow(work: Callable[[Any], object]) -> None:
    nothing: Any = None
    while (about := distributed.agreed(nothing)) is not None:
        files, threads = about
        torch.set_num_threads(threads)
        for path in files:
            load_file(Path(path))
        if (job := distributed.agreed(nothing)) is None:
            continue
        try:
            work(job)
        except Exception as error:
            _LOG.debug("rank %d gave up", distributed.rank(), exc_info=error)
            try:
                _all_gave_up()
            except RuntimeError:  # the others go on, and would wait for this one: end, and torchrun ends them
                raise error from None


def _all_gave_up() -> None:
    """Make sure that every rank ended the job with an error, as when data and network don't fit.

    **Raises:** `RuntimeError` if one goes on.
    """
    dist.monitored_barrier(distributed.control(), timeout=PATIENCE)
