"""Scales of an fp8 KV cache: what a checkpoint says of them, and which numbers are taken.

A cached number is the key or value over its scale, in e4m3. Every scale is a power of two: to divide and multiply by
one is then exact in each floating type, and e4m3, a floating type too, loses nothing by it but half a bit of range.
"""

from __future__ import annotations

import torch

from engines.models.batch import KvLayout
from engines.models.weights import FileSource
from engines.protocol import EngineLoadError

NAMES = ("self_attn.{part}_scale", "self_attn.{part}_proj.{part}_scale", "self_attn.attn.{part}_scale")
"""What the tools that calibrate checkpoints call them, in a layer."""
PARTS = ("k", "v")
SMALLEST, LARGEST = 2.0**-14, 2.0**15
"""Numbers that float16 holds without loss too."""


def round_up(scales: torch.Tensor) -> torch.Tensor:
    """The next power of two, from ``SMALLEST`` to ``LARGEST``: (...) float32."""
    return torch.exp2(scales.float().clamp(SMALLEST, LARGEST).log2().ceil())


def stored_scales(source: FileSource, layout: KvLayout, kv_heads: int | None) -> tuple[torch.Tensor, ...]:
    """This rank's scales of each layer, or none if the checkpoint has none.

    One number stands for all heads, else there is one for each of the model's ``kv_heads``, in any shape. A latent
    (``kv_heads`` None) has one of the keys only. Raises EngineLoadError where only some are stored, or a number is
    none that can be a scale.
    """
    parts = PARTS[: len(layout.token_shapes)]
    found = [[_find(source, layer, part) for part in parts] for layer in range(layout.layers)]
    names = [name for layer in found for name in layer if name is not None]
    if not names:
        return ()
    if len(names) < layout.layers * len(parts):
        raise EngineLoadError(f"the model's files hold scales of the KV cache ({names[0]}), but not for each layer")
    if kv_heads is None:
        _skip_values(source, layout.layers)
    layers = []
    for layer in found:
        rows = [_take(source, name, layout.scale_shape[-1], kv_heads) for name in layer if name is not None]
        layers.append(torch.stack(rows).view(layout.scale_shape))
    return tuple(layers)


def _find(source: FileSource, layer: int, part: str) -> str | None:
    names = (f"model.layers.{layer}.{name.format(part=part)}" for name in NAMES)
    return next((name for name in names if name in source.reader.shapes), None)


def _skip_values(source: FileSource, layers: int) -> None:
    """A latent's values are its keys; some tools store a scale of them all the same."""
    for layer in range(layers):
        name = _find(source, layer, "v")
        if name is not None:
            source.skip(name)


def _take(source: FileSource, name: str, width: int, kv_heads: int | None) -> torch.Tensor:
    """(width,) scales, rounded up."""
    shape = source.reader.shapes[name]
    count = torch.Size(shape).numel()
    if count not in (1, kv_heads):
        raise EngineLoadError(f"tensor {name} of shape {shape} is neither one scale nor one for each key/value head")
    per_head = count == kv_heads and len(shape) > 0
    scales = source.take(name, shape, "out" if per_head else "none", torch.float32).flatten()
    if not bool((scales.isfinite() & (scales > 0)).all()):
        raise EngineLoadError(f"tensor {name} holds numbers that are no scales: they must be finite and above 0")
    return round_up(scales).expand(width)
