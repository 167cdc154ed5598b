"""Verification: the cut network must compute what the uncut one computes with the plan imposed on it.

Three comparisons. *Masking* imposes the plan without changing any size (`masked`); it applies to every group
whose units are exact. *Dead units* (`emptied`) serve groups that no kernel reads, such as the queries and keys of
attention: the units that go are zero from their layers on. *Permutation* serves the others, where a normalisation,
softmax or mean runs over the channels: shuffling interchangeable units of the uncut network must not change its
outputs.

The error of an output is max|a - b| / max|a|, and the error of a network the largest over its outputs. Networks
amplify rounding differently, so a float32 error above `TOLERANCES` is decided by running again in float64. Where
outputs jump (the best boxes of many, the nearest entry of a codebook), an error above it is decided by running again
with the same decisions in both networks, and comparing what they were taken on as well. Random numbers are held still.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, FilterfoldError, VerificationError, one_line, pass_on_exhaustion
from ..plan import ChannelGroup, Cut, Plan
from ..profiling.macs import Cost, Counting
from ..utils.arguments import typed
from ..utils.inputs import batch_of, check_inputs, difference, informative_inputs, outputs
from ..utils.model_state import preserved
from ..utils.modules import named_tensors, unwrap
from ..utils.same_choices import Decisions
from .apply import Rewrite, apply, apply_with_sizes
from .cut_cache import CutCache
from .index_maps import edits_of
from .masking import emptied, masked, permuted, rebased
from .verdict import TOLERANCES, Errors, Verification, describe

_LOG = logging.getLogger("filterfold.verify")


@typed
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
    """Compare a pruned model with the original that it was cut from.

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
    >>> from filterfold import apply
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
    check_inputs(example_inputs, with_data=True)
    if tolerance is not None and tolerance < 0:
        raise ConfigError(f"tolerance={tolerance}: a relative error, at least 0")
    comparison = _Comparison(original, plan, groups)

    def compare(dtype: torch.dtype | None) -> Errors:
        inputs = informative_inputs(example_inputs, dtype)
        with preserved(original, dtype=dtype):
            expected, permutation = comparison.references(inputs)
        with preserved(pruned, dtype=dtype), comparison.again():
            try:
                return Errors(comparison.error(expected, outputs(pruned, inputs)), permutation)
            except Exception as reason:
                pass_on_exhaustion(reason)
                return Errors(None, permutation, one_line(reason))

    return comparison.decide(compare, tolerance)


@torch.inference_mode(mode=False)  # else new tensors could never be trained
def rehearse(
    model: nn.Module,
    plan: Plan,
    example_inputs: Any,
    *,
    groups: Iterable[ChannelGroup] | None = None,
    tolerance: float | None = None,
    rewrite: Rewrite | None = None,
    cache: CutCache | None = None,
    count: bool = False,
) -> Verification:
    """Try a plan on a model, compare the outcome, and take everything back.

    Needs no copy of the model. Constant and tiny parameters have random values meanwhile, so that
    a fresh network, with zeros in its last batch norms, hides nothing.

    **Arguments:** as for `verify`, and

    - `rewrite`: called where the cut network fails or differs, for sizes in the model's own code; what it changes
      is part of the verification.
    - `cache`: collects what was cut, for `apply` to take over.
    - `count`: whether to count what the cut network costs, as long as the inputs are one example.

    **Returns:** a `Verification`.

    **Raises:** `PlanError` or `SurgeryError` if the plan can't be applied; `VerificationError` if the
    model does not run as it is.
    """
    model = unwrap(model)
    if cache is not None:
        cache.begin()
    comparison = _Comparison(model, plan, groups, rewrite, cache)
    comparison.counts = count and batch_of(example_inputs) == 1

    def compare(dtype: torch.dtype | None) -> Errors:
        inputs = informative_inputs(example_inputs, dtype)
        with preserved(model, dtype=dtype, generic=comparison.generic):
            return comparison.rehearsal(inputs)

    try:
        comparison.generic = True
        return comparison.decide(compare, tolerance)
    except _OverflowError:
        comparison.generic = False
        return comparison.decide(compare, tolerance)


class _OverflowError(Exception):
    """Random values made the network overflow."""


class _Comparison:
    """A plan on a model: runs the cut network and the networks of the old size that it must equal.

    `plan` gets the sizes in the model's own code that turn out to need a change; `cost` and `suspects` are for the
    `Verification`. `generic`: whether the model has random values, which may make it overflow.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        groups: Iterable[ChannelGroup] | None,
        rewrite: Rewrite | None = None,
        cache: CutCache | None = None,
    ) -> None:
        self.model, self.plan, self.rewrite, self.cache = model, plan, rewrite, cache
        by_name = {group.name: group for group in groups or ()}
        inexact = [c for c in plan.cuts if c.changes and c.group in by_name and not by_name[c.group].exact]
        dead = [cut for cut in inexact if by_name[cut.group].zeros_vanish and not cut.folds]
        self.exact = tuple(cut for cut in plan.cuts if cut not in inexact)
        self.dead = frozenset(cut.group for cut in dead)
        self.inexact = tuple(cut for cut in inexact if cut not in dead)
        self.judged = (*self.exact, *dead)
        shuffled = [by_name[cut.group] for cut in self.inexact if by_name[cut.group].symmetric]
        self.interchangeable = {group.name: tuple(zip(group.classes, group.blocks, strict=True)) for group in shuffled}
        self.generic = self.counts = self.rewritten = False
        self.decisions: Decisions | None = None
        self.cost: Cost | None = None
        self.suspects: tuple[str, ...] = ()

    def decide(self, compare: Callable[[torch.dtype | None], Errors], tolerance: float | None) -> Verification:
        """The verdict in the model's own type, or in float64 where rounding could be the reason for an error."""
        dtype = _least_precise_type(self.model)
        limit = tolerance if tolerance is not None else TOLERANCES.get(dtype, 1e-4)
        errors = compare(None)
        if tolerance is None and limit < errors.worst and not errors.failure and dtype != torch.float64:
            try:
                errors, limit, dtype = compare(torch.float64), TOLERANCES[torch.float64], torch.float64
            except FilterfoldError as reason:
                _LOG.info("the model does not run in float64 (%s); deciding in %s", reason, dtype)
        if errors.masking is not None and not errors.masking <= limit and not errors.failure:
            self.decisions = Decisions()
            again = compare(None if dtype == _least_precise_type(self.model) else dtype)
            if self.decisions.inputs and again.worst < errors.worst:
                errors = again
        names = tuple(cut.group for cut in self.inexact)
        ok = errors.worst <= limit
        return Verification(
            ok,
            errors.masking,
            errors.permutation,
            names,
            describe(errors, limit, dtype, names),
            self.plan.attributes,
            () if ok else self.suspects,
            cost=self.cost,
        )

    def rehearsal(self, inputs: Any) -> Errors:
        """Cut, run, take back, and compare; once more with rewritten sizes where that fails or differs."""
        if self.decisions is not None:
            expected, permutation = self.references(inputs)
            with self.again():
                actual, failure = self._cut_outputs(inputs)
            return Errors(None if actual is None else self.error(expected, actual), permutation, failure)
        actual, failure = self._cut_outputs(inputs)
        if actual is None:
            self._uncut_outputs(inputs)  # raises if it is not the cut that fails
            return Errors(None, None, failure)
        self._check_finite(actual)
        expected, permutation = self.references(inputs)
        errors = Errors(self.error(expected, actual), permutation)
        suspicious = errors.masking is not None and not errors.masking <= TOLERANCES[torch.bfloat16]
        if self.rewrite is None or self.rewritten or not suspicious:
            return errors
        before = self.plan
        actual, failure = self._rewritten_outputs(inputs, "it differs")
        if actual is not None:
            again = Errors(self.error(expected, actual), permutation)
            if again.worst < errors.worst:
                return again
        self.plan, self.rewritten = before, False
        return errors

    def again(self) -> AbstractContextManager[Any]:
        """Inside, the decisions of the masked network are taken again, where that was asked for."""
        return nullcontext() if self.decisions is None else self.decisions.taken_again()

    def error(self, expected: list[Tensor] | None, actual: list[Tensor]) -> float | None:
        """The error of the outputs and, where decisions were taken again, of what they were taken on."""
        if expected is None:
            return None
        pairs = self.decisions.inputs if self.decisions is not None else []
        return difference([*expected, *(first for first, _ in pairs)], [*actual, *(second for _, second in pairs)])

    def references(self, inputs: Any) -> tuple[list[Tensor] | None, float | None]:
        """(outputs of the masked network or None, error under permutation or None)."""
        error = None
        shuffled = [cut for cut in self.inexact if cut.group in self.interchangeable]
        if shuffled:
            plain = self._uncut_outputs(inputs)
            with permuted(self.model, shuffled, self.interchangeable, torch.Generator().manual_seed(2)):
                error = difference(plain, outputs(self.model, inputs))
        if self.inexact and not any(cut.changes for cut in self.judged):
            return None, error  # there is nothing to mask
        return self._masked_outputs(inputs), error

    def _cut_outputs(self, inputs: Any) -> tuple[list[Tensor] | None, str | None]:
        """(outputs of the cut network, None), with sizes rewritten if it fails without; or (None, why it fails)."""
        receipt = apply(self.plan, self.model, cache=self.cache)
        try:
            return self._counted_outputs(inputs), None
        except Exception as reason:
            pass_on_exhaustion(reason)
            failure = one_line(reason)
        finally:
            receipt.rollback()
        if self.rewrite is None or self.rewritten:
            return None, failure
        return self._rewritten_outputs(inputs, failure)

    def _counted_outputs(self, inputs: Any) -> list[Tensor]:
        """Outputs of the network as it is; on the way it is counted what it costs, if that was asked for."""
        if not self.counts:
            return outputs(self.model, inputs)
        with Counting(self.model) as counting:
            actual = outputs(self.model, inputs)
        self.cost = counting.cost()
        return actual

    def _rewritten_outputs(self, inputs: Any, failure: str) -> tuple[list[Tensor] | None, str | None]:
        """The same with sizes rewritten in any case; `failure`: the reason if there are none to rewrite."""
        try:
            plan, receipt = apply_with_sizes(self.plan, self.model, inputs, self.rewrite, cache=self.cache)
        except FilterfoldError as reason:
            self.suspects = tuple(getattr(reason, "groups", ()))
            return None, str(reason)
        try:
            if plan.attributes == self.plan.attributes:
                return None, failure
            actual = self._counted_outputs(inputs)
        except Exception as reason:
            pass_on_exhaustion(reason)
            return None, one_line(reason)
        finally:
            receipt.rollback()
        self.plan, self.rewritten = plan, True
        return actual, None

    def _uncut_outputs(self, inputs: Any) -> list[Tensor]:
        try:
            uncut = outputs(self.model, inputs)
        except Exception as reason:
            pass_on_exhaustion(reason)
            raise VerificationError(f"the model fails before any cut: {one_line(reason)}") from reason
        self._check_finite(uncut)
        return uncut

    def _check_finite(self, values: Sequence[Tensor]) -> None:
        if self.generic and not all(bool(torch.isfinite(v).all()) for v in values if v.is_floating_point()):
            raise _OverflowError

    def _masked_outputs(self, inputs: Any) -> list[Tensor] | None:
        """Outputs with the inexact groups cut and the others masked or dead; None if that can't be run."""
        failure: Exception | None = None
        # Of the sizes that follow the whole cut, some follow this part of it.
        for rewrite in [None, self.rewrite] if self.inexact and self.plan.attributes else [None]:
            try:
                with self._inexact_cut(inputs, rewrite) as judged:
                    dead = [cut for cut in judged if cut.group in self.dead]
                    rest = Plan(tuple(cut for cut in judged if cut not in dead))
                    taken = nullcontext() if self.decisions is None else self.decisions.taken()
                    gone = emptied(self.model, dead) if dead else nullcontext()
                    with gone, masked(self.model, rest), taken:
                        return outputs(self.model, inputs)
            except Exception as reason:
                pass_on_exhaustion(reason)
                failure = reason
        assert failure is not None
        self._uncut_outputs(inputs)  # raises if the network does not run at all
        if not self.inexact:
            raise failure
        _LOG.info("the groups beside those that aren't exact can't be masked: %s", one_line(failure))
        return None

    @contextmanager
    def _inexact_cut(self, inputs: Any, rewrite: Rewrite | None) -> Iterator[tuple[Cut, ...]]:
        """Really cut the inexact groups for a while; gives the other groups' cuts as they read then."""
        if not self.inexact:
            yield self.judged
            return
        plan = Plan(self.inexact)
        tensors = dict(named_tensors(self.model))
        judged = rebased(self.judged, edits_of(plan, tensors), tensors)
        among = self.plan.attributes
        _, receipt = apply_with_sizes(plan, self.model, inputs, rewrite, among=among, cache=self.cache)
        try:
            yield judged
        finally:
            receipt.rollback()


def _least_precise_type(model: nn.Module) -> torch.dtype:
    """The least precise floating-point type among the parameters and buffers."""
    kinds = {tensor.dtype for _, tensor in named_tensors(model) if tensor.is_floating_point()}
    return max(kinds, key=lambda kind: torch.finfo(kind).eps, default=torch.float32)
