"""Export: the pruned network as a `torch.export` program or an ONNX file, with a batch of any size."""

from __future__ import annotations

import importlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import ExportError, one_line, pass_on_exhaustion
from ..utils.arguments import typed
from .inputs import arguments, batch_of, difference, examples, outputs
from .io import write_atomically
from .model_state import preserved
from .modules import unwrap

TOLERANCE = 1e-4
"""Largest max|a - b| / max|a| between ONNX Runtime and PyTorch: other kernels sum in another order."""


_LARGEST = 2**31 - 1  # bytes that one protocol buffer can hold


@typed
def to_program(
    model: nn.Module, example_inputs: Any, path: str | Path | None = None, *, dynamic: bool = True
) -> torch.export.ExportedProgram:
    """Export a model in eval mode to a `torch.export` program.

    **Arguments:**

    - `model`: pruned or not; its modes are kept.
    - `example_inputs`: a tensor, a tuple of arguments, or a dictionary of keyword arguments.
    - `path`: if given, the program is also written there (by habit `something.pt2`), atomically.
    - `dynamic`: whether the first axis of the inputs may have any size.

    **Returns:** the program; `program.module()` runs it.

    **Raises:** `ExportError` if the model can't be exported, with PyTorch's reason.

    ```python
    >>> program = to_program(nn.Linear(3, 2), torch.zeros(1, 3))
    >>> program.module()(torch.zeros(5, 3)).shape
    torch.Size([5, 2])

    ```
    """
    model = unwrap(model)
    positional, keywords, shapes = *arguments(example_inputs), None
    if dynamic:
        # A batch of one becomes a batch of two: exporting takes sizes of 1 for constants.
        positional, keywords = arguments(
            examples(example_inputs, 2) if batch_of(example_inputs) == 1 else example_inputs
        )
        shapes = _dynamic_shapes(model, positional, keywords)
    with preserved(model), torch.no_grad(), _quiet():
        try:
            program = torch.export.export(model, positional, keywords, dynamic_shapes=shapes, strict=False)
        except (Exception, SystemExit) as error:
            pass_on_exhaustion(error)
            hint = "; dynamic=False fixes the batch size" if dynamic else ""
            raise ExportError(f"{type(model).__name__} can't be exported: {one_line(error)}{hint}") from error
    if path is not None:
        buffer = io.BytesIO()
        with _quiet():
            torch.export.save(program, buffer)
        write_atomically(Path(path), lambda temporary: temporary.write_bytes(buffer.getvalue()))
    return program


@typed
def to_onnx(
    model: nn.Module, example_inputs: Any, path: str | Path, *, check: bool = True, dynamic: bool = True
) -> None:
    """Write a model as an ONNX file, checked in ONNX Runtime against PyTorch before it is there.

    Needs the extra: `pip install 'filterfold[onnx]'`.

    **Arguments:**

    - `model`: pruned or not, with float32 (or smaller) parameters; exported in eval mode.
    - `example_inputs`: a tensor, a tuple of arguments, or a dictionary of keyword arguments.
    - `path`: the file, replaced if it exists; written atomically, and only if the check succeeds.
    - `check`: compare the outputs of both on random inputs, at two batch sizes.
    - `dynamic`: whether the first axis of the inputs may have any size.

    **Raises:** `ExportError` if a package is missing, the model can't be exported, or the outputs differ.
    """
    _need("onnx", "onnxscript", *(["onnxruntime"] if check else []))
    model = unwrap(model)
    program = to_program(model, example_inputs, dynamic=dynamic)
    with _quiet():
        try:
            exported = torch.onnx.export(program, dynamo=True, verbose=False)
        except Exception as error:
            pass_on_exhaustion(error)
            raise ExportError(f"{type(model).__name__} has no ONNX form: {one_line(error)}") from error
    assert exported is not None
    if exported.model_proto.ByteSize() > _LARGEST:
        raise ExportError(f"{type(model).__name__} is larger than the 2 GB that one ONNX file holds")
    data = exported.model_proto.SerializeToString()
    if check:
        _check(model, example_inputs, data, (2, 3) if dynamic else (None,))
    write_atomically(Path(path), lambda temporary: temporary.write_bytes(data))


def _check(model: nn.Module, example_inputs: Any, data: bytes, batches: tuple[int | None, ...]) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    for batch in batches:
        inputs = _noise(example_inputs, batch)
        tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        if len(names) != len(tensors):
            raise ExportError(f"the ONNX graph reads {len(names)} of {len(tensors)} inputs: {', '.join(names)}")
        with preserved(model):
            expected = outputs(model, inputs)
        feed = {name: tensor.cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}
        actual = [torch.from_numpy(value) for value in session.run(None, feed)]
        error = difference([value.cpu() for value in expected], actual)
        if not error <= TOLERANCE:
            where = f"with {batch} examples" if batch else "on the example inputs"
            raise ExportError(f"ONNX Runtime differs from PyTorch by {error:.1e} {where}; nothing was written")


def _noise(inputs: Any, batch: int | None) -> Any:
    """Inputs of the same kinds and shapes as the example, floats random, with `batch` examples."""
    generator = torch.Generator().manual_seed(0)

    def turn(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return torch.randn(value.shape, generator=generator).to(value)
        return value

    return tree_map(turn, inputs if batch is None else examples(inputs, batch))


def _dynamic_shapes(model: nn.Module, positional: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    size = batch_of((*positional, *keywords.values()))
    if size is None:
        raise ExportError("the example inputs hold no tensor with a batch axis")

    def axes(value: Any) -> Any:
        has_batch = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size
        return {0: torch.export.Dim.DYNAMIC} if has_batch else None

    names = inspect.signature(model.forward).bind(*positional, **keywords).arguments
    return {name: tree_map(axes, value) for name, value in names.items()}


def _need(*packages: str) -> None:
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ExportError(f"to_onnx needs the package {name}: pip install 'filterfold[onnx]'") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporters say about themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
