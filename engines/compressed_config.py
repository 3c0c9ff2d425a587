"""``config_groups`` of the compressed-tensors format, and of ours, which adds codebooks."""

from __future__ import annotations

from typing import Literal, get_args

from engines.fields import Fields
from engines.protocol import EngineLoadError
from engines.quantization import (
    Codebook,
    CompressedFloat8,
    CompressedIntegers,
    InputRounding,
    LayerFormat,
    LayerRule,
    Quantization,
    Strategy,
)

PACKED, INTEGERS, FLOATS, NAIVE, MIXED = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
)
CODEBOOK = "codebook"
INSTEAD = "use the model's float16 or bfloat16 version, or quantize that with slimserve compress"
LARGEST_GROUP = 1 << 20
MOST_TARGETS = 1 << 20
LONGEST_TARGET = 1000


def read_config_groups(fields: Fields, method: str) -> Quantization:
    """``method``: the ``quant_method``. Raises EngineLoadError for what is not supported."""
    status = fields.text("quantization_status", "compressed")
    if status != "compressed":
        raise EngineLoadError(
            f"{fields.name}: quantization_status is {status[:40]!r}: the weights were never packed; save the model "
            "compressed"
        )
    if fields.section("transform_config").values:
        raise EngineLoadError(f"{fields.name}: rotated weights (transform_config) are not supported; {INSTEAD}")
    default = fields.text("format", PACKED)
    groups = fields.section("config_groups")
    rules = tuple(_read_group(groups.section(name), default, method) for name in groups.values)
    if not rules:
        raise fields.fail("config_groups", "an object with at least one group")
    return Quantization(method=method, rules=rules, ignored=_targets(fields, "ignore"))


def _read_group(group: Fields, default: str, method: str) -> LayerRule:
    targets = _targets(group, "targets")
    if not targets:
        raise group.fail("targets", "a list of layers")
    if group.has("output_activations"):
        raise EngineLoadError(f"{group.name}: rounded outputs (output_activations) are not supported; {INSTEAD}")
    if not group.has("weights"):
        raise EngineLoadError(f"{group.name}: groups without quantized weights are not supported; {INSTEAD}")
    name = group.text("format", default)
    return LayerRule(targets=targets, format=_read_format(group, name, method))


def _targets(fields: Fields, key: str) -> tuple[str, ...]:
    targets = tuple(fields.texts(key))
    if len(targets) > MOST_TARGETS or any(len(target) > LONGEST_TARGET for target in targets):
        raise EngineLoadError(f"{fields.name}: {key} is too long")
    return targets


def _read_format(group: Fields, name: str, method: str) -> LayerFormat:
    weights = group.section("weights")
    number = weights.text("type", "int")
    if name == CODEBOOK and method == "slimserve":
        return _read_codebook(group, weights)
    if name == PACKED and number == "int":
        return _read_integers(group, weights, packed=True)
    if name in (INTEGERS, NAIVE) and number == "int":
        return _read_integers(group, weights, packed=False)
    if name in (FLOATS, NAIVE) and number == "float":
        return _read_float8(group, weights)
    supported = ", ".join((PACKED, INTEGERS, FLOATS, NAIVE))
    raise EngineLoadError(
        f"{group.name}: the format {name[:40]!r} of {number[:20]} weights is not supported; {supported} are; {INSTEAD}"
    )


def _read_codebook(group: Fields, weights: Fields) -> Codebook:
    if group.has("input_activations"):
        raise EngineLoadError(f"{group.name}: codebooks go with unrounded inputs only")
    size = weights.values.get("group_size")
    group_size = None if size in (None, -1) else weights.count("group_size", most=LARGEST_GROUP)
    shared = weights.flag("shared", default=False)
    return Codebook(bits=weights.count("num_bits", most=8), group_size=group_size, shared=shared)


def _read_integers(group: Fields, weights: Fields, packed: bool) -> CompressedIntegers:
    strategy = _strategy(weights, group_size=weights.values.get("group_size"))
    if strategy not in get_args(Strategy):
        raise weights.fail("strategy", f"one of {', '.join(get_args(Strategy))}")
    activations, static_input = _read_input(group)
    return CompressedIntegers(
        packed=packed,
        bits=weights.count("num_bits", 8, most=8),
        strategy=next(known for known in get_args(Strategy) if known == strategy),
        group_size=weights.count("group_size", most=LARGEST_GROUP) if strategy == "group" else 0,
        symmetric=weights.flag("symmetric", default=True),
        ordered=weights.values.get("actorder") in ("group", "dynamic", True),
        activations=activations,
        static_input=static_input,
    )


def _strategy(fields: Fields, group_size: object) -> str:
    """As the library fills it in where the file leaves it out."""
    inferred = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    return fields.text("strategy", inferred)


def _read_float8(group: Fields, weights: Fields) -> CompressedFloat8:
    if weights.count("num_bits", 8) != 8:
        raise weights.fail("num_bits", "8")
    strategy = _strategy(weights, group_size=weights.values.get("group_size"))
    known: tuple[Literal["tensor", "channel", "block"], ...] = ("tensor", "channel", "block")
    match = next((each for each in known if each == strategy), None)
    if match is None or not weights.flag("symmetric", default=True):
        raise EngineLoadError(
            f"{weights.name}: float weights must be symmetric, with a scale for each tensor, channel or block; "
            f"{INSTEAD}"
        )
    activations, static_input = _read_input(group)
    block = read_block(weights, "block_structure") if match == "block" else (0, 0)
    return CompressedFloat8(strategy=match, block=block, activations=activations, static_input=static_input)


def read_block(fields: Fields, key: str) -> tuple[int, int]:
    """Rows and columns that share a scale, as ``[128, 128]`` or ``"128x128"``."""
    value = fields.values.get(key)
    if isinstance(value, str):
        value = [int(size) if size.isdecimal() else 0 for size in value[:20].split("x")]
    if not isinstance(value, list) or len(value) != 2:
        raise fields.fail(key, "two whole numbers above 0")
    rows, columns = value
    if type(rows) is not int or type(columns) is not int or not 0 < min(value) <= max(value) <= LARGEST_GROUP:
        raise fields.fail(key, "two whole numbers above 0")
    return rows, columns


def _read_input(group: Fields) -> tuple[InputRounding, bool]:
    """What the input is rounded to, and whether its scale is stored."""
    if not group.has("input_activations"):
        return "float", False
    fields = group.section("input_activations")
    dynamic = fields.values.get("dynamic", False)
    strategy = _strategy(fields, group_size=fields.values.get("group_size"))
    number = fields.text("type", "int")
    # Groups of float8 inputs have scales of their own; one scale a token loses nothing but the range below 2 ** -9.
    by_token = dynamic is True and (strategy == "token" or (strategy == "group" and number == "float"))
    static = dynamic is False and strategy == "tensor"
    if fields.count("num_bits", 8) != 8 or not fields.flag("symmetric", default=True) or not (by_token or static):
        raise EngineLoadError(
            f"{fields.name}: inputs must be rounded to 8 bits symmetrically, with a scale for each token (dynamic) or "
            f"one for all (static); {INSTEAD}"
        )
    return ("float8" if number == "float" else "int8"), static
