"""`filterfold export`: files that other programs run, from a saved network alone; pixels in; 8 bits; refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import filterfold as ff
from filterfold.bench.trials.start import input_of, network_of
from filterfold.cli.app import app
from filterfold.data import ImageData, batches
from filterfold.data import load as load_data
from filterfold.zoo import build

# torch.onnx's own converters use deprecated parts of Python and of onnxscript.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SIZES = {"channels": 1, "image_size": 8, "width": 0.25}


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data("digits")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, digits: ImageData) -> Path:
    """`dense.safetensors`, trained a little, and `small.safetensors`, pruned, with the notes that commands write."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    model = build("vgg_small", **SIZES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(4):
        for images, labels in batches(digits.train, 64, shuffle=True, seed=epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    notes = {"input": input_of(digits, {}), **network_of("vgg_small", 0.25, digits)}
    ff.save(model, folder / "dense.safetensors", metadata=notes)
    plan = ff.prune(model, digits.example, keep=0.9).plan
    ff.save(model, folder / "small.safetensors", plan=plan, metadata=notes)
    ff.save(model, folder / "silent.safetensors")
    ff.save(model, folder / "theirs.safetensors", metadata={**notes, "factory": f"{folder}/evil.py:net"})
    (folder / "evil.py").write_text("raise SystemExit('this was run')\n")
    ff.save(model, folder / "odd.safetensors", metadata={**notes, "arguments": {"classes": "many"}})
    (folder / "cut.safetensors").write_bytes((folder / "small.safetensors").read_bytes()[:5000])
    torch.save(model.state_dict(), folder / "foreign.pt")
    (folder / "foreign.bin").write_text("in the way")
    return folder


def network(place: Path) -> nn.Module:
    return ff.load(place / "small.safetensors", lambda: build("vgg_small", **SIZES)).eval()


def pixels(digits: ImageData, count: int) -> Tensor:
    return digits.test.images[:count]


def normalised(digits: ImageData, images: Tensor) -> Tensor:
    """By the formula, in float64."""
    mean, std = (numpy.array(values).reshape(1, -1, 1, 1) for values in digits.test.normalization)
    return torch.from_numpy((images.numpy() / 255 - mean) / std)


def run(*command: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["export", *command])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout if code == 0 else result.stderr


@pytest.mark.slow
def test_an_onnx_file_from_the_saved_network_alone(place: Path, digits: ImageData, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    out = tmp_path / "small.onnx"
    assert f"written and checked: {out}" in run(str(place / "small.safetensors"), "--out", str(out), "--threads", "1")
    session = runtime.InferenceSession(out, providers=["CPUExecutionProvider"])
    exact = network(place).double()
    for count in (1, 5):
        images = normalised(digits, pixels(digits, count))
        [found] = session.run(None, {session.get_inputs()[0].name: images.float().numpy()})
        torch.testing.assert_close(torch.from_numpy(found).double(), exact(images), rtol=1e-4, atol=1e-4)
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["classes"]) == [str(digit) for digit in range(10)]
    takes = json.loads(said["input"])
    assert takes["shape"] == ["batch", 1, 8, 8]
    assert (tuple(takes["mean"]), tuple(takes["std"])) == digits.test.normalization
    [plan] = json.loads(said["plans"])
    assert ff.Plan.from_json(json.dumps(plan)) == ff.surgery.checkpoint.inspect(place / "small.safetensors").plans[0]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".ts", ".xml"])
def test_pixels_in_equals_normalised_in(place: Path, digits: ImageData, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip({".onnx": "onnxruntime", ".xml": "openvino"}.get(suffix, "torch"))
    out = tmp_path / f"small{suffix}"
    run(str(place / "small.safetensors"), "--out", str(out), "--pixels")
    images = pixels(digits, 3)
    if suffix == ".onnx":
        found = ff.OnnxNetwork(out)(images)
    elif suffix == ".xml":
        import openvino

        compiled = openvino.Core().compile_model(out, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        found = torch.from_numpy(compiled([images.numpy()])[0])
    else:
        found = (torch.jit.load(out) if suffix == ".ts" else torch.export.load(out).module())(images)
    expected = network(place).double()(normalised(digits, images))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_8_bits_agree_with_the_network_from_before(place: Path, tmp_path: Path) -> None:
    onnx, out = pytest.importorskip("onnx"), tmp_path / "small.onnx"
    command = [str(place / "small.safetensors"), "--out", str(out), "--int8", "--data", "digits", "--pixels"]
    command += ["--before", str(place / "dense.safetensors"), "--batch", "2", "--repeats", "7", "--threads", "1"]
    figures = json.loads(run(*command, "--json"))["figures"]
    rows = {row["name"]: row for row in figures["networks"]}
    assert list(rows) == ["float", "pruned", "pruned + int8"]
    assert figures["images"] == 359
    assert rows["float"]["agreement"] == 100
    assert rows["float"]["top1"] > 80
    # A tenth of the images is far above what 8 bits cost, and far below chance among ten classes.
    assert abs(rows["pruned + int8"]["agreement"] - rows["pruned"]["agreement"]) < 10
    assert abs(rows["pruned + int8"]["top1"] - rows["pruned"]["top1"]) < 10
    assert {row["model"] for row in figures["latency"]["rows"]} == {*rows, "A/A control"}
    graph = onnx.load(out).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    read = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    assert convolutions
    assert all(kinds[read[node.input[1]]] == onnx.TensorProto.INT8 for node in convolutions)
    assert "agreement %" in run(*command, "--overwrite")
    timed = ["latency", str(out), "--input", "1x8x8", "--batch", "1", "--images", "0", "--repeats", "7"]
    refused = CliRunner().invoke(app, timed)
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "is a tensor(uint8), given was a tensor(float)" in refused.stderr
    run(*command[:6], "--batch", "0", "--overwrite")  # without --pixels
    found = CliRunner().invoke(app, [*timed, "--json"])
    assert found.exit_code == 0, found.output
    rows = json.loads(found.stdout)["comparisons"][0]["rows"]
    assert [row["model"] for row in rows] == ["small.onnx", "A/A control"]


def test_a_folder_of_the_hub_says_whose_code_it_has(tmp_path: Path, digits: ImageData) -> None:
    model = build("vgg_small", **SIZES).eval()
    ff.save_pretrained(model, tmp_path / "small", "vgg_small", digits.example, arguments={"classes": 10, **SIZES})
    run(str(tmp_path / "small" / "model.safetensors"), "--out", str(tmp_path / "small.pt2"))
    images = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(torch.export.load(tmp_path / "small.pt2").module()(images), model(images))


REFUSED = {
    "a damaged file": ("{}/cut.safetensors", "cut.safetensors: not a whole safetensors file"),
    "a foreign file": ("{}/foreign.pt", "foreign.pt: not a network that Filterfold saved"),
    "no file": ("{}/none.safetensors", "none.safetensors: no such file"),
    "no code noted": ("{}/silent.safetensors", "give --model, such as --model vgg16"),
    "no shape noted": ("{}/silent.safetensors -m vgg_small --width 0.25", "give --input, such as --input 3x32x32"),
    "code of others": ("{}/theirs.safetensors", "evil.py:net, which is not run unasked"),
    "odd notes": ("{}/odd.safetensors", "damaged header: what it notes of its network"),
    "another network": ("{}/small.safetensors -m resnet20", "small.safetensors"),
    "no such form": ("{}/small.safetensors --out {}/new.tflite", "the suffix says the form; give one of .onnx, .pt2"),
    "8 bits without images": ("{}/small.safetensors --int8", "--int8 is calibrated on images: give --data"),
    "8 bits in another form": ("{}/small.safetensors --int8 -d digits -o {}/a.pt2", "--int8 writes ONNX files"),
    "another network before it": ("{}/small.safetensors --before {}/dense.safetensors", "give --data"),
    "options of no images": ("{}/small.safetensors --train-limit 100", "have no effect without --data"),
    "unknown normalisation": (
        "{}/silent.safetensors -m vgg_small --width 0.25 --input 1x8x8 --pixels", "give --mean and --std"
    ),
    "a file in the way": ("{}/small.safetensors --out {}/dense.safetensors.onnx", "exists; give another --out"),
    "a file in the way of its weights": ("{}/small.safetensors --out {}/foreign.xml", "foreign.bin exists"),
    "no folder": ("{}/small.safetensors --out {}/evil.py/small.onnx", "can't be written"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_and_nothing_is_written(place: Path, case: str) -> None:
    (place / "dense.safetensors.onnx").write_text("in the way")
    line, message = REFUSED[case]
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    said = run(*line.replace("{}", str(place)).split(), code=2)
    assert said.startswith("filterfold: ")
    assert said.count("\n") == 1
    assert message in said
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
