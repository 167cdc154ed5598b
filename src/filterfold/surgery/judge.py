"""The judge of one plan on one model: runs the cut network and the references, compares, and gives the verdict."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FilterfoldError, VerificationError
from ..plan import AttributeChange, ChannelGroup, Cut, Plan
from ..profiling.macs import Cost, Counting
from ..utils.inputs import outputs
from ..utils.modules import named_tensors
from .apply import Cuttings, apply, revert
from .index_maps import edits_of
from .masking import masked, permuted, rebased

_LOG = logging.getLogger("filterfold.verify")


TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest relative error by type: about √ε, loose enough for reordered sums in deep networks, and far below
what a wrong channel does (over 1e-2 with generic values)."""


Repair = Callable[[nn.Module, Plan, Any], tuple[AttributeChange, ...]]
"""Given a model after surgery, the plan, and example inputs: rewrites the sizes in user code in place and returns
the changes, or raises a `FilterfoldError` and leaves them."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What verification found; true in a boolean context if the cut is right.

    **Arguments:**

    - `ok`: whether both errors are within the tolerance and nothing failed.
    - `masking_error`: relative error against the masked network; None if it could not be computed.
    - `permutation_error`: relative error under permutation; None if no changed group needs that oracle.
    - `inexact`: names of the changed groups that masking can't judge.
    - `message`: all of that in one line.
    - `attributes`: sizes in user code that a rehearsal found must change with the plan.
    - `suspects`: groups that a failed repair names as the reason.
    - `cost`: what the cut network costs, if that was asked for and could be counted while it ran.
    """

    ok: bool
    masking_error: float | None
    permutation_error: float | None
    inexact: tuple[str, ...]
    message: str
    attributes: tuple[AttributeChange, ...] = ()
    suspects: tuple[str, ...] = ()
    cost: Cost | None = field(default=None, repr=False, compare=False)

    def __bool__(self) -> bool:
        """`ok`."""
        return self.ok

    def __str__(self) -> str:
        """The message."""
        return self.message


class NotFiniteError(Exception):
    """Random values made the network overflow."""


@dataclass(frozen=True, slots=True)
class Errors:
    """What one trial found: both errors, where they are known, and why the cut network failed, if it did."""

    masking: float | None
    permutation: float | None
    failure: str | None = None

    @property
    def worst(self) -> float:
        """The larger error; infinite after a failure."""
        known = [error for error in (self.masking, self.permutation) if error is not None]
        return float("inf") if self.failure else max(known, default=0.0)


class Judge:
    """One plan on one model: the reference outputs, the comparison, the verdict."""

    def __init__(
        self,
        plan: Plan,
        groups: Iterable[ChannelGroup] | None,
        model: nn.Module,
        repair: Repair | None,
        cuttings: Cuttings | None = None,
        count: bool = False,
    ) -> None:
        by_name = {group.name: group for group in groups or ()}
        changing = [cut for cut in plan.cuts if cut.changes]
        self.plan = plan
        self.inexact = [cut for cut in changing if cut.group in by_name and not by_name[cut.group].exact]
        self.exact = [cut for cut in plan.cuts if cut not in self.inexact]
        self.model = model
        self.repair = repair
        self.cuttings = cuttings
        self.count = count
        self.cost: Cost | None = None
        self.finite_only = False
        self.suspects: tuple[str, ...] = ()
        self.cells: dict[str, Sequence[object]] = {}
        for cut in self.inexact:
            group = by_name[cut.group]
            if group.symmetric:
                self.cells[cut.group] = list(zip(group.classes, group.blocks, strict=True))

    def rehearsal(self, inputs: Any) -> Errors:
        """Cut, run, take back, and compare; once more with sizes in user code repaired where that differs."""
        with self._applied():
            actual, failure = self.run(self.model, inputs)
        if failure:
            self.plain(inputs)  # which says so if it is not the cut that fails
            return Errors(None, None, failure)
        self.expect_finite(actual or [])
        expected, shuffled = self.references(inputs)
        errors = self.errors(expected, shuffled, actual, None)
        if self.repair is None or self.plan.attributes or (errors.masking or 0.0) <= TOLERANCES[torch.bfloat16]:
            return errors
        with self._applied():
            again = self.errors(expected, shuffled, *self._run_repaired(self.model, inputs, "it differs"))
        if again.worst < errors.worst:
            return again
        self.plan = replace(self.plan, attributes=())
        return errors

    @contextmanager
    def _applied(self) -> Iterator[None]:
        receipt = apply(self.plan, self.model, cuttings=self.cuttings)
        try:
            yield
        finally:
            receipt.rollback()

    def run(self, pruned: nn.Module, inputs: Any) -> tuple[list[Tensor] | None, str | None]:
        """(outputs of the cut network, None), with sizes in user code repaired if need be; or (None, why it fails)."""
        try:
            if not self.count:
                return outputs(pruned, inputs), None
            with Counting(pruned) as counting:
                actual = outputs(pruned, inputs)
            self.cost = counting.cost()
            return actual, None
        except Exception as reason:
            failure = _line(reason)
        if self.repair is None or self.plan.attributes:
            return None, failure
        return self._run_repaired(pruned, inputs, failure)

    def _run_repaired(self, pruned: nn.Module, inputs: Any, failure: str) -> tuple[list[Tensor] | None, str | None]:
        assert self.repair is not None
        try:
            changes = self.repair(pruned, self.plan, inputs)
        except FilterfoldError as reason:
            self.suspects = tuple(getattr(reason, "groups", ()))
            return None, str(reason)
        if not changes:
            return None, failure
        try:
            actual = outputs(pruned, inputs)
        except Exception as reason:
            return None, _line(reason)
        finally:
            revert(changes, pruned)
        self.plan = replace(self.plan, attributes=changes)
        return actual, None

    def plain(self, inputs: Any) -> list[Tensor]:
        """Outputs of the uncut network."""
        try:
            plain = outputs(self.model, inputs)
        except Exception as reason:
            raise VerificationError(f"the model fails before any cut: {_line(reason)}") from reason
        self.expect_finite(plain)
        return plain

    def expect_finite(self, values: list[Tensor]) -> None:
        """Refuse to judge random values that make the network overflow."""
        if self.finite_only and not all(bool(torch.isfinite(v).all()) for v in values if v.is_floating_point()):
            raise NotFiniteError

    def references(self, inputs: Any) -> tuple[list[Tensor] | None, float | None]:
        """(outputs of the masked network or None, error under permutation or None)."""
        error = None
        shuffled = [cut for cut in self.inexact if cut.group in self.cells]
        if shuffled:
            plain = self.plain(inputs)
            with permuted(self.model, shuffled, self.cells, torch.Generator().manual_seed(2)):
                error = difference(plain, outputs(self.model, inputs))
        if self.inexact and not any(cut.changes for cut in self.exact):
            return None, error  # there is nothing to mask
        return self._masked_outputs(inputs), error

    def _masked_outputs(self, inputs: Any) -> list[Tensor] | None:
        """Outputs with the inexact groups cut and the exact ones masked; None if that can't be run."""
        try:
            with self._inexact_cut() as (part, cuts), masked(self.model, Plan(cuts)):
                return self._run_part(part, inputs)
        except Exception as reason:
            self.plain(inputs)  # which says so if the network does not run at all
            if not self.inexact:
                raise
            _LOG.info("no masking oracle beside the groups that aren't exact: %s", _line(reason))
            return None

    @contextmanager
    def _inexact_cut(self) -> Iterator[tuple[Plan | None, tuple[Cut, ...]]]:
        """Really cut the inexact groups for a while; gives what is cut, and the exact cuts as they read then."""
        if not self.inexact:
            yield None, tuple(self.exact)
            return
        part = Plan(tuple(self.inexact))
        tensors = dict(named_tensors(self.model))
        cuts = rebased(self.exact, edits_of(part, tensors), tensors)
        receipt = apply(part, self.model, cuttings=self.cuttings)
        try:
            yield part, cuts
        finally:
            receipt.rollback()

    def _run_part(self, part: Plan | None, inputs: Any) -> list[Tensor]:
        """Outputs of the model, with sizes in user code repaired for what is cut of it, if need be."""
        try:
            return outputs(self.model, inputs)
        except Exception:
            if part is None or self.repair is None:
                raise
        changes = self.repair(self.model, part, inputs)
        try:
            return outputs(self.model, inputs)
        finally:
            revert(changes, self.model)

    def errors(
        self,
        expected: list[Tensor] | None,
        shuffled: float | None,
        actual: list[Tensor] | None,
        failure: str | None,
    ) -> Errors:
        """Compare, where there is something to compare."""
        known = expected is not None and actual is not None
        return Errors(difference(expected or [], actual or []) if known else None, shuffled, failure)

    def decide(
        self, trial: Callable[[torch.dtype | None], Errors], dtype: torch.dtype, tolerance: float | None
    ) -> Verification:
        """The verdict on a trial in the model's own type, or in float64 where rounding could be the reason."""
        limit = tolerance if tolerance is not None else TOLERANCES.get(dtype, 1e-4)
        errors = trial(None)
        if tolerance is None and limit < errors.worst and not errors.failure and dtype != torch.float64:
            try:
                errors, limit, dtype = trial(torch.float64), TOLERANCES[torch.float64], torch.float64
            except FilterfoldError as reason:
                _LOG.info("the model does not run in float64 (%s); judging in %s", reason, dtype)
        return self._verdict(errors, limit, dtype)

    def _verdict(self, errors: Errors, limit: float, dtype: torch.dtype) -> Verification:
        names = tuple(cut.group for cut in self.inexact)
        kind = str(dtype).removeprefix("torch.")
        ok = errors.worst <= limit
        if errors.failure:
            text = f"the cut network fails: {errors.failure}"
        elif errors.masking is not None and not errors.masking <= limit:
            text = f"the cut network differs from the masked one by {errors.masking:.1e} (allowed {limit:.0e}, {kind})"
        elif errors.permutation is not None and not errors.permutation <= limit:
            text = f"permuting {_list(names)} changes the network by {errors.permutation:.1e} (allowed {limit:.0e})"
        elif errors.masking is None:
            text = f"the cut network runs, but {_list(names)} can't be held against a masked one"
        else:
            text = f"the cut network equals the masked one to {errors.masking:.1e} ({kind})"
        if ok and names:
            how = "unjudged" if errors.permutation is None else f"permutation error {errors.permutation:.1e}"
            text += f" ({how})" if errors.masking is None else f"; not mask-exact: {_list(names)} ({how})"
        return Verification(
            ok,
            errors.masking,
            errors.permutation,
            names,
            text,
            self.plan.attributes,
            () if ok else self.suspects,
            self.cost,
        )


def type_of(model: nn.Module) -> torch.dtype:
    """The least precise floating-point type among the parameters and buffers."""
    kinds = {tensor.dtype for _, tensor in named_tensors(model) if tensor.is_floating_point()}
    return max(kinds, key=lambda kind: torch.finfo(kind).eps, default=torch.float32)


def _line(reason: BaseException) -> str:
    text = next((line.strip() for line in str(reason).splitlines() if line.strip()), "no reason given")
    return f"{type(reason).__name__}: {text}"


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def difference(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    """Largest max|a - b| / max|a| over the outputs; infinite where shapes or non-finite places differ.

    >>> difference([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.5])])
    0.25
    """
    if len(expected) != len(actual):
        return float("inf")
    return max((_relative(a, b) for a, b in zip(expected, actual, strict=True)), default=0.0)


def _relative(expected: Tensor, actual: Tensor) -> float:
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(expected, actual) else 1.0
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(actual)):
        return float("inf")
    exact = torch.complex128 if expected.is_complex() else torch.float64
    expected, actual = (value[finite].cpu().to(exact) for value in (expected, actual))
    if expected.numel() == 0:
        return 0.0
    scale = float(expected.abs().max())
    return float((expected - actual).abs().max()) / (scale or 1.0)
