"""A cut during training is one transaction: an error at any stage leaves everything as it was."""

from __future__ import annotations

import copy
import inspect
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import filterfold
from filterfold.errors import VerificationError
from filterfold.online import CutOptions, OnlineFilterClustering, Pull, Schedule, online_clustering

pytestmark = pytest.mark.slow

STAGES = ("fold", "observed", "rehearsed", "apply_with_sizes", "trace_and_measure", "apply_remedy", "relative_change",
          "renew", "CutResult")  # fmt: skip
"""What `cluster_and_prune` calls, in this order; an error after the call comes when it has done its work."""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(12 * 36, 3)),
    )


class Setup:
    """A network in the middle of its training, and its clustering before the first milestone."""

    def __init__(self, **options: Any) -> None:
        self.model = net().train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 0.01)
        self.averaged = torch.optim.swa_utils.AveragedModel(self.model)
        x = torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(1))
        schedule = Schedule((1, 2), ((3, 0.5), (4, 1.0)), **options.pop("plateau", {}))
        self.online = OnlineFilterClustering(
            self.model,
            x[:1],
            self.optimizer,
            keep=0.5,
            averaged=self.averaged,
            schedule=schedule,
            cutting=CutOptions(loader=[x], **options.pop("cutting", {})),
            **options,
        )
        for epoch in (1, 2):
            self.optimizer.zero_grad()
            (self.model(x).square().mean() + self.online.loss()).backward()
            self.optimizer.step()
            self.averaged.update_parameters(self.model)
            self.online.step(epoch, 1.0)

    def state(self) -> Any:
        """All that must be as before, copied."""
        return copy.deepcopy(
            {
                "model": dict(self.model.state_dict()),
                "gradients": [parameter.grad for parameter in self.model.parameters()],
                "averaged": dict(self.averaged.state_dict()),
                "optimizer": self.optimizer.state_dict(),
                "sizes": [{k: v for k, v in vars(m).items() if isinstance(v, int)} for m in self.model.modules()],
                "online": self.online.state_dict(),
                "cuts": len(self.online.cuts),
                "groups": [group.size for group in self.online.groups],
                "loss": self.online.loss().item(),
            }
        )


def same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(same(a, b) for a, b in zip(one, two, strict=True))
    return bool(one == two)


CASES = [
    *((stage, None) for stage in STAGES if stage not in ("apply_remedy", "apply_with_sizes")),  # it gives the receipt
    *((stage, "kernels") for stage in ("apply_remedy", "renew")),
    ("apply_remedy", "norms"),
]


@pytest.mark.parametrize(("stage", "remedy"), CASES)
def test_an_error_after_any_stage_leaves_everything_as_it_was(monkeypatch, stage: str, remedy) -> None:
    plateau = {"patience": 5} if remedy is None else {}
    failing, unbroken = (Setup(cutting={"remedy": remedy}, plateau=plateau) for _ in range(2))
    before, honest = failing.state(), getattr(online_clustering, stage)

    def broken(*args: Any, **options: Any) -> Any:
        honest(*args, **options)
        raise InterruptedError(stage)

    monkeypatch.setattr(online_clustering, stage, broken)
    with pytest.raises(InterruptedError, match=stage):
        failing.online.step(3, 1.0)
    assert same(failing.state(), before)
    monkeypatch.setattr(online_clustering, stage, honest)
    events = [setup.online.step(epoch, 1.0) for setup in (failing, unbroken) for epoch in (3, 4)]
    assert events[:2] == events[2:]
    assert same(failing.state(), unbroken.state())
    assert failing.online.finished


class StopError(BaseException):
    """Like a KeyboardInterrupt: nothing may catch it."""


PACKAGE = str(Path(filterfold.__file__).parent)
PUTTING_BACK = {"give_back", "rollback", "undo", "restore", "put", "put_back", "preserved", "buffers_preserved",
                "random_state_preserved", "all_or_nothing", "__exit__", "masked"}  # fmt: skip
"""Functions in which an exception is not raised, nor in what they call: what gives back can't be given back."""


@contextmanager
def listened(tell: Callable[[str], None]) -> Iterator[None]:
    """`tell` is given the name of each function of the package that is called."""

    def call(frame: Any, event: str, _: Any) -> None:
        code, outer = frame.f_code, frame
        if event != "call" or not code.co_filename.startswith(PACKAGE) or code.co_flags & inspect.CO_GENERATOR:
            return
        while outer is not None:
            if outer.f_code.co_name in PUTTING_BACK:
                return
            outer = outer.f_back
        tell(f"{code.co_filename} {code.co_qualname}")

    before = sys.getprofile()
    sys.setprofile(call)
    try:
        yield
    finally:
        sys.setprofile(before)


HOW = [
    *(
        ("fold", verify, remedy)
        for verify, remedy in ((True, None), (False, None), (True, "kernels"), (False, "norms"))
    ),
    *((method, verify, None) for method in ("centroid", "l1", "reconstruction") for verify in (True, False)),
]


@pytest.mark.parametrize(("method", "verify", "remedy"), HOW)
def test_an_error_in_any_call_leaves_everything_as_it_was(method: str, verify: bool, remedy) -> None:
    def setup() -> Setup:
        how = {} if method == "fold" else {"method": method, "pull": Pull("none")}
        return Setup(cutting={"verify": verify, "remedy": remedy}, plateau={"patience": 5}, **how)

    calls: list[str] = []
    setup().online.step(3, 1.0)  # what is remembered for good is asked for once
    unbroken, failing = setup(), setup()
    with listened(calls.append):
        unbroken.online.step(3, 1.0)
    first = {name: number for number, name in reversed(list(enumerate(calls)))}  # of each function
    before = failing.state()
    for turn, number in enumerate(random.Random(f"{method} {verify} {remedy}").sample(sorted(first.values()), 16)):
        kind, count = (StopError, torch.OutOfMemoryError)[turn % 2], 0

        def tell(name: str, last: int = number, kind: type[BaseException] = kind) -> None:
            nonlocal count
            count += 1
            if count > last:
                raise kind(name)

        with pytest.raises(kind), listened(tell):  # of memory that ran out it is never said that the cut failed
            failing.online.step(3, 1.0)
        assert same(failing.state(), before), calls[number]
    failing.online.step(3, 1.0)
    assert same(failing.state(), unbroken.state())


def test_clusters_are_updated_all_or_not_at_all(monkeypatch) -> None:
    setup, calls, honest = Setup(), [], online_clustering.regroup
    before = setup.state()

    def broken(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise InterruptedError
        return honest(*args, **options)

    monkeypatch.setattr(online_clustering, "regroup", broken)
    with pytest.raises(InterruptedError):
        setup.online.update_clusters()
    assert same(setup.state(), before)


def test_a_cut_that_would_be_wrong_is_not_made(monkeypatch) -> None:
    setup = Setup()
    before = setup.state()

    def wrong(*_: Any) -> None:
        raise VerificationError("the cut was not made: wrong")

    monkeypatch.setattr(online_clustering, "rehearsed", wrong)
    with pytest.raises(VerificationError):
        setup.online.cluster_and_prune()
    assert same(setup.state(), before)
