"""A cut during training is one transaction: an error at any stage leaves everything as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from filterfold.errors import VerificationError
from filterfold.online import CutOptions, OnlineFilterClustering, Pull, Schedule, online_clustering

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
    *((stage, False, None) for stage in STAGES if stage != "apply_remedy"),
    *(
        (stage, True, None) for stage in STAGES if stage not in ("apply_remedy", "apply_with_sizes")
    ),  # it gives the receipt
    *((stage, after, "kernels") for stage in ("apply_remedy", "renew") for after in (False, True)),
    ("apply_remedy", True, "norms"),
]


@pytest.mark.parametrize(("stage", "after", "remedy"), CASES)
def test_an_error_at_any_stage_leaves_everything_as_it_was(monkeypatch, stage: str, after: bool, remedy) -> None:
    plateau = {"patience": 5} if remedy is None else {}
    failing, unbroken = (Setup(cutting={"remedy": remedy}, plateau=plateau) for _ in range(2))
    before, honest = failing.state(), getattr(online_clustering, stage)

    def broken(*args: Any, **options: Any) -> Any:
        if after:
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


def test_the_centroid_control_is_taken_back_too(monkeypatch) -> None:
    setup = Setup(method="centroid", pull=Pull("none"))
    before = setup.state()
    monkeypatch.setattr(online_clustering, "relative_change", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        setup.online.step(3)
    assert same(setup.state(), before)


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
