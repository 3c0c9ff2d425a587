"""ONNX operators in torch. Shapes and other small whole numbers travel as Python lists, so that axes stay free."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

from engines.protocol import EngineLoadError

Value = Any
"""A tensor, or a list of whole numbers, or one: of a graph's value, what it is depends on the graph."""
Attributes = Mapping[str, Any]
Operator = Callable[..., Value]

CASTS = {1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool, 10: torch.float16, 11: torch.float64}
FLOATS = (1, 10, 11, 16)


def _pair(pads: list[int]) -> list[int]:
    """Starts of all axes, then ends, to what functional.pad takes: the last axis first."""
    half = len(pads) // 2
    return [value for axis in reversed(range(half)) for value in (pads[axis], pads[half + axis])]


def _padded(given: Attributes, images: Value, fill: float) -> tuple[Value, list[int]]:
    """Symmetric padding is left to the operator, other is done here."""
    spatial = images.dim() - 2
    if given.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise EngineLoadError("automatic padding is not supported; export the model with explicit pads")
    pads = list(given.get("pads", [0] * 2 * spatial))
    if pads[:spatial] == pads[spatial:]:
        return images, pads[:spatial]
    return functional.pad(images, _pair(pads), value=fill), [0] * spatial


def conv(given: Attributes, images: Value, weight: Value, bias: Value = None) -> Value:
    images, pads = _padded(given, images, 0)
    spatial = images.dim() - 2
    run = (functional.conv1d, functional.conv2d, functional.conv3d)[spatial - 1]
    strides, dilations = given.get("strides", [1] * spatial), given.get("dilations", [1] * spatial)
    return run(images, weight, bias, strides, pads, dilations, given.get("group", 1))


def max_pool(given: Attributes, images: Value) -> Value:
    images, pads = _padded(given, images, -math.inf)
    kernel = given["kernel_shape"]
    run = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[len(kernel) - 1]
    strides = given.get("strides", [1] * len(kernel))
    return run(images, kernel, strides, pads, given.get("dilations", 1), bool(given.get("ceil_mode", 0)))


def average_pool(given: Attributes, images: Value) -> Value:
    counted = bool(given.get("count_include_pad", 0))
    images, pads = _padded(given, images, 0)
    kernel = given["kernel_shape"]
    if not counted and len(set(given.get("pads", [0]))) > 1:
        raise EngineLoadError("average pooling with uneven padding is not supported")
    run = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[len(kernel) - 1]
    strides = given.get("strides", [1] * len(kernel))
    return run(images, kernel, strides, pads, bool(given.get("ceil_mode", 0)), counted)


def gemm(given: Attributes, left: Value, right: Value, bias: Value = None) -> Value:
    left = left.transpose(0, 1) if given.get("transA", 0) else left
    right = right.transpose(0, 1) if given.get("transB", 0) else right
    product = given.get("alpha", 1.0) * (left @ right) if given.get("alpha", 1.0) != 1 else left @ right
    return product if bias is None else product + given.get("beta", 1.0) * bias


def softmax(given: Attributes, values: Value) -> Value:
    axis = given.get("axis", -1 if given["opset"] >= 13 else 1)
    if given["opset"] < 13 and axis not in (-1, values.dim() - 1):
        raise EngineLoadError("softmax of opsets before 13 is supported on the last axis only")
    return torch.softmax(values, axis)


def layer_norm(given: Attributes, values: Value, weight: Value, bias: Value = None) -> Value:
    axis = given.get("axis", -1) % values.dim()
    return functional.layer_norm(values, tuple(values.shape[axis:]), weight, bias, given.get("epsilon", 1e-5))


def reduction(run: Callable[..., Value]) -> Operator:
    def reduce(given: Attributes, values: Value, axes: Value = None) -> Value:
        axes = given.get("axes") if axes is None else axes
        if axes is None or not len(axes):
            axes = [] if given.get("noop_with_empty_axes", 0) else list(range(values.dim()))
        return run(values, list(axes), keepdim=bool(given.get("keepdims", 1))) if axes else values

    return reduce


def reshape(given: Attributes, values: Value, shape: Value) -> Value:
    if isinstance(values, list):
        return values
    if given.get("allowzero", 0) and 0 in shape:
        raise EngineLoadError("a reshape to an axis of no entries is not supported")
    return values.reshape([values.shape[at] if _is_zero(axis) else axis for at, axis in enumerate(shape)])


def _is_zero(axis: Value) -> bool:
    return isinstance(axis, int) and axis == 0


def squeeze(given: Attributes, values: Value, axes: Value = None) -> Value:
    axes = given.get("axes") if axes is None else axes
    if isinstance(values, list):
        return values[0]
    return values.squeeze() if axes is None else values.squeeze(tuple(axes))


def unsqueeze(given: Attributes, values: Value, axes: Value = None) -> Value:
    axes = given.get("axes") if axes is None else axes
    if not isinstance(values, torch.Tensor):
        return list(values) if isinstance(values, list) else [values]
    dims = values.dim() + len(axes)
    for axis in sorted(axis % dims for axis in axes):
        values = values.unsqueeze(axis)
    return values


def concat(given: Attributes, *parts: Value) -> Value:
    if all(isinstance(part, list) for part in parts):
        return [value for part in parts for value in part]
    return torch.cat(parts, given["axis"])


def slices(given: Attributes, values: Value, *rest: Value) -> Value:
    starts, ends = rest[:2] if rest else (given["starts"], given["ends"])
    axes = rest[2] if len(rest) > 2 and rest[2] is not None else given.get("axes", list(range(len(starts))))
    steps = rest[3] if len(rest) > 3 else [1] * len(starts)
    if isinstance(values, list):
        return values[starts[0] : ends[0] : steps[0]]
    if any(step < 1 for step in steps):
        raise EngineLoadError("slices that run backwards are not supported")
    cut = [slice(None)] * values.dim()
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        cut[axis] = slice(start, None if isinstance(end, int) and end >= 1 << 31 else end, step)
    return values[tuple(cut)]


def gather(given: Attributes, values: Value, indices: Value) -> Value:
    if isinstance(values, list):
        return [values[at] for at in indices] if isinstance(indices, list) else values[indices]
    axis = given.get("axis", 0)
    if isinstance(indices, int):
        return values.select(axis, indices)
    if isinstance(indices, list):
        indices = torch.tensor(indices, device=values.device)
    if axis == 0:
        return functional.embedding(indices, values) if values.dim() == 2 else values[indices]
    return values[(slice(None),) * (axis % values.dim()) + (indices,)]


def split(given: Attributes, values: Value, sizes: Value = None) -> Value:
    axis = given.get("axis", 0)
    sizes = given.get("split") if sizes is None else sizes
    if sizes is None:
        sizes = [values.shape[axis] // given["outputs"]] * given["outputs"]
    return torch.split(values, list(sizes), axis)


def pad(given: Attributes, values: Value, pads: Value = None, fill: Value = None) -> Value:
    if given.get("mode", b"constant") != b"constant":
        raise EngineLoadError("only padding with a constant is supported")
    number = given.get("value", 0.0) if fill is None else float(fill)
    return functional.pad(values, _pair(list(given["pads"] if pads is None else pads)), value=number)


def expand(given: Attributes, values: Value, shape: Value) -> Value:
    wide = [1] * (len(shape) - values.dim()) + list(values.shape)
    return values.expand(
        [have if isinstance(want, int) and want == 1 else want for have, want in zip(wide, shape, strict=True)]
    )


def cast(given: Attributes, values: Value) -> Value:
    if not isinstance(values, torch.Tensor):
        return values
    if given["to"] in FLOATS:
        return values.to(given["dtype"])
    if given["to"] not in CASTS:
        raise EngineLoadError(f"a cast to the ONNX type {given['to']} is not supported")
    return values.to(CASTS[given["to"]])


def clip(given: Attributes, values: Value, low: Value = None, high: Value = None) -> Value:
    low, high = given.get("min") if low is None else low, given.get("max") if high is None else high
    return torch.clamp(values, *(None if bound is None else float(bound) for bound in (low, high)))


def arithmetic(run: Callable[..., Value], whole: Callable[..., Value] | None = None) -> Operator:
    """``whole``: of whole numbers, where it is another function."""

    def numbers(left: Value, right: Value) -> Value:
        return run(left, right) if isinstance(left, float) or isinstance(right, float) else (whole or run)(left, right)

    def combine(given: Attributes, left: Value, right: Value) -> Value:
        lists = [isinstance(each, list) for each in (left, right)]
        if any(isinstance(each, torch.Tensor) for each in (left, right)):
            kept = next(each for each in (left, right) if isinstance(each, torch.Tensor))
            ready = (torch.tensor(e, device=kept.device) if isinstance(e, list) else e for e in (left, right))
            integral = not kept.is_floating_point() and whole is not None
            return (whole or run)(*ready) if integral else run(*ready)
        if not any(lists):
            return numbers(left, right)
        count = len(left if lists[0] else right)
        pairs = zip(left if lists[0] else [left] * count, right if lists[1] else [right] * count, strict=True)
        return [numbers(one, other) for one, other in pairs]

    return combine


def unary(run: Callable[[Value], Value]) -> Operator:
    return lambda given, values: run(values)


def _global(run: Callable[..., Value]) -> Operator:
    return lambda given, images: run(images, list(range(2, images.dim())), keepdim=True)


OPERATORS: dict[str, Operator] = {
    "Conv": conv,
    "MaxPool": max_pool,
    "AveragePool": average_pool,
    "GlobalAveragePool": _global(torch.mean),
    "GlobalMaxPool": _global(torch.amax),
    "BatchNormalization": lambda given, values, weight, bias, mean, variance: functional.batch_norm(
        values, mean, variance, weight, bias, False, 0.0, given.get("epsilon", 1e-5)
    ),
    "LayerNormalization": layer_norm,
    "Gemm": gemm,
    "MatMul": lambda given, left, right: left @ right,
    "Softmax": softmax,
    "ReduceMean": reduction(torch.mean),
    "ReduceSum": reduction(torch.sum),
    "ReduceMax": reduction(torch.amax),
    "ReduceL2": reduction(lambda values, axes, keepdim: torch.linalg.vector_norm(values, 2, axes, keepdim)),
    "Reshape": reshape,
    "Flatten": lambda given, values: values.flatten(given.get("axis", 1)).flatten(0, given.get("axis", 1) - 1),
    "Transpose": lambda given, values: values.permute(given.get("perm", list(reversed(range(values.dim()))))),
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Concat": concat,
    "Slice": slices,
    "Gather": gather,
    "Split": split,
    "Pad": pad,
    "Expand": expand,
    "Cast": cast,
    "Shape": lambda given, values: list(values.shape)[given.get("start", 0) : given.get("end")],
    "Clip": clip,
    "Add": arithmetic(operator.add),
    "Sub": arithmetic(operator.sub),
    "Mul": arithmetic(operator.mul),
    "Div": arithmetic(operator.truediv, operator.floordiv),
    "Pow": arithmetic(operator.pow),
    "Relu": unary(torch.relu),
    "LeakyRelu": lambda given, values: functional.leaky_relu(values, given.get("alpha", 0.01)),
    "Sigmoid": unary(torch.sigmoid),
    "HardSigmoid": lambda given, values: torch.clamp(given.get("alpha", 0.2) * values + given.get("beta", 0.5), 0, 1),
    "HardSwish": unary(functional.hardswish),
    "Gelu": lambda given, values: functional.gelu(values, approximate=given.get("approximate", b"none").decode()),
    "Tanh": unary(torch.tanh),
    "Erf": unary(torch.erf),
    "Exp": unary(torch.exp),
    "Sqrt": unary(torch.sqrt),
    "Neg": unary(operator.neg),
    "Identity": unary(lambda values: values),
    "Dropout": unary(lambda values: values),
}
"""What a file may contain; anything else is refused by name before the model is compiled."""
