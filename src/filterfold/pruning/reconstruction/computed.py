"""Kernels that are computed from parameters: by weight standardisation, weight norm, or whatever a network does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ...errors import pass_on_exhaustion
from ...utils.dispatch import Function, tensors_in
from .least_squares import Problem, exact

_STEPS = 200
"""Steps of L-BFGS, at most."""


Step = tuple[Function, tuple[Any, ...], Mapping[str, Any], Any]
"""An operation on parameters and buffers alone: function, arguments, keyword arguments, result."""


@dataclass(frozen=True, slots=True)
class Computation:
    """How a kernel comes from parameters.

    **Arguments:**

    - `steps`: the operations, in their order.
    - `parameters`: the parameters that it depends on, by name.
    - `kernel`: what it gave.
    """

    steps: tuple[Step, ...]
    parameters: Mapping[str, Tensor]
    kernel: Tensor

    @classmethod
    def of(cls, kernel: Tensor, steps: Sequence[Step], parameters: Mapping[str, Tensor]) -> Computation:
        """Those of the steps and parameters that count for a kernel."""
        needed, found = {id(kernel)}, []
        for step in reversed(steps):
            if any(id(tensor) in needed for tensor in tensors_in((step[3],))):
                found.append(step)
                needed.update(id(tensor) for tensor in tensors_in((*step[1], *step[2].values())))
        own = {name: value for name, value in parameters.items() if id(value) in needed}
        return cls(tuple(reversed(found)), own, kernel)

    def reproduces(self) -> bool:
        """Whether computing the kernel again gives the same."""
        try:
            again = self.again({})
        except (RuntimeError, TypeError) as error:
            pass_on_exhaustion(error)
            return False
        return again.shape == self.kernel.shape and torch.allclose(again, exact(self.kernel), rtol=1e-3, atol=1e-5)

    def again(self, values: Mapping[str, Tensor]) -> Tensor:
        """The kernel in float64, from other values of some parameters."""
        known = {id(self.parameters[name]): value for name, value in values.items()}

        def given(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in known:
                known[id(value)] = exact(value).clone() if value.is_floating_point() else value.clone()
            return known[id(value)]

        for func, args, kwargs, result in self.steps:
            made = func(*tree_map(given, args), **tree_map(given, dict(kwargs)))
            known.update(zip(map(id, tensors_in((result,))), tensors_in((made,)), strict=True))
        return known[id(self.kernel)]

    def fit(
        self, problem: Problem, ridge: float, names: Sequence[str], form: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Values of the named parameters whose kernel is the least-squares one, as nearly as they allow.

        `form` brings a kernel into the shape `(groups, inputs, outputs)`. By L-BFGS, from the present values, so that
        it is never worse than those.
        """
        with torch.inference_mode(False), torch.enable_grad():
            values = {name: exact(self.parameters[name]).clone().requires_grad_() for name in names}
            problem = problem.clone()
            start = form(exact(self.kernel).clone())
            optimizer = torch.optim.LBFGS(
                [*values.values()],
                max_iter=_STEPS,
                tolerance_grad=1e-9,
                tolerance_change=1e-12,
                line_search_fn="strong_wolfe",
            )

            def loss() -> Tensor:
                optimizer.zero_grad()
                found = problem.loss(form(self.again(values)) - start, ridge)
                found.backward()  # type: ignore[no-untyped-call]
                return found

            optimizer.step(loss)  # type: ignore[no-untyped-call]
            return {name: value.detach() for name, value in values.items()}
