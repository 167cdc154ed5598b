"""Lightning Fabric for the present process: one device, or one of several processes' devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ranks
from ..errors import ConfigError
from ..modes import undisturbed
from .recipe import Recipe

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def make(device: str, recipe: Recipe, model: nn.Module, example: Tensor) -> Fabric:
    """Fabric for a device, with data-parallel training if processes have joined.

    **Arguments:**

    - `device`: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
    - `model`, `example`: to find out which parameters no gradient will reach.

    **Raises:** `ConfigError` for what this machine, or several processes, can't do.
    """
    from lightning_fabric import Fabric

    accelerator, index = _accelerator(device, recipe)
    if ranks.count() == 1:
        chosen: list[int] | int = [int(index)] if index else 1
        return Fabric(accelerator=accelerator, devices=chosen, precision=recipe.precision)
    from .joined import Joined, strategy

    if index:
        raise ConfigError(f"device={device!r}: each of several processes takes the GPU of its own number; give cuda")
    if accelerator == "mps" or recipe.cuda_graphs:
        what = "on mps" if accelerator == "mps" else "as CUDA graphs"
        raise ConfigError(f"several processes can't train {what}; leave that out")
    fabric = Fabric(
        accelerator=accelerator,
        devices=ranks.here(),
        num_nodes=ranks.count() // ranks.here(),
        strategy=strategy(unreached=_unreached(model, example)),
        plugins=[Joined()],
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
        with undisturbed(model), torch.enable_grad():
            logits = model(example.to(where))
    except (RuntimeError, ValueError, TypeError, AssertionError):
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
