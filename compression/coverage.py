"""How much of a model is really quantized, counted from its files: the proof that nothing was missed in silence."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch

from compression.errors import CompressionError
from engines.engine_folder import ClassCoverage, Coverage, LayerClass
from engines.gguf_config import checkpoint_name
from engines.gguf_header import read_gguf_header
from engines.manifest import Manifest
from engines.models.config import parse_config
from engines.models.loader import build_model
from engines.models.weights import Placement, ShapeSource
from engines.protocol import EngineLoadError
from engines.safetensors_header import ITEM_BYTES, read_safetensors_header

_CLASSES: tuple[tuple[str, LayerClass], ...] = (
    (r"model\.embed_tokens\.", "embedding"),
    (r"lm_head\.", "head"),
    (r"model\.(layers\.\d+\.)?([a-z_]+\.)?[a-z_]*norm\.", "norm"),
    (r"model\.layers\.\d+\.self_attn\.", "attention"),
    (r"model\.layers\.\d+\.mlp\.experts\.", "routed"),
    (r"model\.layers\.\d+\.mlp\.shared_experts\.", "shared"),
    (r"model\.layers\.\d+\.mlp\.gate\.", "router"),
    (r"model\.layers\.\d+\.mlp\.", "mlp"),
)
_WIDE = ("F64", "F32", "F16", "BF16")
"""Types of a safetensors or GGUF tensor that is not quantized."""
_OTHERS = ("bias", "e_score_correction_bias", "k_scale", "v_scale")
"""Tensors of a layer that do not belong to its weight."""


@dataclass(frozen=True, slots=True)
class _Stored:
    type: str
    bytes: int


def layer_class(name: str) -> LayerClass:
    """Of a tensor of the checkpoint, such as ``model.layers.0.mlp.experts.3.up_proj.weight``."""
    for pattern, found in _CLASSES:
        if re.match(pattern, name):
            return found
    raise ValueError(f"tensor {name} belongs to no known part of a model")


def count_coverage(manifest: Manifest, promised: Mapping[LayerClass, float] | None = None) -> Coverage:
    """Of the model in ``manifest.files``. What must be there is taken from the architecture, what is there from the
    headers of the files, so that a tensor which the toolkit forgot shows as missing.

    Raises EngineLoadError where a part of the model is in no file.
    """
    stored = _stored(manifest)
    sums: dict[LayerClass, list[int]] = {name: [0, 0, 0, 0] for name in get_args(LayerClass)}
    for name, shape in _parameters(manifest).items():
        nbytes = sum(tensor.bytes for tensor in _find(name, stored))
        size, quantized = math.prod(shape), _is_quantized(name, stored)
        for place, value in enumerate((size, size * quantized, nbytes, nbytes * quantized)):
            sums[layer_class(name)][place] += value
    classes = {name: _coverage(counts) for name, counts in sums.items() if counts[0]}
    return Coverage(classes=classes, promised=dict(promised or {}))


def check_promises(coverage: Coverage) -> None:
    """Raises CompressionError that names the classes of which less is quantized than was promised."""
    broken = []
    for name, promised in coverage.promised.items():
        part = coverage.classes.get(name)
        share = 1.0 if part is None else part.quantized_parameters / part.parameters
        if share < promised:
            broken.append(f"{name}: {share:.1%} of the parameters, {promised:.1%} promised")
    if broken:
        raise CompressionError(
            f"less of the model is quantized than the recipe promises ({'; '.join(broken)}); "
            "correct the recipe's patterns, or promise less"
        )


def coverage_lines(coverage: Coverage) -> list[str]:
    """For people, a line a class."""
    lines = []
    for name, part in coverage.classes.items():
        share = part.quantized_parameters / part.parameters
        bits = 8 * part.bytes / part.parameters
        lines.append(f"{name:10} {part.parameters:>15,} parameters, {share:6.1%} quantized, {bits:5.2f} bits each")
    return lines


def _coverage(counts: list[int]) -> ClassCoverage:
    return ClassCoverage(
        parameters=counts[0], quantized_parameters=counts[1], bytes=counts[2], quantized_bytes=counts[3]
    )


def _parameters(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Names and shapes as they are without quantization."""
    names = ShapeSource(Placement(device=torch.device("cpu"), dtype=torch.float32))
    build_model(parse_config(manifest), names, positions=1)
    return names.shapes


def _stored(manifest: Manifest) -> dict[str, dict[str, _Stored]]:
    """All tensors of the files under the checkpoint's names: by layer, and by what follows its name."""
    layers: dict[str, dict[str, _Stored]] = {}
    for name, tensor in _tensors(manifest).items():
        layer, _, kind = name.rpartition(".")
        layers.setdefault(layer, {})[kind] = tensor
    return layers


def _tensors(manifest: Manifest) -> dict[str, _Stored]:
    if manifest.format == "gguf":
        tensors = read_gguf_header(manifest.files[0]).tensors
        return {checkpoint_name(name): _Stored(tensor.type, tensor.nbytes) for name, tensor in tensors.items()}
    found = {}
    for path in manifest.files:
        for name, part in read_safetensors_header(path).tensors.items():
            found[name] = _Stored(part.dtype, math.prod(part.shape) * ITEM_BYTES[part.dtype])
    return found


def _find(name: str, stored: Mapping[str, Mapping[str, _Stored]]) -> list[_Stored]:
    """The tensors that hold this one: it by its own name, with scales where it has some, or codes in its place."""
    layer, _, kind = name.rpartition(".")
    parts = stored.get(layer, {})
    if kind == "weight":
        found = [tensor for each, tensor in parts.items() if each not in _OTHERS]
    else:
        found = [parts[kind]] if kind in parts else []
    if not found:
        raise EngineLoadError(f"tensor {name} is in no file of the model; fetch or make it again")
    return found


def _is_quantized(name: str, stored: Mapping[str, Mapping[str, _Stored]]) -> bool:
    layer, _, kind = name.rpartition(".")
    plain = stored[layer].get(kind)
    return plain is None or plain.type not in _WIDE
