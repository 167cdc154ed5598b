"""Export: a network as an ONNX file, a `torch.export` program and other forms, with a batch of any size.

Every function writes into a temporary folder first, reads the file back with the program that will run it, and compares
the outputs with PyTorch's. Only then is the file there.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import ExportError, one_line, pass_on_exhaustion
from ..utils.arguments import typed
from ..utils.inputs import arguments, batch_of, difference, examples, outputs
from ..utils.io import check_output, write_atomically
from ..utils.model_state import preserved
from ..utils.modules import unwrap
from .onnx_network import OnnxNetwork

TOLERANCE = 1e-4
"""Largest max|a - b| / max|a| between what runs the file and PyTorch: other kernels sum in another order."""


_LARGEST = 2**31 - 1  # bytes that one protocol buffer can hold


_FARTHER = (32, 64)
"""Pixels by which height and width differ from the example's in the check of `dynamic_size`."""


_LOGGERS = (
    "torch.onnx",
    "torch.export",
    "torch.utils._pytree",
    "onnxscript",
    "executorch",
    "openvino",
    "torchao",
    "root",
)


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What an exported file is to take and to say.

    **Arguments:**

    - `dynamic`: the first axis of the inputs may have any size.
    - `dynamic_size`: height and width of images (axes 2 and 3 of inputs with four axes) may have any size, too.
    - `metadata`: kept in the file, under its own keys; what is no text becomes JSON.
    - `samples`: real inputs, such as a batch of images, on which the file is checked, too.
    """

    dynamic: bool = True
    dynamic_size: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[Any] = ()

    @property
    def texts(self) -> dict[str, str]:
        """The metadata as texts.

        >>> ExportOptions(metadata={"classes": ["cat", "dog"], "by": "me"}).texts
        {'classes': '["cat", "dog"]', 'by': 'me'}
        """
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in self.metadata.items()}


USUAL = ExportOptions()


@typed
def to_program(
    model: nn.Module, example_inputs: Any, path: str | Path | None = None, *, options: ExportOptions = USUAL
) -> torch.export.ExportedProgram:
    """Export a model in eval mode to a `torch.export` program.

    **Arguments:**

    - `model`: pruned or not; its modes are kept.
    - `example_inputs`: a tensor, a tuple of arguments, or a dictionary of keyword arguments.
    - `path`: if given, the program is also written there (by habit `something.pt2`), atomically, and checked.
    - `options`: see `ExportOptions`. The metadata are read by `torch.export.load(path, extra_files={"KEY": ""})`.

    **Returns:** the program; `program.module()` runs it.

    **Raises:** `ExportError` if the model can't be exported, with PyTorch's reason.

    ```python
    >>> program = to_program(nn.Linear(3, 2), torch.zeros(1, 3))
    >>> program.module()(torch.zeros(5, 3)).shape
    torch.Size([5, 2])

    ```
    """
    if path is not None:
        check_output(Path(path), folder=False)
    model = unwrap(model)
    positional, keywords, shapes = *arguments(example_inputs), None
    if options.dynamic:
        # A batch of one becomes a batch of two: exporting takes sizes of 1 for constants.
        positional, keywords = arguments(
            examples(example_inputs, 2) if batch_of(example_inputs) == 1 else example_inputs
        )
    if options.dynamic or options.dynamic_size:
        shapes = _dynamic_shapes(model, positional, keywords, options)
    with preserved(model), torch.no_grad(), quiet():
        try:
            program = torch.export.export(model, positional, keywords, dynamic_shapes=shapes, strict=False)
        except (Exception, SystemExit) as error:
            pass_on_exhaustion(error)
            hints = {"dynamic": "the batch size", "dynamic_size": "height and width"}
            asked = [f"{name}=False fixes {what}" for name, what in hints.items() if getattr(options, name)]
            hint = "".join(f"; {text}" for text in asked)
            raise ExportError(f"{type(model).__name__} can't be exported: {one_line(error)}{hint}") from error
    if path is not None:
        with quiet():
            write_checked(
                Job(model, example_inputs, Path(path), options),
                lambda file: torch.export.save(program, file, extra_files=options.texts),
                lambda file: torch.export.load(file).module(),
            )
    return program


@typed
def to_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | Path,
    *,
    check: bool = True,
    options: ExportOptions = USUAL,
) -> None:
    """Write a model as an ONNX file, checked in ONNX Runtime against PyTorch before it is there.

    Needs the extra: `pip install 'filterfold[onnx]'`.

    **Arguments:**

    - `model`: pruned or not, with float32 (or smaller) parameters; exported in eval mode.
    - `example_inputs`: a tensor, a tuple of arguments, or a dictionary of keyword arguments.
    - `path`: the file, replaced if it exists; written atomically, and only if the check succeeds.
    - `check`: compare the outputs of both on random inputs, at two batch sizes, and on `options.samples`.
    - `options`: see `ExportOptions`.

    **Raises:** `ExportError` if a package is missing, the model can't be exported, or the outputs differ.
    """
    need("to_onnx", "onnx", "onnx", "onnxscript", *(["onnxruntime"] if check else []))
    model = unwrap(model)

    def write(file: Path) -> None:
        program = to_program(model, example_inputs, options=options)
        with quiet():
            try:
                exported = torch.onnx.export(program, dynamo=True, verbose=False)
            except Exception as error:
                pass_on_exhaustion(error)
                raise ExportError(f"{type(model).__name__} has no ONNX form: {one_line(error)}") from error
        assert exported is not None
        proto = exported.model_proto
        for key, value in options.texts.items():
            proto.metadata_props.add(key=key, value=value)
        if proto.ByteSize() > _LARGEST:
            raise ExportError(f"{type(model).__name__} is larger than the 2 GB that one ONNX file holds")
        file.write_bytes(proto.SerializeToString())

    write_checked(Job(model, example_inputs, Path(path), options), write, OnnxNetwork if check else None)


@dataclass(frozen=True, slots=True)
class Job:
    """What is exported, and whereto."""

    model: nn.Module
    example_inputs: Any
    path: Path
    options: ExportOptions


def write_checked(
    job: Job, write: Callable[[Path], object], read: Callable[[Path], nn.Module] | None, runs_in: str = "ONNX Runtime"
) -> None:
    """Write a file, with those that belong to it, at another place, check it, and move it where it belongs.

    **Arguments:**

    - `write`: writes the file; others that it writes beside it go the same way.
    - `read`: makes a network of the file that takes what the model takes; None: there is no check.
    - `runs_in`: what runs that network, for the message.

    **Raises:** `ExportError` if the outputs differ.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / job.path.name
        write(file)
        if read is not None:
            _check(job, read(file), runs_in)
        for made in sorted(Path(folder).iterdir(), key=lambda made: made == file):  # the file itself last
            write_atomically(job.path.with_name(made.name), partial(shutil.copyfile, made))


def _check(job: Job, network: nn.Module, runs_in: str) -> None:
    asked = job.options
    batches = (2, 3) if asked.dynamic else (None,)
    places = [f"with {batch} examples" if batch else "on the example inputs" for batch in batches]
    tried = [(noise(job.example_inputs, batch), where) for batch, where in zip(batches, places, strict=True)]
    if asked.dynamic_size:
        tried.append((noise(job.example_inputs, batches[0], _FARTHER), "at another size"))
    tried += [(inputs, "on real inputs") for inputs in asked.samples]
    for inputs, where in tried:
        with preserved(job.model):
            expected = outputs(job.model, inputs)
        error = difference([value.cpu() for value in expected], outputs(network, inputs))
        if not error <= TOLERANCE:
            raise ExportError(f"{runs_in} differs from PyTorch by {error:.1e} {where}; nothing was written")


def noise(inputs: Any, batch: int | None, farther: tuple[int, int] = (0, 0)) -> Any:
    """Inputs of the same kinds as the example with `batch` examples, on the CPU: floats and bytes random.

    **Arguments:** `farther`: how many pixels higher and wider images are than those of the example.

    >>> noise(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 5, (1, 2)).shape
    torch.Size([5, 3, 9, 10])
    """
    generator = torch.Generator().manual_seed(0)

    def turn(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        shape = list(value.shape)
        if value.dim() == 4:
            shape[2:] = [side + more for side, more in zip(shape[2:], farther, strict=True)]
        if value.is_floating_point():
            return torch.randn(shape, generator=generator).to(value)
        if value.dtype == torch.uint8:
            return torch.randint(256, shape, generator=generator, dtype=torch.uint8).to(value)
        return value

    return tree_map(turn, inputs if batch is None else examples(inputs, batch))


def _dynamic_shapes(
    model: nn.Module, positional: tuple[Any, ...], keywords: Mapping[str, Any], options: ExportOptions
) -> Any:
    size = batch_of((*positional, *keywords.values()))
    if size is None:
        raise ExportError("the example inputs hold no tensor with a batch axis")
    free = torch.export.Dim.DYNAMIC

    def axes(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        found = {0: free} if options.dynamic and value.dim() > 0 and value.shape[0] == size else {}
        return found | ({2: free, 3: free} if options.dynamic_size and value.dim() == 4 else {}) or None

    names = inspect.signature(model.forward).bind(*positional, **keywords).arguments
    return {name: tree_map(axes, value) for name, value in names.items()}


def need(what: str, extra: str, *packages: str) -> None:
    """Nothing, if packages are there. Raises `ExportError` that says how to get them."""
    for name in packages:
        try:
            with quiet():
                importlib.import_module(name)
        except ImportError as error:
            raise ExportError(f"{what} needs the package {name}: pip install 'filterfold[{extra}]'") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what the exporters say about themselves."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
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
