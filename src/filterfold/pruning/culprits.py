"""Which groups make a plan fail, and a plan without them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from ..errors import PlanError, SurgeryError, VerificationError
from ..graph import Traced
from ..plan import Cut, Plan
from ..surgery.verdict import Verification

_LOG = logging.getLogger("filterfold.prune")


_ROUNDS = 4
"""How often groups that failed may be frozen and the rest chosen anew."""


FAILED = "failed verification: "
"""How the reason begins for which such a group is frozen."""


Judge = Callable[[Plan], Verification]


def passing_plan(
    traced: Traced, choose: Callable[[Traced], Plan], judge: Judge, *, strict: bool
) -> tuple[Traced, Plan, Verification]:
    """A plan that passes, chosen anew without the groups that fail.

    **Arguments:**

    - `traced`: the network's groups.
    - `choose`: makes a plan for groups, leaving the frozen ones whole.
    - `judge`: tries a plan.
    - `strict`: whether groups that fail are an error; otherwise they are frozen, and logged.

    **Returns:** the groups, those that failed frozen with the reason; the plan; what the judge said.

    **Raises:** `VerificationError` naming the groups that fail, if `strict` or if freezing them does not help.
    """
    frozen: dict[str, str] = {}
    groups = traced
    for _ in range(_ROUNDS):
        plan = choose(groups)
        verification = _tried(judge, plan)
        if verification.ok:
            return groups, plan, verification
        wrong = culprits(plan, judge)
        names = ", ".join(wrong) or "the groups together"
        message = next(iter(wrong.values()), verification.message)
        if strict or not wrong:
            raise VerificationError(
                f"cutting {names} would be wrong and was not done: {message}; ignore=[...] skips it"
            )
        for name, reason in wrong.items():
            _LOG.warning("group %s fails verification and is left whole: %s", name, reason)
        frozen |= wrong
        kept = (dataclasses.replace(g, frozen=f"{FAILED}{frozen[g.name]}") if g.name in frozen else g for g in traced)
        groups = Traced(kept, traced.sizes, traced.unmet)
    raise VerificationError(f"groups keep failing verification ({', '.join(frozen)}): {verification.message}")


def culprits(plan: Plan, judge: Judge) -> dict[str, str]:
    """The groups because of which a plan fails, with what their cut does.

    Where the failure names its causes or its suspects those are taken; otherwise they are found by halving.

    **Arguments:**

    - `plan`: a plan that fails.
    - `judge`: tries a plan.

    **Returns:** group name → message; what is left of the plan without them passes.
    """
    wrong: dict[str, str] = {}

    def settle(cuts: list[Cut]) -> list[Cut]:
        """The cuts of these that pass together."""
        verification = _tried(judge, Plan(tuple(cuts)))
        if verification.ok or not cuts:
            return cuts
        known = [cut for cut in cuts if cut.group in verification.causes]
        if known:
            wrong.update((cut.group, verification.causes[cut.group]) for cut in known)
            return settle([cut for cut in cuts if cut not in known])
        suspects = [cut for cut in cuts if cut.group in verification.suspects]
        if not suspects:
            return add([], cuts, verification)
        rest = settle([cut for cut in cuts if cut not in suspects])
        return add(rest, suspects, verification if len(suspects) == 1 else None)

    def add(accepted: list[Cut], candidates: list[Cut], failed: Verification | None) -> list[Cut]:
        """The accepted cuts and the candidates that pass with them; `failed`: the outcome for all, if known."""
        verification = failed or _tried(judge, Plan((*accepted, *candidates)))
        if verification.ok:
            return accepted + candidates
        if len(candidates) == 1:
            wrong[candidates[0].group] = verification.message
            return accepted
        half = len(candidates) // 2
        return add(add(accepted, candidates[:half], None), candidates[half:], None)

    settle([cut for cut in plan.cuts if cut.changes])
    return wrong


def _tried(judge: Judge, plan: Plan) -> Verification:
    try:
        return judge(plan)
    except (SurgeryError, PlanError) as error:
        return Verification(False, None, None, (), str(error))
