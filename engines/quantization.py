"""Which weight format each layer of a model has: frozen configs, read without torch.

A format is one struct here and one ``QuantMethod`` in ``engines.quant``. Layers are named as in the checkpoint, without
``.weight``; how names are matched follows the compressed-tensors library, whatever the format.
"""

from __future__ import annotations

import re
from typing import Literal, TypeAlias

import msgspec

from engines.patterns import compile_pattern

EMBEDDING_LAYER, HEAD_LAYER = "model.embed_tokens", "lm_head"

InputRounding = Literal["float", "int8", "float8"]
"""As ``engines.kernels.Activations``."""
Strategy = Literal["tensor", "channel", "group"]
"""One scale for the whole weight, for each output row, or for each group of columns in a row."""


class CompressedIntegers(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """compressed-tensors: ``pack-quantized``, ``int-quantized``, and ``naive-quantized`` of integers."""

    packed: bool
    """A row's codes as one stream of bits in int32 words; else one int8 each."""
    bits: int
    strategy: Strategy
    group_size: int = 0
    """Columns that share a scale, where the strategy is ``group``."""
    symmetric: bool = True
    ordered: bool = False
    """A tensor says each column's group (activation order)."""
    activations: InputRounding = "float"
    static_input: bool = False
    """The input's scale is stored; else it comes from each token."""


class CompressedFloat8(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """compressed-tensors: ``float-quantized``, and ``naive-quantized`` of floats."""

    strategy: Literal["tensor", "channel", "block"]
    block: tuple[int, int] = (0, 0)
    """Rows and columns that share a scale, where the strategy is ``block``."""
    activations: InputRounding = "float"
    static_input: bool = False


class Codebook(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Our own: each group of columns in a row has its own ``2 ** bits`` levels."""

    bits: int
    group_size: int | None = None
    """None: a whole row is one group."""
    shared: bool = False
    """The whole layer has one set of levels, and each group a scale."""


class Gptq(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """AutoGPTQ's layout, versions 1 and 2; a ``g_idx`` tensor gives the columns' groups."""

    bits: int
    group_size: int | None
    """None: a whole row is one group."""
    zero_less_one: bool
    """Version 1 stores each zero point less one."""


class Awq(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """AutoAWQ's GEMM layout: 4 bits, with zero points."""

    group_size: int | None


class Float8(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """``quant_method`` fp8: DeepSeek's blocks (``weight_scale_inv``), or one scale (``weight_scale``)."""

    block: tuple[int, int] | None
    static_input: bool = False


class GgufBlocks(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The blocks of a ``.gguf`` file, kept as they are."""

    blocks: str
    """Their type, as ``engines.gguf_header`` names it."""


LayerFormat: TypeAlias = CompressedIntegers | CompressedFloat8 | Codebook | Gptq | Awq | Float8 | GgufBlocks


class LayerRule(msgspec.Struct, frozen=True, kw_only=True):
    """Layers that have one format."""

    targets: tuple[str, ...]
    """Each a layer's name, ``re:`` and a pattern that matches names from their beginning, or ``Linear``/``Embedding``
    for all layers of that kind."""
    format: LayerFormat


class Quantization(msgspec.Struct, frozen=True, kw_only=True):
    """The formats of a whole model."""

    method: str
    """As ``quant_method`` in ``config.json``, or ``gguf``."""
    rules: tuple[LayerRule, ...]
    ignored: tuple[str, ...] = ()
    """Targets of layers that are not quantized, whatever the rules say."""


class LayerFormats:
    """Finds a layer's format: a rule with its name, else one whose pattern matches, else one for its kind.

    Among patterns the first in alphabetical order counts, and of rules with the same target the last.
    """

    def __init__(self, quantization: Quantization) -> None:
        """Raises EngineLoadError for a pattern that is no regular expression, or could take very long."""
        self._by_target = {target: rule.format for rule in quantization.rules for target in rule.targets}
        self._patterns = _compile(self._by_target)
        self._ignored = frozenset(quantization.ignored)
        self._ignored_patterns = _compile(quantization.ignored)

    def __call__(self, layer: str) -> LayerFormat | None:
        """None: not quantized."""
        kind = "Embedding" if layer == EMBEDDING_LAYER else "Linear"
        if {layer, kind} & self._ignored or any(pattern.match(layer) for _, pattern in self._ignored_patterns):
            return None
        if layer in self._by_target:
            return self._by_target[layer]
        for target, pattern in self._patterns:
            if pattern.match(layer):
                return self._by_target[target]
        return self._by_target.get(kind)


def _compile(targets: dict[str, LayerFormat] | tuple[str, ...]) -> list[tuple[str, re.Pattern[str]]]:
    chosen = sorted(target for target in targets if target.startswith("re:"))
    return [(target, compile_pattern(target.removeprefix("re:"), "quantization_config")) for target in chosen]
