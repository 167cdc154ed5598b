"""The training recipe: all hyperparameters in one immutable value."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import nn

from ..errors import ConfigError

Schedule = Literal["step", "constant", "cosine", "onecycle"]


Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


AUTOCAST: dict[str, torch.dtype | None] = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Precision → type for `torch.autocast`, or None for no autocast."""


_LATER = ("cuda_graphs", "validate_every")
"""Fields that were added later: `to_dict` leaves them out where they have their defaults."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train: SGD with momentum. The defaults are those of the document that this project reproduces.

    **Arguments:**

    - `epochs`, `batch_size`: images a step, over all processes if several train together. An incomplete last batch is
      left out (other images each epoch).
    - `lr`, `momentum`, `nesterov`, `weight_decay`: of SGD.
    - `decay_norms`: whether weight decay also pulls on biases and normalisation parameters.
    - `schedule`: `step`: divide by `step_factor` every `step_every` epochs; `constant`; `cosine`: to zero by half
      a cosine (Loshchilov & Hutter 2017), batch by batch; `onecycle`: linearly up over the share `warmup` of the
      training, then linearly to zero, batch by batch (the short form of Smith & Topin 2018).
    - `label_smoothing`: share of the target spread over all classes.
    - `augment`: policy for `data.batches`; None: what suits the data set.
    - `precision`: `32-true`, or autocast to bfloat16 or float16 (a GPU only). On CPUs without matrix units for
      bfloat16 (AMX) `32-true` with `channels_last` is the faster one.
    - `channels_last`: memory format of images and weights.
    - `compile`: run the network through `torch.compile`; after a cut it is compiled again.
    - `cuda_graphs`: replay the network's passes as CUDA graphs (a GPU only), which helps where the GPU waits for
      Python; with `compile` those that `torch.compile` makes.
    - `validate_every`: epochs from one validation to the next; the last epoch is always validated. 0: never.
    - `deterministic`: refuse PyTorch operations that are not. On the CPU training repeats bit for bit without it; on
      CUDA it also needs the environment variable `CUBLAS_WORKSPACE_CONFIG=:4096:8`.
    - `seed`: of order, augmentation and dropout. Initial weights are drawn by whoever builds the network.

    **Raises:** `ConfigError` for values that make no sense.

    ```python
    >>> recipe = Recipe(epochs=100)
    >>> [round(recipe.rate(epoch * 10, 10), 6) for epoch in (0, 59, 60, 99)]
    [0.02, 0.02, 0.004, 0.004]

    ```
    """

    epochs: int = 100
    batch_size: int = 128
    lr: float = 0.02
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    decay_norms: bool = True
    schedule: Schedule = "step"
    step_every: int = 60
    step_factor: float = 5.0
    warmup: float = 0.2
    label_smoothing: float = 0.0
    augment: str | None = None
    precision: Precision = "32-true"
    channels_last: bool = False
    compile: bool = False
    deterministic: bool = False
    seed: int = 0
    cuda_graphs: bool = False
    validate_every: int = 1

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        rules: tuple[tuple[str, bool, str], ...] = (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("lr", 0 < self.lr < math.inf, "above 0"),
            ("momentum", 0 <= self.momentum < 1, "from 0 up to below 1"),
            ("nesterov", not (self.nesterov and self.momentum == 0), "False without momentum"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0"),
            ("schedule", self.schedule in get_args(Schedule), f"one of {', '.join(get_args(Schedule))}"),
            ("step_every", self.step_every >= 1, "at least 1"),
            ("step_factor", 0 < self.step_factor < math.inf, "above 0"),
            ("warmup", 0 <= self.warmup < 1, "from 0 up to below 1"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "from 0 up to below 1"),
            ("validate_every", self.validate_every >= 0, "at least 0"),
            ("precision", self.precision in get_args(Precision), f"one of {', '.join(get_args(Precision))}"),
        )
        for name, good, wanted in rules:
            if not good:
                raise ConfigError(f"recipe: {name}={getattr(self, name)!r} makes no sense; it must be {wanted}")

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values; those added later only where they differ from their defaults.

        The id of a trial is made from these values, and must not change because a field was added.

        >>> sorted(set(Recipe(cuda_graphs=True).to_dict()) - set(Recipe().to_dict()))
        ['cuda_graphs']
        """
        plain = asdict(self)
        defaults = {entry.name: entry.default for entry in fields(self)}
        return {key: value for key, value in plain.items() if key not in _LATER or value != defaults[key]}

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a batch: `step` counts batches from 0 over the whole training."""
        return self.lr * _FRACTIONS[self.schedule](self, step, steps_per_epoch)

    def optimizer(self, model: nn.Module) -> torch.optim.SGD:
        """SGD over the parameters that require gradients."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise ConfigError("the network has no parameter that requires a gradient, so there is nothing to train")
        groups: list[dict[str, object]] = [{"params": trained}]
        if not self.decay_norms:
            matrices = [parameter for parameter in trained if parameter.ndim > 1]
            vectors = [parameter for parameter in trained if parameter.ndim <= 1]
            groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
            groups = [group for group in groups if group["params"]]
        return torch.optim.SGD(
            groups, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
        )


def _step(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    return float(recipe.step_factor ** -(step // steps_per_epoch // recipe.step_every))


def _constant(_recipe: Recipe, _step: int, _steps_per_epoch: int) -> float:
    return 1.0


def _cosine(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    return (1 + math.cos(math.pi * step / (recipe.epochs * steps_per_epoch))) / 2


def _onecycle(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    done = (step + 0.5) / (recipe.epochs * steps_per_epoch)  # the middle of the batch: never zero at either end
    if done < recipe.warmup:
        return done / recipe.warmup
    return (1 - done) / (1 - recipe.warmup)


_FRACTIONS: dict[str, Callable[[Recipe, int, int], float]] = {
    "step": _step,
    "constant": _constant,
    "cosine": _cosine,
    "onecycle": _onecycle,
}
