"""An ONNX file as a module, so that whatever measures networks measures it, too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import ExportError, one_line

_NAMES = {"float32": "float", "float64": "double"}
"""NumPy's names of types that ONNX calls otherwise."""


class OnnxNetwork(nn.Module):
    """A network in an ONNX file, run by ONNX Runtime on the CPU with as many threads as PyTorch has set.

    It has no parameters, and no other mode than that of evaluation.

    **Arguments:**

    - `path`: the file.

    **Raises:** `ExportError` if ONNX Runtime is missing or can't run the file; in a call if the tensors in the
    arguments are not as many as the graph's inputs, or of other types.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise ExportError("ONNX files need the package onnxruntime: pip install 'filterfold[onnx]'") from error
        if not Path(path).is_file():
            raise ExportError(f"{path}: no such file")
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = onnxruntime.InferenceSession(
                Path(path).read_bytes(), settings, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # what ONNX Runtime raises has no common public kind
            raise ExportError(f"{path}: ONNX Runtime can't run it: {one_line(error)}") from error
        self._types = {entry.name: entry.type for entry in self._session.get_inputs()}
        self.inputs = tuple(self._types)

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says about itself, by key."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """One tensor, or a tuple of several, for the tensors in the arguments, in their order."""
        found = tuple(torch.from_numpy(value) for value in self.runner((arguments, keywords))())
        return found[0] if len(found) == 1 else found

    def runner(self, inputs: Any) -> Callable[[], Any]:
        """What runs the network once on the tensors in the inputs, and gives arrays: nothing else is done then."""
        tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        if len(tensors) != len(self.inputs):
            names = ", ".join(self.inputs)
            raise ExportError(f"the ONNX graph reads {len(self.inputs)} of {len(tensors)} inputs: {names}")
        feed = {name: tensor.cpu().numpy() for name, tensor in zip(self.inputs, tensors, strict=True)}
        for name, value in feed.items():
            given = f"tensor({_NAMES.get(value.dtype.name, value.dtype.name)})"
            if given != self._types[name]:
                raise ExportError(f"the ONNX graph's input {name} is a {self._types[name]}, given was a {given}")
        return partial(self._session.run, None, feed)
