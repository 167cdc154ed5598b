"""Export to TorchScript, OpenVINO and ExecuTorch; and which suffix means which form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import ExportError, one_line
from ..utils.inputs import arguments
from ..utils.model_state import preserved
from ..utils.modules import unwrap
from .program import USUAL, ExportOptions, Job, need, noise, quiet, to_onnx, to_program, write_checked


def to_torchscript(model: nn.Module, example_inputs: Any, path: str | Path, *, options: ExportOptions = USUAL) -> None:
    """Write a model as a TorchScript file, checked against PyTorch before it is there.

    It is made by tracing: sizes that the model's code computes from those of its inputs follow them, decisions do not.
    PyTorch calls TorchScript deprecated; `to_program` is what it recommends.

    **Arguments:** as for `to_onnx`. The metadata are read by `torch.jit.load(path, _extra_files={"KEY": ""})`.

    **Raises:** `ExportError` if the model can't be traced, or the outputs differ.
    """
    model = unwrap(model)
    positional, keywords = arguments(noise(example_inputs, 2 if options.dynamic else None))

    def write(file: Path) -> None:
        try:
            with preserved(model), torch.no_grad():
                model.eval()
                traced = torch.jit.trace(  # type: ignore[no-untyped-call]
                    model, positional or None, example_kwarg_inputs=keywords or None, check_trace=False, strict=False
                )
            torch.jit.save(traced, file, _extra_files=options.texts)
        except Exception as error:
            raise ExportError(f"{type(model).__name__} has no TorchScript form: {one_line(error)}") from error

    with quiet():
        write_checked(Job(model, example_inputs, Path(path), options), write, torch.jit.load, "TorchScript")


def to_openvino(model: nn.Module, example_inputs: Any, path: str | Path, *, options: ExportOptions = USUAL) -> None:
    """Write a model for OpenVINO: `something.xml`, and beside it `something.bin`, in float32.

    Needs `pip install 'filterfold[openvino]'`. The check lets OpenVINO compute in float32, which it does not on every
    processor by itself. The metadata lie in the runtime information, under `filterfold`.

    **Arguments, raises:** as for `to_onnx`.
    """
    need("to_openvino", "openvino", "openvino")
    import openvino

    model = unwrap(model)

    def write(file: Path) -> None:
        program = to_program(model, example_inputs, options=options)
        try:
            converted = openvino.convert_model(program)
        except Exception as error:
            raise ExportError(f"{type(model).__name__} has no OpenVINO form: {one_line(error)}") from error
        for key, value in options.texts.items():
            converted.set_rt_info(value, ["filterfold", key])
        openvino.save_model(converted, file, compress_to_fp16=False)

    def read(file: Path) -> nn.Module:
        compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

        def run(tensors: list[Tensor]) -> list[Tensor]:
            found = compiled([tensor.numpy() for tensor in tensors])
            return [torch.from_numpy(found[place].copy()) for place in compiled.outputs]

        return _Elsewhere(run)

    with quiet():
        write_checked(Job(model, example_inputs, Path(path), options), write, read, "OpenVINO")


def to_executorch(model: nn.Module, example_inputs: Any, path: str | Path, *, options: ExportOptions = USUAL) -> None:
    """Write a model for ExecuTorch (`something.pte`), for processors with XNNPACK.

    Needs `pip install 'filterfold[executorch]'`. Each entry of the metadata is a method of the program that returns it.
    ExecuTorch plans its memory ahead: the file takes inputs of the example's sizes only, of its batch, too.

    **Arguments, raises:** as for `to_onnx`.
    """
    if options.dynamic_size:
        raise ExportError("ExecuTorch plans its memory ahead and takes images of one size: leave dynamic_size out")
    options = replace(options, dynamic=False, samples=())
    need("to_executorch", "executorch", "executorch")
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        from executorch.runtime import Runtime

    model = unwrap(model)

    def write(file: Path) -> None:
        program = to_program(model, example_inputs, options=options)
        try:
            lowered = to_edge_transform_and_lower(
                program, partitioner=[XnnpackPartitioner()], constant_methods=options.texts
            )
            file.write_bytes(lowered.to_executorch().buffer)
        except Exception as error:
            raise ExportError(f"{type(model).__name__} has no ExecuTorch form: {one_line(error)}") from error

    def read(file: Path) -> nn.Module:
        program = Runtime.get().load_program(file)
        method = program.load_method("forward")
        return _Elsewhere(lambda tensors: method.execute(tensors) if program else [])  # the method lives in the program

    with quiet():
        write_checked(Job(model, example_inputs, Path(path), options), write, read, "ExecuTorch")


class _Elsewhere(nn.Module):
    """A network that another program runs, as a module: it takes the tensors in the arguments, in their order."""

    def __init__(self, run: Callable[[list[Tensor]], list[Tensor]]) -> None:
        super().__init__()
        self._run = run

    def forward(self, *positional: Any, **keywords: Any) -> tuple[Tensor, ...]:
        tensors = [leaf for leaf in tree_leaves((positional, keywords)) if isinstance(leaf, Tensor)]
        return tuple(self._run(tensors))


FORMATS: dict[str, Callable[..., Any]] = {
    ".onnx": to_onnx,
    ".pt2": to_program,
    ".ts": to_torchscript,
    ".xml": to_openvino,
    ".pte": to_executorch,
}
"""Suffix → what writes such a file: `f(model, example_inputs, path, options=...)`."""
