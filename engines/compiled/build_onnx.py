"""Packages of ONNX files: which axes stay free is found from the file and by the export."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import helper
from torch.export import Dim, ExportedProgram, export

from engines.compiled.build import DTYPES, Report, package_key, refuse_programs, require_compiler, store
from engines.compiled.cache import CompiledModel, Dtype, Target, TensorSpec, find
from engines.compiled.exported import quiet_compiler
from engines.compiled.onnx_module import OnnxModule, read_onnx
from engines.protocol import EngineLoadError

Shapes = dict[str, tuple[int, ...]]
Axes = dict[str, tuple[int, int]]

CHECKED = (0.0, 0.1, 0.37)
"""Shares of the way from the shortest to the longest axes at which a package is compared with its graph."""
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""Of the largest output."""


def compile_onnx(
    source: Path, longest: Shapes, target: Target, dtype: Dtype, report: Report
) -> tuple[CompiledModel, Path]:
    """Compile an ONNX file, or find the package that was made of it before. Returns its record and path.

    ``longest``: the shape of each input that has free axes, with each of these as long as it may be. Raises
    EngineLoadError for a file that cannot be read or compiled, and for a missing or wrong shape.
    """
    if source.suffix != ".onnx":
        refuse_programs(source)
    report("reading the model")
    module, digest = read_onnx(source, DTYPES[dtype])
    shapes = {each.name: _longest(each, longest.get(each.name)) for each in module.inputs}
    if unknown := sorted(longest.keys() - shapes.keys()):
        raise EngineLoadError(f"the graph has no input {unknown[0][:80]!r}; its inputs are {', '.join(shapes)}")
    fingerprint = hashlib.sha256(json.dumps([digest, shapes], sort_keys=True).encode()).hexdigest()
    key = package_key(fingerprint, target, dtype)
    if (known := find(key)) is not None:
        report("compiled before")
        return known
    require_compiler()
    report("exporting")
    program = _export(module.to(target), shapes, torch.device(target))
    inputs, outputs, axes = _specs(module, program)
    report("compiling")
    check = partial(_require_agreement, module, inputs, axes, torch.device(target))
    return store(key, source.name, program, inputs, outputs, axes, check)


def _require_agreement(
    module: OnnxModule, inputs: tuple[TensorSpec, ...], axes: Axes, device: torch.device, package: Path
) -> None:
    """Compilers err: outputs of a few shapes must be those of the module without one. Raises EngineLoadError."""
    loader: Any = torch._inductor.aoti_load_package(str(package)).loader
    generator = torch.Generator().manual_seed(0)
    for share in CHECKED:
        lengths = {axis: round(low + share * (high - low)) for axis, (low, high) in axes.items()}
        given = [_random(spec, lengths, generator).to(device) for spec in inputs]
        with torch.inference_mode():
            wanted, found = module(*given), loader.run(given)
        for one, other in zip(wanted, found, strict=True):
            scale = one.abs().max().clamp(min=1e-6)
            if not (one - other).abs().max() <= TOLERANCE[module.dtype] * scale:
                raise EngineLoadError(
                    f"the compiled code disagrees with the graph at {lengths}, and is not kept; ONNX Runtime can run it"
                )


def _random(spec: TensorSpec, lengths: dict[str, int], generator: torch.Generator) -> torch.Tensor:
    shape = [lengths[axis] if isinstance(axis, str) else axis for axis in spec.shape]
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    # 0 and 1 are ids of every table, and masks.
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def _export(module: OnnxModule, longest: Shapes, device: torch.device) -> ExportedProgram:
    free = {each.name: _free_axes(each) for each in module.inputs}
    example, ranges = [], []
    batches: dict[str, Any] = {}
    for declared in module.inputs:
        shape = list(longest[declared.name])
        if 0 in free[declared.name]:
            shape[0] = min(2, shape[0])
        kind = helper.tensor_dtype_to_np_dtype(declared.type.tensor_type.elem_type)
        example.append(torch.zeros(shape, dtype=getattr(torch, str(kind)), device=device))
        # An axis that only one length fits is found to be fixed.
        ranges.append({at: _range(declared, at, longest[declared.name][at], batches) for at in free[declared.name]})
    try:
        with torch.no_grad(), quiet_compiler():
            return export(module, tuple(example), dynamic_shapes=(tuple(ranges),))
    except EngineLoadError:
        raise
    except Exception as error:  # whatever an operator or the exporter raises
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:300]
        raise EngineLoadError(f"the graph cannot be exported for compiling: {reason}") from error


def _range(declared: onnx.ValueInfoProto, at: int, longest: int, batches: dict[str, Any]) -> Any:
    """The first axis is any number from 1; of others the export may find out that only some lengths fit."""
    if at:
        return Dim.AUTO(min=1, max=longest)
    name = declared.type.tensor_type.shape.dim[0].dim_param
    name = name if name.isidentifier() else "batch"
    return batches.setdefault(name, Dim(name, min=1, max=longest))


def _specs(module: OnnxModule, program: ExportedProgram) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...], Axes]:
    signature = program.graph_signature
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    names: dict[str, str] = {}
    for declared, name in zip(module.inputs, signature.user_inputs, strict=True):
        for at, symbol in enumerate(values[str(name)].shape):
            written = declared.type.tensor_type.shape.dim[at].dim_param
            names.setdefault(str(symbol), written if written.isidentifier() else f"{declared.name}_{at}")
    inputs = tuple(
        _spec(declared.name, values[str(name)], names, module.table_rows(declared.name))
        for declared, name in zip(module.inputs, signature.user_inputs, strict=True)
    )
    outputs = tuple(
        _spec(name, values[str(value)], names)
        for name, value in zip(module.outputs, signature.user_outputs, strict=True)
    )
    used = {axis for spec in inputs for axis in spec.shape if isinstance(axis, str)}
    bounds = {str(symbol): limits for symbol, limits in program.range_constraints.items()}
    axes = {
        names[symbol]: (max(1, int(limits.lower)), int(limits.upper))
        for symbol, limits in bounds.items()
        if names.get(symbol) in used
    }
    if missing := sorted(used - axes.keys()):
        raise EngineLoadError(f"the axis {missing[0]} may only have some lengths; such axes are not supported")
    return inputs, outputs, axes


def _spec(name: str, value: Any, names: dict[str, str], rows: int | None = None) -> TensorSpec:
    shape = tuple(axis if isinstance(axis, int) else names.get(str(axis), str(axis)) for axis in value.shape)
    return TensorSpec(name=name, dtype=str(value.dtype).removeprefix("torch."), shape=shape, values=rows)


def _free_axes(declared: onnx.ValueInfoProto) -> list[int]:
    return [at for at, axis in enumerate(declared.type.tensor_type.shape.dim) if not axis.HasField("dim_value")]


def _longest(declared: onnx.ValueInfoProto, given: tuple[int, ...] | None) -> tuple[int, ...]:
    axes = [axis.dim_value if axis.HasField("dim_value") else None for axis in declared.type.tensor_type.shape.dim]
    written = ",".join("?" if axis is None else str(axis) for axis in axes)
    if given is None and None in axes:
        raise EngineLoadError(
            f"input {declared.name} has free axes; say how long they may be: --shape {declared.name}={written}"
        )
    shape = given if given is not None else tuple(axis or 0 for axis in axes)
    fits = len(shape) == len(axes) and all(axis in (None, long) for axis, long in zip(axes, shape, strict=True))
    if not fits:
        raise EngineLoadError(f"input {declared.name} is declared as {written}, which the given shape does not fit")
    return shape
