"""Exported networks compute the same, at batch sizes that were not in the example."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from filterfold.errors import ConfigError, ExportError
from filterfold.export.formats import FORMATS, to_executorch
from filterfold.export.int8 import to_int8
from filterfold.export.onnx_network import OnnxNetwork
from filterfold.export.program import ExportOptions, to_onnx, to_program
from filterfold.profiling import measure_latency
from filterfold.pruning.prune import prune

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
    program = to_program(Fixed(), torch.zeros(2, 3), options=ExportOptions(dynamic=False))
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


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(8, 4)).eval()
    model[1].running_mean.normal_()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_form_says_what_it_was_given_and_computes_the_same(tmp_path, suffix):
    needed = {".onnx": "onnxscript", ".xml": "openvino", ".pte": "executorch"}
    pytest.importorskip(needed.get(suffix, "torch"))
    model, file, real = conv_net(), tmp_path / f"small{suffix}", torch.randn(6, 3, 8, 8)
    fixed = suffix == ".pte"
    options = ExportOptions(dynamic_size=not fixed, metadata={"classes": ["a", "b"]}, samples=[real])
    FORMATS[suffix](model, X, file, options=options)
    x = torch.randn(1, 3, 8, 8) if fixed else torch.randn(5, 3, 16, 12)
    found, said = _run(file, x)
    torch.testing.assert_close(found.double(), conv_net().double()(x.double()), rtol=1e-4, atol=1e-5)
    assert said == '["a", "b"]'


def _run(file, x):
    """What the form's own program gives for a file, and what it reads of the file's classes."""
    if file.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(file)
        [found] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        return torch.from_numpy(found), session.get_modelmeta().custom_metadata_map["classes"]
    if file.suffix in (".pt2", ".ts"):
        said = {"classes": ""}
        if file.suffix == ".ts":
            return torch.jit.load(file, _extra_files=said)(x).detach(), said["classes"].decode()
        return torch.export.load(file, extra_files=said).module()(x).detach(), said["classes"]
    if file.suffix == ".xml":
        import openvino

        network = openvino.Core().read_model(file)
        compiled = openvino.Core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return torch.from_numpy(compiled([x.numpy()])[0]), network.get_rt_info(["filterfold", "classes"]).value
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(file)
    [found], [said] = program.load_method("forward").execute([x]), program.load_method("classes").execute([])
    return found, said


def test_executorch_takes_one_size(tmp_path):
    with pytest.raises(ExportError, match="images of one size: leave dynamic_size out"):
        to_executorch(conv_net(), X, tmp_path / "small.pte", options=ExportOptions(dynamic_size=True))


@pytest.mark.slow
def test_8_bits_are_as_near_as_8_bits_can_be(tmp_path):
    pytest.importorskip("onnxruntime")
    model, images = conv_net(), torch.randn(64, 3, 8, 8)
    to_int8(model, X, tmp_path / "int8.onnx", images.split(16), options=ExportOptions(metadata={"by": "me"}))
    network = OnnxNetwork(tmp_path / "int8.onnx")
    assert network.metadata == {"by": "me"}
    expected, found = model(images).detach(), network(images)
    # Five tensors are rounded on the way, each to 255 steps between its smallest and its largest value.
    assert 0 < (found - expected).abs().max() < 5 / 255 * (expected.max() - expected.min())
    with pytest.raises(ExportError, match=r"^there are no calibration inputs"):
        to_int8(model, X, tmp_path / "none.onnx", [])
    assert not (tmp_path / "none.onnx").exists()
    timed = measure_latency({"float": model, "int8": network}, images[:1], batch_sizes=[2], repeats=3)
    assert [row.model for row in timed.rows] == ["float", "int8", "A/A control"]
    assert set(timed.macs) == {"float"}
    with pytest.raises(ConfigError, match="is run by ONNX Runtime alone"):
        measure_latency({"int8": network}, images[:1], batch_sizes=[2], mode="compile")


def test_an_onnx_file_that_is_none(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match=r"bad\.onnx: ONNX Runtime can't run it") as caught:
        OnnxNetwork(tmp_path / "bad.onnx")
    assert "\n" not in str(caught.value)
    with pytest.raises(ExportError, match=r"none\.onnx: no such file"):
        OnnxNetwork(tmp_path / "none.onnx")
