"""Exported networks compute the same, at batch sizes that were not in the example."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from filterfold.errors import ExportError
from filterfold.pruning.prune import prune
from filterfold.utils.export import to_onnx, to_program

# torch.onnx's own converters use deprecated parts of Python and of onnxscript.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Dropout(), nn.Linear(32, 4))
    prune(model, torch.zeros(1, 3, 8, 8), keep=0.5)
    return model


X = torch.zeros(1, 3, 8, 8)


def test_a_program_takes_any_batch_and_comes_back_from_its_file(tmp_path):
    model = net()
    program = to_program(torch.compile(model, backend="eager"), X, tmp_path / "small.pt2")
    assert model.training
    model.eval()
    loaded = torch.export.load(tmp_path / "small.pt2")
    for batch in (1, 3, 7):
        x = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(program.module()(x), model(x))
        torch.testing.assert_close(loaded.module()(x), model(x))


def test_a_fixed_batch_on_request():
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, 3).sum(1) if x.shape[0] == 2 else x

    with pytest.raises(ExportError, match=r"^Fixed can't be exported: .*dynamic=False fixes the batch size$") as caught:
        to_program(Fixed(), torch.zeros(2, 3))
    assert "\n" not in str(caught.value)
    program = to_program(Fixed(), torch.zeros(2, 3), dynamic=False)
    assert torch.equal(program.module()(torch.ones(2, 3)), torch.tensor([3.0, 3.0]))


def test_what_cannot_be_exported_is_said_in_one_line():
    class Random(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match=r"^Random can't be exported: ") as caught:
        to_program(Random(), X)
    assert "\n" not in str(caught.value)
    with pytest.raises(ExportError, match="no tensor with a batch axis"):
        to_program(net(), (3,))


@pytest.mark.slow
def test_onnx_equals_pytorch_at_other_batch_sizes(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = net()
    to_onnx(model, X, tmp_path / "small.onnx")
    assert [entry.name for entry in tmp_path.iterdir()] == ["small.onnx"]
    assert model.training
    session = runtime.InferenceSession(tmp_path / "small.onnx")
    (name,) = (entry.name for entry in session.get_inputs())
    for batch in (1, 5):
        x = torch.randn(batch, 3, 8, 8)
        (found,) = session.run(None, {name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model.eval()(x), rtol=1e-4, atol=1e-5)


class Both(nn.Module):
    """Two inputs by keyword, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        return {"sum": self.one(first) + self.two(second), "first": self.one(first)}


@pytest.mark.parametrize("kind", [dict, tuple])
@pytest.mark.slow
def test_several_inputs_and_outputs(tmp_path, kind):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    named = {"first": torch.zeros(1, 3), "second": torch.zeros(1, 2)}
    to_onnx(Both(), named if kind is dict else tuple(named.values()), tmp_path / "both.onnx")
    assert (tmp_path / "both.onnx").stat().st_size > 0


@pytest.mark.slow
def test_a_difference_means_that_nothing_is_written(tmp_path, monkeypatch):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Wrong:
        def __init__(self, *args, **kwargs):
            self.session = original(*args, **kwargs)
            self.get_inputs = self.session.get_inputs

        def run(self, names, feed):
            return [value * 1.01 for value in self.session.run(names, feed)]

    original = runtime.InferenceSession
    monkeypatch.setattr(runtime, "InferenceSession", Wrong)
    with pytest.raises(ExportError, match=r"differs from PyTorch by .* with 2 examples; nothing was written"):
        to_onnx(net(), X, tmp_path / "small.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_the_way_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ExportError, match=r"to_onnx needs the package onnxscript: pip install 'filterfold\[onnx\]'"):
        to_onnx(net(), X, tmp_path / "small.onnx")
