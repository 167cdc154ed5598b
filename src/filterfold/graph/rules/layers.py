"""Rules for layers: what reads channels and makes new ones, and what goes along with them."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ..dispatch import Call, Tracer
from ..labels import FIXED, Axis, Layout
from . import RULES, rule


def _single(tracer: Tracer, axis: Axis, call: Call) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """The one label vector of an axis; more than one can't go through a layer and is frozen."""
    if not axis:
        return None
    if len(axis) > 1:
        tracer.table.freeze(axis, f"two channel axes merged into one before {call.site}")
        return None
    return axis[0]


def _read(tracer: Tracer, call: Call, source: Axis, kernel: Axis) -> None:
    """A weight's axis reads the channels of an input's axis."""
    tracer.table.assign(kernel, "kernel")
    tracer.table.join_axes([source, kernel], call.site)


def _go_along(tracer: Tracer, call: Call, channel: Axis, tensor: Tensor | None, role: Any, axis: int = 0) -> None:
    """Entries of `tensor` belong to the channels one to one."""
    if tensor is None or tensor.numel() == 0:
        return
    entries = tracer.layout(tensor)[axis]
    tracer.table.assign(entries, role)
    if tensor.shape[axis] > 1 or (channel and len(channel[0]) == 1):
        tracer.table.join_axes([channel, entries], call.site)


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
@rule("conv1d_padding")
def convolution(tracer: Tracer, call: Call) -> Layout:
    """A convolution, plain, grouped, depthwise or transposed, with any kind of weight."""
    x, weight, groups = call["input"], call["weight"], int(call["groups"])
    place = x.ndim - (weight.ndim - 1)
    source = tracer.layout(x)
    if groups == 1:
        follow = _plain
    elif groups == x.shape[place] and (_is_transposed(call) or weight.shape[1] == 1):
        follow = _depthwise
    else:
        follow = _grouped_transposed if _is_transposed(call) else _grouped
    channel = follow(tracer, call, source[place], tracer.layout(weight))
    _go_along(tracer, call, channel, call["bias"], "bias")
    layout = [*source[:place], channel]
    for axis in range(place + 1, x.ndim):
        keeps = bool(source[axis]) and call.out.shape[axis] == x.shape[axis] and not _is_transposed(call)
        tracer.table.mark_inexact(source[axis], f"{call.site} slides over them", ordered=True)
        if not keeps:
            tracer.table.freeze(source[axis], f"{call.site} slides over them and changes their number")
        layout.append(source[axis] if keeps else FIXED)
    return tuple(layout)


@rule("torchvision::roi_align", "torchvision::roi_pool")
def regions(tracer: Tracer, call: Call) -> Any:
    """Crops of a map, resampled: channels pass through."""
    layout = tracer.layout(call["input"])
    for axis in layout[2:]:
        tracer.table.freeze(axis, f"{call.site} resamples along them")
    result = (FIXED, layout[1], FIXED, FIXED)
    return [result] * len(call.outputs)


@rule("torchvision::deform_conv2d")
def deformable(tracer: Tracer, call: Call) -> Any:
    """A convolution whose taps are moved by offsets and weighted by a mask: those are as many as there are taps."""
    for name in ("offset", "mask"):
        tracer.freeze(tracer.layout(call[name])[1:2], f"an offset or a weight for every tap of {call.site}")
    return convolution(tracer, call)


def _is_transposed(call: Call) -> bool:
    return "transpose" in call.op or bool(call["transposed"])


def _plain(tracer: Tracer, call: Call, source: Axis, kernel: Layout) -> Axis:
    """One axis of the weight reads the input's channels, the other makes the output's."""
    made, read = (kernel[1], kernel[0]) if _is_transposed(call) else (kernel[0], kernel[1])
    tracer.table.assign(made, "filter")
    _read(tracer, call, source, read)
    return made


def _depthwise(tracer: Tracer, call: Call, source: Axis, kernel: Layout) -> Axis:
    """Every input channel has filters of its own, one or several: they go together."""
    shape, channels = call["weight"].shape, int(call["groups"])
    multiplier = int(shape[1] if _is_transposed(call) else shape[0] // channels)
    tracer.table.assign(kernel[0], "depthwise")
    vector = _single(tracer, source, call)
    spread: Axis = source if multiplier == 1 or vector is None else (np.repeat(vector, multiplier),)
    if _is_transposed(call):
        tracer.table.join_axes([source, kernel[0]], call.site)
        return spread
    return tracer.table.join_axes([spread, kernel[0]], call.site)


def _grouped(tracer: Tracer, call: Call, source: Axis, kernel: Layout) -> Axis:
    """Each group of filters reads its own part of the input's channels.

    The weight's second axis is as long as one part and read by all groups, and every group must keep equally many
    filters. So the channels at equal places of all parts go together, and so do the filters.
    """
    table, groups = tracer.table, int(call["groups"])
    table.assign(kernel[1], "kernel")
    vector = _single(tracer, source, call)
    if vector is not None:
        parts = vector.reshape(groups, -1)
        if kernel[1]:
            table.join(parts, kernel[1][0][None, :])
        else:
            table.join(parts[:1], parts)
            table.join_axes([(parts[0],), kernel[1]], call.site)
    elif source is not None:
        table.freeze(kernel[1], f"reads an input of fixed size in {call.site}")
    table.assign(kernel[0], "filter")
    filters = _single(tracer, kernel[0], call)
    if filters is None:
        return FIXED
    table.join(filters.reshape(groups, -1)[:1], filters.reshape(groups, -1))
    return (filters,)


def _grouped_transposed(tracer: Tracer, call: Call, source: Axis, kernel: Layout) -> Axis:
    """The weight's first axis reads all channels, group by group; its second makes those of every group."""
    groups = int(call["groups"])
    _single(tracer, source, call)
    if kernel[0]:
        readers = kernel[0][0].reshape(groups, -1)
        tracer.table.join(readers[:1], readers)
    _read(tracer, call, source, kernel[0])
    tracer.table.assign(kernel[1], "filter")
    return (np.tile(kernel[1][0], groups),) if kernel[1] else FIXED


@rule("linear")
def linear(tracer: Tracer, call: Call) -> Layout:
    """A product with Wᵀ, plus b, over the last axis."""
    x, weight = call["input"], call["weight"]
    source, kernel = tracer.layout(x), tracer.layout(weight)
    if source[-1] and len(source[-1]) > 1:
        _single(tracer, source[-1], call)
    _read(tracer, call, source[-1], kernel[-1])
    if weight.ndim == 1:
        return source[:-1]
    tracer.table.assign(kernel[0], "filter")
    _go_along(tracer, call, kernel[0], call["bias"], "bias")
    return (*source[:-1], kernel[0])


@rule("embedding")
def embedding(tracer: Tracer, call: Call) -> Layout:
    """Rows of a table looked up by index: the table's second axis makes channels."""
    table = tracer.layout(call["weight"])
    tracer.table.assign(table[1], "filter")
    tracer.table.freeze(table[0], f"looked up by index in {call.site}")
    return (*tracer.layout(call["indices"]), table[1])


@rule("batch_norm", "cudnn_batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training", "instance_norm")
def batch_norm(tracer: Tracer, call: Call) -> Any:
    """Per-channel normalisation: every entry belongs to its channel."""
    x = call["input"]
    layout = tracer.layout(x)
    for name in ("weight", "bias", "running_mean", "running_var"):
        _go_along(tracer, call, layout[1], call[name], "norm")
    statistics = call["training"] or call["use_input_stats"]
    for axis in (*layout[:1], *layout[2:]):
        if axis and statistics:
            tracer.table.mark_inexact(axis, f"statistics over them in {call.site}")
    return [layout] + [(layout[1],)] * 2 if isinstance(call.out, tuple | list) else layout


@rule("layer_norm", "native_layer_norm", "rms_norm")
def layer_norm(tracer: Tracer, call: Call) -> Layout:
    """Normalisation over the last axes: units are not mask-exact."""
    x = call["input"]
    layout = tracer.layout(x)
    count = len(call["normalized_shape"])
    for offset in range(-count, 0):
        tracer.table.mark_inexact(layout[offset], f"normalised over in {call.site}")
        for name in ("weight", "bias"):
            _go_along(tracer, call, layout[offset], call[name], "norm", offset)
    return layout


@rule("group_norm")
def group_norm(tracer: Tracer, call: Call) -> Layout:
    """Normalisation within groups of channels: every group keeps equally many; groups of one channel go with it."""
    x, groups = call["input"], int(call["num_groups"])
    layout = tracer.layout(x)
    for name in ("weight", "bias"):
        _go_along(tracer, call, layout[1], call[name], "norm")
    vector = _single(tracer, layout[1], call)
    if vector is not None and groups < x.shape[1]:
        tracer.table.mark_inexact(layout[1], f"normalised over in {call.site}")
        if groups > 1:
            tracer.table.keep_balanced(vector, groups)
    for axis in layout[2:]:
        tracer.table.mark_inexact(axis, f"normalised over in {call.site}")
    return layout


@rule("prelu")
def prelu(tracer: Tracer, call: Call) -> Layout:
    """A slope for each channel, or one for all."""
    x, weight = call["self"], call["weight"]
    layout = tracer.layout(x)
    if weight.numel() > 1:
        _go_along(tracer, call, layout[1], weight, "norm")
    return layout


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(tracer: Tracer, call: Call) -> Any:
    """Direction times length; surgery keeps what stays of the kernels as it is (`surgery.weight_norms`)."""
    layout = tracer.layout(call["v"])
    if call["g"].ndim == 0:  # one length over everything
        return [layout, ()] if isinstance(call.out, tuple | list) else layout
    dim = call["dim"] % len(layout)
    _go_along(tracer, call, layout[dim], call["g"], "norm", dim)
    lengths = tuple(axis if place == dim else FIXED for place, axis in enumerate(layout))
    return [layout, lengths] if isinstance(call.out, tuple | list) else layout


@rule("fake_quantize_per_channel_affine", "fake_quantize_per_tensor_affine", "fused_moving_avg_obs_fake_quant")
@rule("_fake_quantize_learnable_per_channel_affine", "_fake_quantize_learnable_per_tensor_affine")
def fake_quantize(tracer: Tracer, call: Call) -> Layout:
    """Rounding to a grid: one for all, or one for each position of an axis, whose entries go with it."""
    x = call["self"]
    layout = tracer.layout(x)
    axis = call["axis"] if call["axis"] is not None else call["ch_axis"]
    if axis is not None and call["per_row_fake_quant"] is not False:
        for name in ("scale", "zero_point", "running_min", "running_max"):
            _go_along(tracer, call, layout[axis], call[name], "norm")
    tracer.table.alive += [vector for labels in layout for vector in labels or ()]
    return layout


def _spatial(count: int) -> Any:
    def apply(tracer: Tracer, call: Call) -> Any:
        """Pooling, resampling or padding over the last axes; the others pass."""
        x = call.tensors[0]
        layout = tracer.layout(x)
        first = call.out[0] if isinstance(call.out, tuple | list) else call.out
        along = tuple(_slide(tracer, call, layout[p], x.shape[p], first.shape[p], p + count) for p in range(-count, 0))
        result = (*layout[:-count], *along)
        return [result] * len(call.out) if isinstance(call.out, tuple | list) else result

    return apply


def _slide(tracer: Tracer, call: Call, axis: Axis, before: int, after: int, place: int) -> Axis:
    """One axis that a window slides along; with stride one, every position stays where its window has its middle."""
    if not axis:
        return axis
    kernel = call["kernel_size"]
    width = int(kernel[place % len(kernel)]) if isinstance(kernel, list | tuple) else int(kernel or 0)
    if call["stride"] in (1, None) or set(call["stride"]) <= {1}:
        if width == 1 and after == before:
            return axis
        if after == before - width + 1 and not any(call["padding"] or ()):
            kept = tuple(vector[width // 2 : width // 2 + after] for vector in axis)
            tracer.table.mark_inexact(axis, f"{call.site} slides over them", ordered=True)
            return kept
    tracer.table.freeze(axis, f"{call.site} pools or resamples along them")
    return FIXED


for _count, _suffix in ((1, "1d"), (2, "2d"), (3, "3d")):
    for _name in (
        "max_pool",
        "avg_pool",
        "adaptive_avg_pool",
        "adaptive_max_pool",
        "reflection_pad",
        "replication_pad",
    ):
        RULES[_name + _suffix] = _spatial(_count)
    for _name in ("max_pool{}_with_indices", "_adaptive_avg_pool{}", "fractional_max_pool{}", "max_unpool{}"):
        RULES[_name.format(_suffix)] = _spatial(_count)


for _name in ("nearest", "_nearest_exact", "linear", "bilinear", "bicubic", "trilinear"):
    _count = {"linear": 1, "bilinear": 2, "bicubic": 2, "trilinear": 3}.get(_name.removeprefix("_"), 0)
    for _suffix in ("1d", "2d", "3d") if _count == 0 else (f"{_count}d",):
        RULES[f"upsample_{_name}{_suffix}".replace("upsample__", "_upsample_")] = _spatial(int(_suffix[0]))


for _name in ("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "grid_sampler", "grid_sampler_2d"):
    RULES[_name] = _spatial(2)
