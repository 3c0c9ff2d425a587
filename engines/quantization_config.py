"""Reads ``quantization_config`` of a ``config.json``: what is not supported is refused here, with what to do."""

from __future__ import annotations

import re

from engines.compressed_config import INSTEAD, LARGEST_GROUP, read_block, read_config_groups
from engines.fields import Fields
from engines.protocol import EngineLoadError
from engines.quantization import HEAD_LAYER, Awq, Float8, Gptq, LayerRule, Quantization


def read_quantization(config: Fields) -> Quantization | None:
    """None for a model that is not quantized. Raises EngineLoadError for a format that is not supported."""
    key = "quantization_config" if config.has("quantization_config") else "compression_config"
    if not config.has(key):
        return None
    fields = config.section(key)
    method = fields.text("quant_method", "compressed-tensors" if fields.has("config_groups") else "unknown")
    if fields.section("sparsity_config").text("format", "dense") != "dense":
        raise EngineLoadError(f"{fields.name}: sparse weights (sparsity_config) are not supported; {INSTEAD}")
    if method in ("compressed-tensors", "slimserve"):
        return read_config_groups(fields, method)
    readers = {"gptq": _read_gptq, "awq": _read_awq, "fp8": _read_fp8}
    if method not in readers:
        raise EngineLoadError(
            f"{fields.name}: the weights are quantized by {method[:40]!r}, which is not supported; "
            f"compressed-tensors, {', '.join(readers)} and slimserve are; {INSTEAD}"
        )
    return readers[method](fields)


def _read_gptq(fields: Fields) -> Quantization:
    bits = fields.count("bits")
    if bits not in (2, 3, 4, 8):
        raise fields.fail("bits", "2, 3, 4 or 8")
    layout = fields.text("checkpoint_format", "gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise EngineLoadError(
            f"{fields.name}: the layout {layout[:40]!r} is not supported, gptq and gptq_v2 are; {INSTEAD}"
        )
    if fields.section("dynamic").values:
        raise EngineLoadError(f"{fields.name}: formats of single layers (dynamic) are not supported; {INSTEAD}")
    if fields.text("pack_dtype", "int32") != "int32":
        raise fields.fail("pack_dtype", "int32")
    gptq = Gptq(bits=bits, group_size=_group_size(fields), zero_less_one=layout == "gptq")
    suffixes = _suffixes(fields)
    ignored = () if fields.flag("lm_head") else (HEAD_LAYER,)
    targets = tuple(f"re:.*\\.{re.escape(suffix)}$" for suffix in suffixes) or ("Linear",)
    return Quantization(method="gptq", rules=(LayerRule(targets=targets, format=gptq),), ignored=ignored)


def _suffixes(fields: Fields) -> list[str]:
    """The layers of a block that are quantized; none where all are."""
    key = "modules_in_block_to_quantize"
    names: list[str] = []
    for entry in fields.values.get(key) or []:
        names += entry if isinstance(entry, list) else [entry]
    if not all(isinstance(name, str) for name in names):
        raise fields.fail(key, "lists of names")
    return names


def _read_awq(fields: Fields) -> Quantization:
    if fields.count("bits", 4) != 4:
        raise fields.fail("bits", "4")
    version = fields.text("version", "gemm").lower()
    if version != "gemm":
        raise EngineLoadError(f"{fields.name}: the AWQ layout {version[:40]!r} is not supported, gemm is; {INSTEAD}")
    if not fields.flag("zero_point", default=True):
        raise fields.fail("zero_point", "true")
    rule = LayerRule(targets=("Linear",), format=Awq(group_size=_group_size(fields)))
    ignored = (HEAD_LAYER, *_containing(fields, "modules_to_not_convert"))
    return Quantization(method="awq", rules=(rule,), ignored=ignored)


def _read_fp8(fields: Fields) -> Quantization:
    kind = fields.text("fmt", "e4m3")
    if kind not in ("e4m3", "float8_e4m3fn"):
        raise fields.fail("fmt", "e4m3")
    scheme = fields.text("activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):
        raise fields.fail("activation_scheme", "dynamic or static")
    block = read_block(fields, "weight_block_size") if fields.has("weight_block_size") else None
    float8 = Float8(block=block, static_input=scheme == "static")
    ignored = [HEAD_LAYER]
    for key in ("modules_to_not_convert", "ignored_layers"):
        ignored += _containing(fields, key)
    rule = LayerRule(targets=("Linear",), format=float8)
    return Quantization(method="fp8", rules=(rule,), ignored=tuple(ignored))


def _containing(fields: Fields, key: str) -> list[str]:
    """Targets of all layers whose names contain one of the listed texts."""
    return [f"re:.*{re.escape(text)}" for text in fields.texts(key)]


def _group_size(fields: Fields) -> int | None:
    """Columns of a group; -1, for a whole row, gives None."""
    if fields.values.get("group_size") == -1:
        return None
    return fields.count("group_size", most=LARGEST_GROUP)
