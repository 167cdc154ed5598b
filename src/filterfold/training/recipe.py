"""The training recipe: all hyperparameters in one immutable value."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import nn

from ..errors import ConfigError
from ..utils.arguments import check_fields
from ..utils.modules import classifier

Schedule = Literal["step", "constant", "cosine", "onecycle", "warmup-cosine"]


Optimizer = Literal["sgd", "adamw"]


Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


AUTOCAST: dict[str, torch.dtype | None] = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Precision → type for `torch.autocast`, or None for no autocast."""


_LATER = ("cuda_graphs", "validate_every", "optimizer", "head_lr", "ema", "freeze_norms", "clip")
"""Fields that were added later: `to_dict` leaves them out where they have their defaults."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train. The defaults are those of the document that this project reproduces: SGD with momentum.

    **Arguments:**

    - `epochs`, `batch_size`: images a step, over all processes if several train together. An incomplete last batch is
      left out (other images each epoch).
    - `optimizer`: `sgd`; or `adamw` (Loshchilov & Hutter 2019), for which rates of .001 and less are usual.
    - `lr`, `weight_decay`: of either. `momentum`: of SGD; of AdamW it is β₁ (β₂ is .999). `nesterov`: of SGD.
    - `head_lr`: the classifier, the last layer with as many outputs as there are classes, learns at so many times the
      rate: 10, say, where it is new and everything else is pretrained.
    - `decay_norms`: whether weight decay also pulls on biases and normalisation parameters.
    - `schedule`: `step`: divide by `step_factor` every `step_every` epochs; `constant`; `cosine`: to zero by half
      a cosine (Loshchilov & Hutter 2017), batch by batch; `onecycle`: linearly up over the share `warmup` of the
      training, then linearly to zero, batch by batch (the short form of Smith & Topin 2018); `warmup-cosine`: likewise
      up, then by half a cosine.
    - `label_smoothing`: share of the target spread over all classes.
    - `clip`: gradients are scaled down to this norm, over all parameters together, where theirs is larger; 0: never.
    - `ema`: decay of a moving average of weights and running statistics, such as .999, which is validated and which
      training ends with; 0: none. After step n it is at most (1 + n) / (10 + n), so that short trainings forget what
      they began with.
    - `freeze_norms`: batch norms go on with the running statistics that they have; scales and shifts are trained.
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
    optimizer: Optimizer = "sgd"
    head_lr: float = 1.0
    ema: float = 0.0
    freeze_norms: bool = False
    clip: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        check_fields(self)
        rules: tuple[tuple[str, bool, str], ...] = (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("lr", 0 < self.lr < math.inf, "above 0"),
            ("momentum", 0 <= self.momentum < 1, "from 0 up to below 1"),
            ("nesterov", not (self.nesterov and self.momentum == 0), "False without momentum"),
            ("nesterov", not (self.nesterov and self.optimizer != "sgd"), "False unless by SGD"),
            ("optimizer", self.optimizer in get_args(Optimizer), f"one of {', '.join(get_args(Optimizer))}"),
            ("head_lr", 0 < self.head_lr < math.inf, "above 0"),
            ("ema", 0 <= self.ema < 1, "from 0 up to below 1"),
            ("clip", 0 <= self.clip < math.inf, "at least 0"),
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

    def make_optimizer(self, model: nn.Module, classes: int | None = None) -> torch.optim.Optimizer:
        """The optimizer over the parameters that require gradients.

        **Arguments:** `classes`: outputs of the classifier; None: the last layer is one.

        **Raises:** `ConfigError` if nothing requires a gradient, or `head_lr` finds no classifier.
        """
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise ConfigError("the network has no parameter that requires a gradient, so there is nothing to train")
        head: set[int] = set()
        if self.head_lr != 1:
            name = classifier(model, classes)
            if name is None:
                raise ConfigError(
                    f"head_lr={self.head_lr:g}: no layer of the network has {classes} outputs; leave it out"
                )
            head = {id(parameter) for parameter in model.get_submodule(name).parameters()}
        kinds: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for parameter in trained:
            kinds.setdefault((id(parameter) in head, parameter.ndim <= 1 and not self.decay_norms), []).append(
                parameter
            )
        groups = [
            {
                "params": members,
                "lr": self.lr * (self.head_lr if of_head else 1.0),
                "weight_decay": 0.0 if undecayed else self.weight_decay,
            }
            for (of_head, undecayed), members in sorted(kinds.items(), key=lambda entry: entry[0])
        ]
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, betas=(self.momentum, 0.999))
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)


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


def _warmup_cosine(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    done = (step + 0.5) / (recipe.epochs * steps_per_epoch)
    if done < recipe.warmup:
        return done / recipe.warmup
    return (1 + math.cos(math.pi * (done - recipe.warmup) / (1 - recipe.warmup))) / 2


_FRACTIONS: dict[str, Callable[[Recipe, int, int], float]] = {
    "step": _step,
    "constant": _constant,
    "cosine": _cosine,
    "onecycle": _onecycle,
    "warmup-cosine": _warmup_cosine,
}
