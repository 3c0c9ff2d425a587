from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compression.plan import LayerPlan, LinearLayer
from compression.quantization_config import quantization_config, targets
from compression.quantize.base import Scheme
from compression.quantize.codebook import KMeans
from compression.quantize.rounding import RoundToNearest
from compression.stored_formats import stored_bytes, stored_tensors
from engines.fields import Fields
from engines.kernels import dense
from engines.models.safetensors_reader import SafetensorsReader
from engines.models.weights import FileSource, Placement
from engines.quant.base import LinearPart
from engines.quant.methods import methods_of
from engines.quantization_config import read_quantization

NAME = "model.layers.0.mlp.up_proj"
SCHEMES = {
    "int4 groups": Scheme("integer", bits=4, group_size=32, symmetric=True),
    "int4 groups, zero points": Scheme("integer", bits=4, group_size=32, symmetric=False),
    "int4 rows": Scheme("integer", bits=4),
    "int8 rows": Scheme("integer", bits=8),
    "int8 rows, zero points": Scheme("integer", bits=8, symmetric=False),
    "int3 groups": Scheme("integer", bits=3, group_size=32),
    "w8a8": Scheme("integer", bits=8, activations="int8"),
    "float8 rows": Scheme("float8", activations="float8"),
    "float8 blocks": Scheme("float8", block=(128, 128)),
    "codebook groups": Scheme("codebook", bits=4, group_size=32),
    "codebook of 3 bits, rows": Scheme("codebook", bits=3),
}


@pytest.mark.parametrize("name", list(SCHEMES))
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
def test_what_is_stored_is_what_the_engine_reads(tmp_path: Path, name: str, scale_dtype: torch.dtype) -> None:
    scheme = replace(SCHEMES[name], scale_dtype=scale_dtype)
    weight = torch.randn(140, 160, generator=torch.Generator().manual_seed(3)) * 0.1
    quantizer = KMeans() if scheme.kind == "codebook" else RoundToNearest()
    matrix = quantizer.quantize(weight, None, scheme)
    tensors = stored_tensors(matrix, scheme)
    assert sum(tensor.nbytes for tensor in tensors.values()) == stored_bytes(scheme, 140, 160)
    save_file({f"{NAME}.{suffix}": tensor for suffix, tensor in tensors.items()}, tmp_path / "model.safetensors")
    config = quantization_config([LinearLayer(NAME, 140, 160)], {NAME: LayerPlan(scheme, "rtn")})
    method = methods_of(read_quantization(Fields({"quantization_config": config}, "config.json")))(NAME)
    reader = SafetensorsReader((tmp_path / "model.safetensors",))
    source = FileSource(Placement(device=torch.device("cpu"), dtype=torch.float32), reader, lambda progress: None, 1)
    read = method.create_weights(LinearPart(NAME, 140), 160, "none", source)
    assert torch.equal(dense(read, torch.float32), matrix.dequantize())
    assert getattr(read, "activations", "float") == scheme.activations
    source.finish(lambda name: False)


def test_targets_name_kinds_where_all_of_a_kind_belong_to_them() -> None:
    names = [f"model.layers.{layer}.{part}" for layer in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj")]
    assert targets([names[0], names[2], names[3]], names) == [
        r"re:model\.layers\.\d+\.self_attn\.q_proj$",
        "model.layers.1.mlp.up_proj",
    ]


def test_experts_of_two_formats_and_a_quantized_embedding_are_ours_alone() -> None:
    experts = [LinearLayer(f"model.layers.1.mlp.experts.{expert}.up_proj", 8, 64) for expert in range(3)]
    eight, four = LayerPlan(Scheme("integer"), "rtn"), LayerPlan(Scheme("integer", bits=4, group_size=32), "rtn")
    plan = {layer.name: eight for layer in experts}
    uniform = quantization_config(experts, plan)
    assert uniform["quant_method"] == "compressed-tensors"
    assert uniform["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert quantization_config(experts, plan | {experts[0].name: four})["quant_method"] == "slimserve"
    embedding = LinearLayer("model.embed_tokens", 100, 64)
    mixed = quantization_config([*experts, embedding], plan | {embedding.name: eight})
    assert mixed["quant_method"] == "slimserve"
    assert mixed["config_groups"]["group_0"]["targets"] == ["Linear", "model.embed_tokens"]
