"""A machine whose clock is arithmetic: what an op takes is known, so that timing can be tested to the digit."""

from __future__ import annotations

from math import ceil, prod

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Machine(TorchDispatchMode):
    """Computes channels in blocks of `block`; everything but layers takes `elementwise` seconds an element.

    Seconds of a convolution or linear layer: 1e-9 · positions · kernel · both widths rounded up to blocks, times
    `slow` where the kernel has that size.
    """

    def __init__(self, block: int = 16, elementwise: float = 0.0, slow: dict[int, float] | None = None) -> None:
        super().__init__()
        self.block, self.elementwise, self.slow = block, elementwise, slow or {}
        self.now, self.runs = 0.0, 0

    def __call__(self, run, times: int) -> float:
        """The timer."""
        self.now, self.runs = 0.0, self.runs + 1
        with self:
            run()
        return times * self.now

    def of(self, model, x) -> float:
        """Seconds of a whole network."""
        with torch.inference_mode():
            return self(lambda: model.eval()(x), 1)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket in (aten.conv2d, aten.linear):
            weight = args[1]
            out, into, *kernel = weight.shape
            positions = output.numel() // out
            kernel = prod(kernel)
            blocks = prod(self.block * ceil(width / self.block) for width in (out, into))
            self.now += 1e-9 * positions * kernel * blocks * self.slow.get(kernel, 1.0)
        else:
            tensors = output if isinstance(output, tuple | list) else (output,)
            self.now += self.elementwise * sum(t.numel() for t in tensors if isinstance(t, torch.Tensor))
        return output
