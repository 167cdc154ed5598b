"""Verification: the cut network must compute what the uncut one computes with the plan imposed on it.

Two oracles. *Masking* imposes the plan without changing any size (`masked`); it judges every group
whose units are exact. *Permutation* judges the others, where a normalisation, softmax or mean runs over the
channels: shuffling interchangeable units of the uncut network must not change its outputs.

The error of an output is max|a - b| / max|a|, and the error of a network the largest over its outputs. Networks
amplify rounding differently, so a float32 error above `TOLERANCES` is decided by running again in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..errors import VerificationError
from ..plan import ChannelGroup, Plan
from ..utils.inputs import batch_of, informative_inputs
from ..utils.model_state import preserved
from ..utils.modules import unwrap
from .apply import Cuttings
from .judge import TOLERANCES, Errors, Judge, NotFiniteError, Repair, Verification, type_of
from .masking import masked

__all__ = ["TOLERANCES", "Repair", "Verification", "masked", "rehearse", "verify"]


@torch.inference_mode(mode=False)  # else new tensors could never be trained
def verify(
    pruned: nn.Module,
    original: nn.Module,
    plan: Plan,
    example_inputs: Any,
    *,
    groups: Iterable[ChannelGroup] | None = None,
    tolerance: float | None = None,
) -> Verification:
    """Hold a pruned model against the original it was cut from.

    Both are run in eval mode on the example inputs (constant ones are replaced by noise), with the
    values that they have. A branch that starts at zero hides what lies behind it; `rehearse`, which
    `prune` uses, puts generic values there.

    **Arguments:**

    - `pruned`: the model after `apply(plan, ...)`, not trained since.
    - `original`: the model before it; changed for the time of the call and given back bit for bit.
    - `plan`: what was applied.
    - `example_inputs`: a tensor, a tuple of arguments, or a dictionary of keyword arguments.
    - `groups`: from `trace`; says which groups are exact. Without it all are taken to be.
    - `tolerance`: largest relative error; by default by the model's type, with float64 deciding.

    **Returns:** a `Verification`; a mismatch is reported, not raised.

    **Raises:** `VerificationError` if the original itself does not run, or both are the same object.

    ```python
    >>> import copy
    >>> from filterfold.plan import Cut, Slice
    >>> from filterfold.surgery.apply import apply
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> made = tuple(Slice(name, 0, (0, 1, 2), "filter") for name in ("0.weight", "0.bias"))
    >>> plan = Plan((Cut("0", (0, -1, 1), made, (Slice("2.weight", 1, (0, 1, 2), "kernel"),)),))
    >>> small = copy.deepcopy(net)
    >>> _ = apply(plan, small)
    >>> verify(small, net, plan, torch.randn(4, 2)).ok
    True

    ```
    """
    pruned, original = unwrap(pruned), unwrap(original)
    if pruned is original:
        raise VerificationError("verify needs the original beside the pruned model: copy it before cutting")
    judge = Judge(plan, groups, original, None)

    def trial(dtype: torch.dtype | None) -> Errors:
        inputs = informative_inputs(example_inputs, dtype)
        with preserved(original, dtype=dtype):
            expected, shuffled = judge.references(inputs)
        with preserved(pruned, dtype=dtype):
            actual, failure = judge.run(pruned, inputs)
        return judge.errors(expected, shuffled, actual, failure)

    return judge.decide(trial, type_of(original), tolerance)


@torch.inference_mode(mode=False)  # else new tensors could never be trained
def rehearse(
    model: nn.Module,
    plan: Plan,
    example_inputs: Any,
    *,
    groups: Iterable[ChannelGroup] | None = None,
    tolerance: float | None = None,
    repair: Repair | None = None,
    cuttings: Cuttings | None = None,
    count: bool = False,
) -> Verification:
    """Try a plan on a model, judge the outcome by both oracles, and take everything back.

    Needs no copy of the model. Constant and tiny parameters have random values meanwhile, so that
    a fresh network, with zeros in its last batch norms, hides nothing.

    **Arguments:** as for `verify`, and

    - `repair`: asked where the cut network fails or differs, for sizes written into user code; what it finds
      is part of the verification.
    - `cuttings`: collects what was cut, for `apply` to take over.
    - `count`: whether to count what the cut network costs, as long as the inputs are one example.

    **Returns:** a `Verification`.

    **Raises:** `PlanError` or `SurgeryError` if the plan can't be applied; `VerificationError` if the
    model does not run as it is.
    """
    model = unwrap(model)
    if cuttings is not None:
        cuttings.begin()
    judge = Judge(plan, groups, model, repair, cuttings, count and batch_of(example_inputs) == 1)

    def trial_with(generic: bool) -> Callable[[torch.dtype | None], Errors]:
        def trial(dtype: torch.dtype | None) -> Errors:
            inputs = informative_inputs(example_inputs, dtype)
            with preserved(model, dtype=dtype, generic=generic):
                return judge.rehearsal(inputs)

        return trial

    try:
        judge.finite_only = True
        return judge.decide(trial_with(True), type_of(model), tolerance)
    except NotFiniteError:
        judge.finite_only = False
        return judge.decide(trial_with(False), type_of(model), tolerance)
