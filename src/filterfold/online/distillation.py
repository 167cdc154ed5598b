"""The network's own larger, earlier self as a teacher."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..profiling.macs import measure
from ..surgery.layer_attributes import restore, snapshot


class Teacher:
    """A frozen copy of a network, in eval mode, that its smaller successor learns from.

    Knowledge distillation (Hinton et al. 2015, section 2) with the network as it was before a cut as the teacher, so
    no second training is needed for it.

    **Arguments:**

    - `model`: what is copied.
    - `temperature`: by which both networks' logits are divided.
    """

    def __init__(self, model: nn.Module, temperature: float = 2.0) -> None:
        self.network = copy.deepcopy(model).eval().requires_grad_(False)
        self.network.zero_grad(set_to_none=True)
        self.temperature = temperature

    def loss(self, inputs: Any, logits: Tensor) -> Tensor:
        """T² · KL(teacher ‖ pupil) of the softened class probabilities, a mean over the batch.

        **Arguments:**

        - `inputs`: what the pupil was given.
        - `logits`: what it said to that, shape (b, classes).

        **Returns:** a scalar that only the pupil's logits have gradients of.

        ```python
        >>> teacher = Teacher(nn.Linear(2, 3))
        >>> images = torch.randn(5, 2)
        >>> float(teacher.loss(images, teacher.network(images))) < 1e-6
        True

        ```
        """
        with torch.no_grad():
            wanted = functional.log_softmax(self.network(inputs).float() / self.temperature, dim=1)
        said = functional.log_softmax(logits.float() / self.temperature, dim=1)
        return self.temperature**2 * functional.kl_div(said, wanted, reduction="batchmean", log_target=True)

    def macs(self, example_inputs: Any) -> int:
        """Multiply-accumulates of one forward pass for one example."""
        return measure(self.network, example_inputs).macs

    def state_dict(self) -> dict[str, Any]:
        """Sizes and tensors."""
        return {"structure": snapshot(self.network), "tensors": dict(self.network.state_dict())}

    @classmethod
    def revived(cls, state: Mapping[str, Any], model: nn.Module, temperature: float = 2.0) -> Teacher:
        """The teacher that a state is of; `model` is its successor, of whatever size, and stays as it is."""
        teacher = cls(model, temperature)
        restore(teacher.network, state["structure"])
        teacher.network.load_state_dict(state["tensors"])
        return teacher
