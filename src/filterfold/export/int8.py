"""8-bit integers after pruning: static quantisation of an ONNX file by ONNX Runtime, from calibration images."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import ExportError, one_line
from ..utils.inputs import outputs
from ..utils.io import write_atomically
from .onnx_network import OnnxNetwork
from .program import USUAL, ExportOptions, need, quiet, to_onnx


def to_int8(
    model: nn.Module,
    example_inputs: Any,
    path: str | Path,
    calibration: Iterable[Any],
    *,
    options: ExportOptions = USUAL,
) -> None:
    """Write a model as an ONNX file with 8-bit weights and activations (static quantisation after training).

    The network is exported in float32 first and checked as `to_onnx` does. ONNX Runtime then runs it on the calibration
    inputs and gives every tensor a scale by the smallest and the largest value that it saw (every output channel of a
    weight its own); it writes them as pairs of QuantizeLinear and DequantizeLinear, which other runtimes read, too.

    **Arguments:**

    - `model`, `example_inputs`, `path`, `options`: as for `to_onnx`.
    - `calibration`: batches of inputs, as the model takes them; some hundred typical images in all. Labels are
      not read.

    **Raises:** `ExportError` as `to_onnx` does, if there are no calibration inputs, or if the file gives outputs that
    are not finite or of another shape on the last of them.
    """
    need("to_int8", "onnx", "onnx", "onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        plain, prepared, made = (Path(folder) / f"{name}.onnx" for name in ("float", "prepared", "int8"))
        to_onnx(model, example_inputs, plain, options=options)
        feeds = _Feeds(calibration, OnnxNetwork(plain).inputs)
        with quiet():
            try:
                _quantise(plain, prepared, made, feeds)
            except ExportError:
                raise
            except Exception as error:  # what ONNX Runtime raises has no common public kind
                raise ExportError(f"{type(model).__name__} has no 8-bit form: {one_line(error)}") from error
        expected, found = (outputs(OnnxNetwork(file), feeds.last) for file in (plain, made))
        for wanted, got in zip(expected, found, strict=True):
            if wanted.shape != got.shape or not got.isfinite().all():
                raise ExportError(f"{type(model).__name__} gives no finite outputs in 8 bits; nothing was written")
        write_atomically(Path(path), lambda file: file.write_bytes(made.read_bytes()))


def _quantise(plain: Path, prepared: Path, made: Path, feeds: _Feeds) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    said = onnx.load(plain).metadata_props
    quant_pre_process(plain, prepared, skip_symbolic_shape=True)  # fuses batch norms into convolutions
    quantize_static(
        prepared, made, feeds, per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8
    )
    graph = onnx.load(made)
    del graph.metadata_props[:]
    graph.metadata_props.extend(said)
    onnx.save(graph, made)


class _Feeds:
    """Calibration inputs as ONNX Runtime asks for them, one batch after the other; `last` is the latest."""

    def __init__(self, batches: Iterable[Any], names: tuple[str, ...]) -> None:
        self._batches, self._names = iter(batches), names
        self.last: Any = None

    def get_next(self) -> dict[str, Any] | None:
        for inputs in self._batches:
            self.last = inputs
            tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
            return {name: tensor.cpu().numpy() for name, tensor in zip(self._names, tensors, strict=True)}
        if self.last is None:
            raise ExportError("there are no calibration inputs: 8 bits need some hundred typical images")
        return None
