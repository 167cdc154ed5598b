"""Products of data and a kernel as matrices: each convolution, transposed convolution, linear and matrix product.

Whatever module or function calls them, as operations they are all: output rows = input rows @ kernel + bias, group by
group. Of the rows only a sample is taken: some places of each image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

aten = torch.ops.aten

_ELEMENTS = 2**22
"""Rows are gathered in pieces of at most so many elements (32 MiB in float64), or one image."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A few images of a sample: their indices, their places, which rows of the sample these are, and of which half."""

    images: Tensor
    places: Tensor
    rows: slice
    second: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """Some rows of a product.

    **Arguments:**

    - `images`: shape `(M,)`: indices along the first axis of the data.
    - `places`: shape `(M, P)`: for each of them flat indices into the output's space.
    - `first`: so many of them are of the first half of the examples; the others of the second.
    """

    images: Tensor
    places: Tensor
    first: int

    @classmethod
    def draw(cls, product: Product, rows: int, *, examples: int, seed: int) -> Sample:
        """About `rows` rows of a product: as many places of every image, or one of as many images as that.

        Of `examples` examples every second one is of the second half; where one image is all there is, half of its
        places.
        """
        generator = torch.Generator().manual_seed(seed)
        images, space, device = product.images, prod(product.space), product.data.device
        chosen = torch.randperm(images, generator=generator)[:rows] if images > rows else torch.arange(images)
        count = min(space, ceil(rows / max(1, len(chosen))))
        if len(chosen) * space <= _ELEMENTS:
            places = torch.rand(len(chosen), space, generator=generator).topk(count, dim=1).indices
        else:
            places = torch.randint(space, (len(chosen), count), generator=generator)
        each = images // examples if images % examples == 0 else 1
        half, order = (chosen // each % 2).sort(stable=True)
        chosen, places, first = chosen[order], places[order], int((half == 0).sum())
        if images == 1 and count > 1:
            chosen, places, first = chosen.repeat(2), places[:, : count // 2 * 2].reshape(2, -1), 1
        return cls(chosen.to(device), places.to(device), first)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.places.numel()

    def pieces(self, elements: int) -> Iterator[Piece]:
        """A few images at a time, of one half each; `elements`: how many an image takes."""
        step, count = max(1, _ELEMENTS // max(1, elements)), self.places.shape[1]
        for low, high in ((0, self.first), (self.first, len(self.images))):
            for start in range(low, high, step):
                end = min(high, start + step)
                rows = slice(start * count, end * count)
                yield Piece(self.images[start:end], self.places[start:end], rows, low > 0)

    def taken(self, maps: Tensor) -> Tensor:
        """Rows of maps of shape `(images, channels, space)`: shape `(rows, channels)`."""
        found = maps.new_empty(self.rows, maps.shape[1])
        for piece in self.pieces(maps[0].numel()):
            index = piece.places[:, None].expand(-1, maps.shape[1], -1)
            found[piece.rows] = maps[piece.images].gather(2, index).mT.flatten(0, 1)
        return found


@dataclass(frozen=True, slots=True)
class MatrixProduct:
    """Linear layers and matrix products; the channels are the data's last axis.

    **Arguments:**

    - `data`: shape `(images, space, groups, inputs)`.
    - `weight`: as the operation got it.
    - `form`: makes a view of a weight, of shape `(groups, inputs, outputs)`.
    - `bias`: shape `(outputs,)`.
    - `out_axes`: axis of the weight → axis of `outputs`, for those that run along the outputs.
    - `arranged`: brings the operation's output into the shape `(images, space, groups, outputs)`.
    """

    data: Tensor
    weight: Tensor
    bias: Tensor | None
    form: Callable[[Tensor], Tensor]
    out_axes: Mapping[int, int]
    arranged: Callable[[Tensor], Tensor]

    @property
    def images(self) -> int:
        """Length of the first axis of the data."""
        return self.data.shape[0]

    @property
    def channels(self) -> int:
        """Number of input channels of a group."""
        return self.data.shape[3]

    @property
    def space(self) -> tuple[int, ...]:
        """Sizes of the output's other axes, but the channels'."""
        return (self.data.shape[1],)

    def write(self, kernel: Tensor) -> None:
        """Change the weight in place, to a kernel of shape `(groups, inputs, outputs)`."""
        self.form(self.weight).copy_(kernel)

    def inputs(self, sample: Sample) -> Iterator[tuple[Piece, Tensor]]:
        """Rows of the inputs, piece by piece: shape `(groups, rows, inputs)`."""
        groups, features = self.data.shape[2:]
        for piece in sample.pieces(sample.places.shape[1] * groups * features):
            yield piece, self.data[piece.images[:, None], piece.places].flatten(0, 1).transpose(0, 1)

    def outputs(self, output: Tensor, sample: Sample) -> Tensor:
        """Rows of the output, of shape `(rows, groups, outputs)`."""
        return self.arranged(output)[sample.images[:, None], sample.places].flatten(0, 1)


@dataclass(frozen=True, slots=True)
class Convolution:
    """A convolution over any number of axes, group by group; features are ordered by input channel, then place.

    **Arguments:**

    - `data`: shape `(images, channels, *space)`.
    - `weight`, `bias`, `groups`, `stride`, `dilation`: as the operation got them, but for one entry each axis.
    - `pads`: zeros before and after, for each axis.
    """

    data: Tensor
    weight: Tensor
    bias: Tensor | None
    groups: int
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]

    @property
    def images(self) -> int:
        """Length of the first axis of the data."""
        return self.data.shape[0]

    @property
    def channels(self) -> int:
        """Number of input channels of a group."""
        return self.data.shape[1] // self.groups

    @property
    def out_axes(self) -> Mapping[int, int]:
        """Axis of the weight → axis of `outputs`, for those that run along the outputs."""
        return {0: 1}

    @property
    def space(self) -> tuple[int, ...]:
        """Sizes of the output's axes, but the channels'."""
        sizes = zip(self.data.shape[2:], self.pads, self.dilation, self.weight.shape[2:], self.stride, strict=True)
        return tuple((size + sum(pad) - d * (k - 1) - 1) // s + 1 for size, pad, d, k, s in sizes)

    def form(self, weight: Tensor) -> Tensor:
        """A weight in the shape `(groups, inputs, outputs)`."""
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1).mT

    def write(self, kernel: Tensor) -> None:
        """Change the weight in place, to a kernel of shape `(groups, inputs, outputs)`."""
        self.weight.copy_(kernel.mT.reshape(self.weight.shape))

    def inputs(self, sample: Sample) -> Iterator[tuple[Piece, Tensor]]:
        """Rows of the inputs, piece by piece: shape `(groups, rows, inputs)`."""
        channels, kernel = self.data.shape[1], self.weight.shape[2:]
        size = channels * max(prod(self.data.shape[2:]), sample.places.shape[1] * prod(kernel))
        for piece in sample.pieces(size):
            data = self._padded(self.data[piece.images])
            index = self._corners(piece.places, data.shape[2:]) + self._window(data.shape[2:])
            index = index.flatten(1)[:, None].expand(-1, channels, -1)
            found = data.flatten(2).gather(2, index)
            found = found.view(len(data), self.groups, channels // self.groups, sample.places.shape[1], -1)
            yield piece, found.permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)

    def outputs(self, output: Tensor, sample: Sample) -> Tensor:
        """Rows of the output, of shape `(rows, channels)`."""
        maps = output if output.dim() == self.data.dim() else output[None]
        return sample.taken(maps.flatten(2))

    def _padded(self, data: Tensor) -> Tensor:
        pads = [size for pair in reversed(self.pads) for size in pair]
        return functional.pad(data, pads) if any(pads) else data

    def _corners(self, places: Tensor, space: Sequence[int]) -> Tensor:
        """Flat index of each place's first input: shape `(images, places, 1)`."""
        found = torch.zeros_like(places)
        for axis, index in enumerate(_unravelled(places, self.space)):
            found += index * self.stride[axis] * prod(space[axis + 1 :])
        return found[:, :, None]

    def _window(self, space: Sequence[int]) -> Tensor:
        """Flat offsets of the kernel's places from the first, in the order of the weight."""
        kernel = self.weight.shape[2:]
        found = torch.zeros((), dtype=torch.int64)
        for axis, offsets in enumerate(self._offsets()):
            view = [-1 if other == axis else 1 for other in range(len(kernel))]
            found = found + offsets.view(view) * prod(space[axis + 1 :])
        return found.flatten().to(self.data.device)

    def _offsets(self) -> list[Tensor]:
        return [torch.arange(k) * d for k, d in zip(self.weight.shape[2:], self.dilation, strict=True)]


@dataclass(frozen=True, slots=True)
class TransposedConvolution(Convolution):
    """A transposed convolution: a plain one over the data with zeros between, its kernel turned around.

    `stride` is that of the plain one, 1; `spread` that of the transposed one; `pads` are those of the plain one.
    """

    spread: tuple[int, ...]

    @property
    def out_axes(self) -> Mapping[int, int]:
        """Axis of the weight → axis of `outputs`; the first axis of a depthwise kernel runs along the groups."""
        return {0: 1, 1: 2} if self.weight.shape[0] == self.groups else {1: 2}

    @property
    def space(self) -> tuple[int, ...]:
        """Sizes of the output's axes, but the channels'."""
        sizes = zip(self.data.shape[2:], self.spread, self.pads, self.dilation, self.weight.shape[2:], strict=True)
        return tuple((size - 1) * s + 1 + sum(pad) - d * (k - 1) for size, s, pad, d, k in sizes)

    def form(self, weight: Tensor) -> Tensor:
        """A weight in the shape `(groups, inputs, outputs)`."""
        split = weight.reshape(self.groups, -1, *weight.shape[1:]).flatten(3)
        return split.permute(0, 1, 3, 2).flatten(1, 2)

    def write(self, kernel: Tensor) -> None:
        """Change the weight in place, to a kernel of shape `(groups, inputs, outputs)`."""
        inputs, outputs = self.weight.shape[0] // self.groups, self.weight.shape[1]
        split = kernel.reshape(self.groups, inputs, -1, outputs)
        self.weight.copy_(split.permute(0, 1, 3, 2).reshape(self.weight.shape))

    def outputs(self, output: Tensor, sample: Sample) -> Tensor:
        """Rows of the output, of shape `(rows, groups, outputs)`."""
        rows = Convolution.outputs(self, output, sample)
        return rows.reshape(len(rows), self.groups, -1)

    def _padded(self, data: Tensor) -> Tensor:
        sizes = ((size - 1) * s + 1 for size, s in zip(data.shape[2:], self.spread, strict=True))
        spread = data.new_zeros(*data.shape[:2], *sizes)
        places = (slice(None), slice(None), *(slice(None, None, s) for s in self.spread))
        spread[places] = data
        return Convolution._padded(self, spread)

    def _offsets(self) -> list[Tensor]:
        return [offsets.flip(0) for offsets in Convolution._offsets(self)]


Product = MatrixProduct | Convolution


def _unravelled(places: Tensor, space: Sequence[int]) -> list[Tensor]:
    """Indices along every axis."""
    found = []
    for size in reversed(space):
        found.append(places % size)
        places = places // size
    return found[::-1]


Arguments = Mapping[str, Any]
Owned = Callable[[Tensor], bool]
"""Whether a tensor is, or is computed from, parameters and buffers alone."""


def _each(value: Any, axes: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values if len(values) == axes else values * axes


def _convolution(given: Arguments, _owned: Owned) -> Product:
    weight, padding = given["weight"], given["padding"]
    axes, data = weight.dim() - 2, given["input"]
    stride, dilation = (_each(given[name], axes) for name in ("stride", "dilation"))
    if isinstance(padding, str):
        sizes = zip(dilation, weight.shape[2:], strict=True)
        total = [0 if padding == "valid" else d * (k - 1) for d, k in sizes]
        pads = tuple((size // 2, size - size // 2) for size in total)
    else:
        pads = tuple((size, size) for size in _each(padding, axes))
    data = data if data.dim() == weight.dim() else data[None]
    return Convolution(data, weight, given["bias"], given["groups"], stride, dilation, pads)


def _transposed(given: Arguments, _owned: Owned) -> Product:
    weight, data = given["weight"], given["input"]
    names = ("stride", "padding", "output_padding", "dilation")
    spread, padding, more, dilation = (_each(given[name], weight.dim() - 2) for name in names)
    sizes = zip(padding, more, dilation, weight.shape[2:], strict=True)
    pads = tuple((d * (k - 1) - pad, d * (k - 1) - pad + extra) for pad, extra, d, k in sizes)
    data = data if data.dim() == weight.dim() else data[None]
    ones = (1,) * len(spread)
    return TransposedConvolution(data, weight, given["bias"], given["groups"], ones, dilation, pads, spread)


def _linear(given: Arguments, _owned: Owned) -> Product | None:
    data, weight = given["input"], given["weight"]
    if weight.dim() != 2:
        return None
    images = data.shape[0] if data.dim() > 1 else 1

    def arranged(value: Tensor) -> Tensor:
        return value.reshape(images, -1, 1, value.shape[-1])

    return MatrixProduct(arranged(data), weight, given["bias"], lambda w: w.mT[None], {0: 2}, arranged)


def _matrices(left: Tensor, right: Tensor, bias: Tensor | None, owned: Owned) -> Product:
    """`left @ right`, one of which is the weight; in batches, each of which is a group unless all have one weight."""
    batched = left.dim() == 3
    turned = owned(left)
    data, weight = (right.mT, left) if turned else (left, right)
    out = (1 if turned else 2) if batched else (0 if turned else 1)

    def straight(value: Tensor) -> Tensor:
        return value.mT if turned else value

    if not batched:
        shape = slice(None), None, None
        return MatrixProduct(
            data[shape], weight, bias, lambda w: straight(w)[None], {out: 2}, lambda y: straight(y)[shape]
        )
    if weight.stride(0) == 0:
        return MatrixProduct(
            data[:, :, None], weight, bias, lambda w: straight(w)[:1], {out: 2}, lambda y: straight(y)[:, :, None]
        )
    return MatrixProduct(
        *(data.permute(1, 0, 2)[:, None], weight, bias, straight, {0: 1, out: 2}),
        lambda y: straight(y).permute(1, 0, 2)[:, None],
    )


def _product(given: Arguments, owned: Owned) -> Product:
    return _matrices(given["self"], given["mat2"], None, owned)


def _sum_product(given: Arguments, owned: Owned) -> Product | None:
    plain = given["self"].dim() == 1 and given["beta"] == given["alpha"] == 1 and not owned(given["mat1"])
    return _matrices(given["mat1"], given["mat2"], given["self"], owned) if plain else None


KINDS: dict[Any, Callable[[Arguments, Owned], Product | None]] = {
    aten.conv1d: _convolution,
    aten.conv2d: _convolution,
    aten.conv3d: _convolution,
    aten.conv_transpose1d: _transposed,
    aten.conv_transpose2d: _transposed,
    aten.conv_transpose3d: _transposed,
    aten.linear: _linear,
    aten.mm: _product,
    aten.bmm: _product,
    aten.addmm: _sum_product,
}
"""Operation → its product as matrices; None where it is no such product."""
