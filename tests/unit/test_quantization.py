"""``quantization_config``: which format each layer gets, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from engines.fields import Fields
from engines.protocol import EngineLoadError
from engines.quantization import (
    Awq,
    Codebook,
    CompressedFloat8,
    CompressedIntegers,
    Float8,
    Gptq,
    LayerFormat,
    LayerFormats,
    LayerRule,
    Quantization,
)
from engines.quantization_config import read_quantization

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
BY_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
LAYER = "model.layers.3.mlp.up_proj"


def read(values: dict[str, Any]) -> Quantization:
    quantization = read_quantization(Fields({"quantization_config": values}, "config.json"))
    assert quantization is not None
    return quantization


def groups(*each: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": group for index, group in enumerate(each)},
        "ignore": ["lm_head"],
        **values,
    }


def group(weights: dict[str, Any], targets: str = "Linear", **values: Any) -> dict[str, Any]:
    return {"targets": [targets], "weights": weights, "input_activations": None, "output_activations": None, **values}


READ: dict[str, tuple[dict[str, Any], LayerFormat]] = {
    "int4": (groups(group(INT4)), CompressedIntegers(packed=True, bits=4, strategy="group", group_size=32)),
    "zero points": (
        groups(group({**INT4, "symmetric": False, "strategy": None, "actorder": "group"})),
        CompressedIntegers(packed=True, bits=4, strategy="group", group_size=32, symmetric=False, ordered=True),
    ),
    "w8a8": (
        groups(group(INT8, input_activations=BY_TOKEN), format="int-quantized"),
        CompressedIntegers(packed=False, bits=8, strategy="channel", activations="int8"),
    ),
    "w8a8 static": (
        groups(
            group(INT8, input_activations={**BY_TOKEN, "strategy": "tensor", "dynamic": False}), format="int-quantized"
        ),
        CompressedIntegers(packed=False, bits=8, strategy="channel", activations="int8", static_input=True),
    ),
    "fp8": (
        groups(group(FP8, input_activations={**BY_TOKEN, "type": "float"}), format="float-quantized"),
        CompressedFloat8(strategy="tensor", activations="float8"),
    ),
    "fp8 blocks": (
        groups(
            group(
                {**FP8, "strategy": "block", "block_structure": [128, 128]},
                input_activations={**BY_TOKEN, "type": "float", "strategy": "group", "group_size": 128},
            ),
            format="float-quantized",
        ),
        CompressedFloat8(strategy="block", block=(128, 128), activations="float8"),
    ),
    "naive": (
        groups(group({**INT8, "group_size": -1, "strategy": None}), format="naive-quantized"),
        CompressedIntegers(packed=False, bits=8, strategy="channel"),
    ),
    "codebook": (
        groups(group({"num_bits": 4, "group_size": 64}, format="codebook"), quant_method="slimserve"),
        Codebook(bits=4, group_size=64),
    ),
    "codebook with shared levels": (
        groups(group({"num_bits": 4, "group_size": 64, "shared": True}, format="codebook"), quant_method="slimserve"),
        Codebook(bits=4, group_size=64, shared=True),
    ),
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True},
        Gptq(bits=4, group_size=128, zero_less_one=True),
    ),
    "gptq 2": (
        {"quant_method": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"},
        Gptq(bits=8, group_size=None, zero_less_one=False),
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "GEMM", "zero_point": True},
        Awq(group_size=64),
    ),
    "deepseek": (
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        Float8(block=(128, 128)),
    ),
}


@pytest.mark.parametrize("case", READ)
def test_layers_get_the_format_of_the_file(case: str) -> None:
    values, expected = READ[case]
    formats = LayerFormats(read(values))
    assert formats(LAYER) == expected
    assert formats("lm_head") is None
    assert formats("model.embed_tokens") is None


def test_mixed_precision() -> None:
    attention = group(INT8, "re:.*self_attn.*", format="int-quantized", input_activations=BY_TOKEN)
    values = groups(attention, group(INT4, format="pack-quantized"), format="mixed-precision")
    formats = LayerFormats(read(values))
    attended, gated = formats("model.layers.0.self_attn.q_proj"), formats(LAYER)
    assert isinstance(attended, CompressedIntegers)
    assert isinstance(gated, CompressedIntegers)
    assert (attended.bits, attended.activations, gated.bits) == (8, "int8", 4)


def test_names_count_before_patterns_and_patterns_before_kinds() -> None:
    """As the compressed-tensors library orders them: patterns alphabetically, and the last of equal targets."""
    rules = [
        LayerRule(targets=("Linear",), format=Awq(group_size=1)),
        LayerRule(targets=("re:.*up_proj",), format=Awq(group_size=2)),
        LayerRule(targets=("re:.*layers",), format=Awq(group_size=3)),
        LayerRule(targets=(LAYER,), format=Awq(group_size=4)),
        LayerRule(targets=("Embedding",), format=Awq(group_size=5)),
        LayerRule(targets=("Linear",), format=Awq(group_size=6)),
    ]
    formats = LayerFormats(
        Quantization(method="awq", rules=tuple(rules), ignored=("re:.*layers[.]9", "model.layers.8.x"))
    )
    assert formats(LAYER) == Awq(group_size=4)
    assert formats("model.layers.4.mlp.up_proj") == Awq(group_size=3)
    assert formats("up_proj") == Awq(group_size=2)
    assert formats("x") == Awq(group_size=6)
    assert formats("model.embed_tokens") == Awq(group_size=5)
    assert formats("model.layers.9.mlp.up_proj") is None
    assert formats("model.layers.8.x") is None


def test_names_of_awq_and_fp8_are_parts_of_names() -> None:
    values = {"quant_method": "awq", "bits": 4, "group_size": 64, "modules_to_not_convert": ["o_proj"]}
    formats = LayerFormats(read(values))
    assert formats("model.layers.0.self_attn.o_proj") is None
    assert formats(LAYER) == Awq(group_size=64)


def test_gptq_may_name_the_layers_of_a_block() -> None:
    values = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 64,
        "modules_in_block_to_quantize": [["mlp.up_proj"], ["mlp.down_proj"]],
    }
    formats = LayerFormats(read(values))
    assert formats(LAYER) == Gptq(bits=4, group_size=64, zero_less_one=True)
    assert formats("model.layers.0.self_attn.o_proj") is None


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": ({"quant_method": "torchao"}, "quantized by 'torchao'.* bfloat16 version"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
    "sparse": (groups(group(INT4), sparsity_config={"format": "sparse-24-bitmask"}), "sparse weights"),
    "marlin": (groups(group(INT4), format="marlin-24"), "'marlin-24' of int weights is not supported"),
    "nvfp4": (groups(group({**FP8, "num_bits": 4}), format="nvfp4-pack-quantized"), "nvfp4"),
    "not packed": (groups(group(INT4), quantization_status="frozen"), "'frozen'.* were never packed"),
    "rotated": (groups(group(INT4), transform_config={"config_groups": {}}), "rotated weights"),
    "no groups": (groups(), "config_groups must be"),
    "no targets": (groups({**group(INT4), "targets": []}), "targets must be"),
    "no weights": (groups({**group(INT4), "weights": None}), "without quantized weights"),
    "outputs": (groups(group(INT4, output_activations=BY_TOKEN)), "rounded outputs"),
    "wide": (groups(group({**INT4, "num_bits": 16})), "num_bits must be a whole number between 1 and 8"),
    "inputs of 4 bits": (groups(group(INT4, input_activations={**BY_TOKEN, "num_bits": 4})), "rounded to 8 bits"),
    "skewed inputs": (groups(group(INT4, input_activations={**BY_TOKEN, "symmetric": False})), "symmetrically"),
    "codebook elsewhere": (groups(group(INT4, format="codebook")), "'codebook' of int weights"),
    "blocks": (groups(group({**FP8, "strategy": "block"}), format="float-quantized"), "block_structure must be"),
    "gptq bits": ({"quant_method": "gptq", "bits": 5, "group_size": 64}, "bits must be 2, 3, 4 or 8"),
    "gptq layout": (
        {"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "marlin"},
        "layout 'marlin' is not supported",
    ),
    "gptq by layer": (
        {"quant_method": "gptq", "bits": 4, "group_size": 64, "dynamic": {"-:x": {}}},
        "formats of single layers",
    ),
    "group size": ({"quant_method": "gptq", "bits": 4}, "group_size must be"),
    "awq layout": ({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemv"}, "'gemv' is not supported"),
    "fp8 type": ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt must be e4m3"),
    "fp8 block": ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "weight_block_size must be two"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    values, message = REFUSED[case]
    with pytest.raises(EngineLoadError, match=message):
        read(values)


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(EngineLoadError, match="no regular expression"):
        LayerFormats(read(groups(group(INT4, "re:(unclosed"))))
