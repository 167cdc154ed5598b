"""Weights from checkpoints of usual layouts, a classifier of another size, and what is refused; known by content."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import filterfold as ff
from filterfold.errors import CheckpointError
from filterfold.surgery.weights import Weights, load_weights

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net(classes: int = 5, width: int = 8, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, groups=width),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes),
    )  # fmt: skip


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


OTHER = state(net(seed=9))

LAYOUTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "plain": (lambda s: s, ""),
    "timm, averaged": (lambda s: {"epoch": 3, "arch": "x", "state_dict": OTHER, "state_dict_ema": s}, "state_dict_ema"),
    "torchvision's reference": (
        lambda s: {"model": OTHER, "model_ema": {"n_averaged": torch.tensor(7), **named("module.", s)}, "args": None},
        "model_ema",
    ),
    "no averages yet": (lambda s: {"model": s, "model_ema": None}, "model"),
    "DDP": (lambda s: {"model": named("module.", s), "optimizer": {"state": {}}}, "model"),
    "compiled": (lambda s: named("_orig_mod.", s), ""),
    "DDP of compiled": (lambda s: {"state_dict": named("module._orig_mod.", s)}, "state_dict"),
    "Lightning": (
        lambda s: {"state_dict": {**named("model.", s), "criterion.weight": torch.ones(5)}, "epoch": 1},
        "state_dict",
    ),
    "nested twice": (lambda s: {"checkpoint": 1, "model": {"state_dict": s}}, "model.state_dict"),
    "a step as a tensor": (lambda s: {"step": torch.tensor(4), "state_dict": s}, "state_dict"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_usual_layouts(tmp_path: Path, layout: str) -> None:
    wrap, place = LAYOUTS[layout]
    taught, other = net(seed=1), net(seed=2)
    torch.save(wrap(state(taught)), tmp_path / "weights.pt")
    loaded = load_weights(other, tmp_path / "weights.pt")
    assert torch.equal(other.eval()(X), taught.eval()(X))
    assert loaded.place == place
    assert str(loaded).startswith(f"taken from '{place}'") == bool(place)
    assert loaded.left_out == {
        "Lightning": ("criterion.weight",),
        "torchvision's reference": ("n_averaged",),
    }.get(layout, ())


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_classifier_of_another_size_is_new_and_all_else_is_loaded(tmp_path: Path, suffix: str) -> None:
    taught, path = net(7, seed=1), tmp_path / f"weights.{suffix}"
    save_file(state(taught), path) if suffix == "safetensors" else torch.save(state(taught), path)
    mine = net(5, seed=2)
    before = copy.deepcopy(mine)
    with pytest.raises(CheckpointError, match=r"but for the classifier: 6 has 7 outputs there, 5 here; .*--new-head"):
        load_weights(mine, path)
    assert all(torch.equal(value, state(before)[name]) for name, value in state(mine).items())
    loaded = load_weights(mine, path, new_head=True)
    assert dict(loaded.heads) == {"6": (7, 5)}
    assert str(loaded) == "6 is new: 5 outputs instead of 7"
    for name, value in mine.state_dict().items():
        assert name.startswith("6.") or torch.equal(value, taught.state_dict()[name]), name
    assert 0 < mine[6].weight.abs().max() <= 8**-0.5  # PyTorch's own range for 8 inputs
    assert not torch.equal(mine[6].weight, before[6].weight)


def test_a_convolution_as_classifier_and_two_classifiers(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 4, 1)
            self.head, self.aside = nn.Conv2d(4, classes, 1), nn.Linear(4, classes)

    torch.save(Two(9).state_dict(), tmp_path / "w.pt")
    assert dict(load_weights(Two(2), tmp_path / "w.pt", new_head=True).heads) == {"aside": (9, 2), "head": (9, 2)}


@pytest.mark.parametrize(
    ("classes", "change", "message"),
    [
        (5, lambda s: {**s, "6.weight": torch.ones(7, 9)}, "6.weight has shape (7, 9), the model (5, 8)"),
        (7, lambda s: {**s, "0.weight": torch.ones(9, 3, 3, 3)}, "0.weight has shape (9, 3, 3, 3)"),
        (7, lambda s: {**s, "extra": torch.ones(1)}, "unknown: extra"),
        (7, lambda s: {name: value for name, value in s.items() if name != "1.weight"}, "missing: 1.weight"),
        (5, lambda s: {**s, "1.weight": torch.ones(7)}, "1.weight has shape (7,)"),
        (7, lambda s: {**s, "6.bias": torch.ones(6)}, "6.bias has shape (6,)"),
    ],
)
def test_anything_else_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, classes: int, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    model = net()
    before = state(model)
    torch.save(change(state(net(classes))), tmp_path / "w.pt")
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, tmp_path / "w.pt", new_head=True)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


class Trap:
    opened = False

    def __reduce__(self) -> tuple[Any, ...]:
        return (setattr, (Trap, "opened", True))


def test_no_pickle_is_executed_and_no_file_hangs(tmp_path: Path) -> None:
    itself: dict[str, Any] = {"epoch": 1}
    itself["model"] = itself
    sparse = {"0.weight": torch.eye(3).to_sparse()}
    for name, value, message in (
        ("trap", {"state_dict": OTHER, "trap": Trap()}, "not a plain state dict"),
        ("model", net(), "not a plain state dict"),
        ("itself", itself, "holds a dict without tensors"),
        ("sparse", sparse, "0.weight is not an ordinary dense tensor"),
    ):
        torch.save(value, tmp_path / name)
        with pytest.raises(CheckpointError, match=message):
            Weights.read(tmp_path / name)
    (tmp_path / "raw").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="not a plain state dict"):
        Weights.read(tmp_path / "raw")
    assert not Trap.opened


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    torch.save({"state_dict": OTHER, "epoch": 3}, tmp_path / "a.pt")
    save_file(OTHER, tmp_path / "b.safetensors")
    one, same = Weights.read(tmp_path / "a.pt").fingerprint, Weights.read(tmp_path / "b.safetensors").fingerprint
    assert one == same
    for change in (
        {"6.bias": OTHER["6.bias"] + 1e-6},
        {"6.bias": OTHER["6.bias"].double()},
        {"6.weight": OTHER["6.weight"].reshape(8, 5)},
    ):
        assert Weights("changed", {**OTHER, **change}).fingerprint != one


def test_a_pruned_network_takes_its_sizes_along_and_may_get_a_new_classifier(tmp_path: Path) -> None:
    small, path = net(7), tmp_path / "small.safetensors"
    result = ff.prune(small, X, keep=0.5)
    ff.save(small, path, plan=result.plan)
    again = net(7, seed=3)
    Weights.read(path).into(again, classes=7)
    assert torch.equal(again.eval()(X), small.eval()(X))
    with pytest.raises(CheckpointError, match="classifier: 6 has 7 outputs there, 5 here"):
        Weights.read(path).into(net(5), classes=5)
    loaded = Weights.read(path).into(mine := net(5), new_head=True, classes=5)
    assert dict(loaded.heads) == {"6": (7, 5)}
    assert (mine[6].in_features, mine[6].out_features, mine[6].weight.shape) == (4, 5, (5, 4))
    assert mine[6].weight.abs().min() > 0
    assert torch.equal(mine.eval()[:6](X), small.eval()[:6](X))
    assert mine(X).shape == (2, 5)
