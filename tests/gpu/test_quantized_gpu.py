"""Quantized layers, experts and models on the GPU: the compiled kernels against the definition."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.model_configs import QUANTIZED, quantization_config
from engines import kernels
from engines.generation.engine import GenerationEngine
from engines.kernels import Fusion, Matrix, QuantizedMatrix, Router, RoutingRule, quantized_product
from engines.kernels.cuda.quantized import quantized_linear
from engines.kernels.cuda.quantized_layout import device_codes
from engines.kernels.cuda.quantized_tuning import QuantizedConfig, QuantizedShape, ranked
from engines.kernels.cuda.tuning import machine_of
from engines.kernels.experts import mixture, pack_experts
from engines.kernels.quantized_gpu import GpuQuantized
from engines.manifest import read_manifest
from engines.models.batch import Batch
from engines.models.loader import load_model
from engines.models.model import Model
from engines.protocol import EngineSpec
from tests.gpu.test_captured_steps_gpu import MODELS, VOCAB, run
from tests.paged_rows import PagedRows
from tests.quantized_cases import CASES, distance, exact_product, float8, integers, layers_of_files, levels
from tests.unit.generation.streams import mixed_items

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = torch.device("cuda", 0)
ROWS = (1, 3, 8, 13, 33, 64, 130, 300, 700)
TOLERANCE = {"levels": 4e-3, "float8": 2e-2}
"""Of float32 results. Levels become bfloat16; a last bit of an input's scale can move its code by a step."""


def matrices(lines: int, depth: int, device: torch.device = DEVICE) -> dict[str, QuantizedMatrix]:
    """``depth`` is a multiple of 128."""
    return {
        "int4 128": integers(lines, depth, 4, 128, device=device),
        "int4 64 zeros": integers(lines, depth, 4, 64, "zeros", device=device),
        "int4 32 any": integers(lines, depth, 4, 32, "any", device=device),
        "int4 line": integers(lines, depth, 4, device=device),
        "int3 line zeros": integers(lines, depth, 3, 0, "zeros", device=device),
        "int8 128": integers(lines, depth, 8, 128, device=device),
        "int8 32 zeros": integers(lines, depth, 8, 32, "zeros", device=device),
        "int8 line": integers(lines, depth, 8, exact=False, device=device),
        "w8a8": integers(lines, depth, 8, activations="int8", device=device),
        "float8 line": float8(lines, depth, (1, depth), device=device),
        "float8 blocks": float8(lines, depth, (128, 128), device=device),
        "float8 both": float8(lines, depth, (1, depth), "float8", device=device),
        "levels": levels(lines, depth, 4, device=device),
        "levels scaled": levels(lines, depth, 3, groups=depth // 64, device=device),
    }


NAMES = list(matrices(16, 128, torch.device("cpu")))


def tolerance(name: str) -> float:
    return next((value for start, value in TOLERANCE.items() if name.startswith(start)), 5e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("lines", "depth"), [(208, 1152), (66, 384), (3584, 2560)])
def test_what_the_machine_chooses(name: str, lines: int, depth: int) -> None:
    matrix = matrices(lines, depth)[name]
    packed = kernels.pack_linear(matrix)
    assert isinstance(packed, GpuQuantized)
    for rows in ROWS:
        x = torch.randn(rows, depth, device=DEVICE).bfloat16()
        expected = exact_product(x, matrix)
        result = kernels.linear(x, packed)
        assert distance(result, expected) < max(8e-3, tolerance(name)), rows
        assert torch.equal(kernels.linear(x, packed), result), "differs from run to run"


@pytest.mark.parametrize("name", [name for name in NAMES if "w8a8" not in name and "both" not in name])
@pytest.mark.parametrize("rows", [1, 8, 16, 64, 200])
def test_configurations(name: str, rows: int) -> None:
    matrix = matrices(200, 1280)[name]
    codes = device_codes(matrix)
    assert codes is not None
    x = torch.randn(rows, 1280, device=DEVICE).bfloat16()
    expected = exact_product(x, matrix)
    configs = ranked(QuantizedShape.of(codes, False), rows, machine_of(0), 12)
    for config in [*configs, *(replace(config, early=False, prefetch=0) for config in configs[:2])]:
        result = quantized_linear(x, codes, config, dtype=torch.float32)
        assert distance(result, expected) < tolerance(name), config


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_other_types(name: str, dtype: torch.dtype) -> None:
    matrix = matrices(96, 256)[name]
    packed = kernels.pack_linear(matrix)
    for rows in (4, 600):
        x = torch.randn(rows, 256, device=DEVICE).to(dtype)
        result = kernels.linear(x, packed)
        assert result.dtype is dtype
        assert distance(result, exact_product(x, matrix)) < max(2e-3, tolerance(name))


@pytest.mark.parametrize("name", ["int4 128", "w8a8", "float8 both", "levels"])
@pytest.mark.parametrize("rows", [2, 100, 600])
def test_what_follows_the_product(name: str, rows: int) -> None:
    matrix = matrices(256, 512)[name]
    x, bias = torch.randn(rows, 512, device=DEVICE).bfloat16(), torch.randn(256, device=DEVICE).bfloat16()
    residual = torch.randn(rows, 128, device=DEVICE).bfloat16()
    gate, up = (exact_product(x, matrix) + bias.double()).chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate) * up + residual.double()
    result = kernels.linear(x, kernels.pack_linear(matrix), bias, Fusion(gated=True, residual=residual))
    assert distance(result, expected) < 2e-2


@pytest.mark.parametrize("case", CASES)
def test_layers_of_files(case: str) -> None:
    """Of every format that other tools wrote."""
    for name, matrix in layers_of_files(case, DEVICE):
        packed = kernels.pack_linear(matrix)
        for rows in (1, 5, 80):
            x = torch.randn(rows, 64, device=DEVICE).bfloat16()
            expected = quantized_product(x.float(), matrix, None).double()
            assert distance(kernels.linear(x, packed), expected) < 2e-2, name


def expert_batch(tokens: int) -> Batch:
    integers32 = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    return Batch(
        token_ids=torch.randint(1000, (tokens,), device=DEVICE),
        positions=torch.randint(5000, (tokens,), device=DEVICE),
        cache_slots=torch.arange(tokens, device=DEVICE),
        query_starts=integers32,
        context_lengths=integers32,
        block_tables=integers32,
        decode_rows=None,
        longest_query=1,
        longest_context=1,
    )


def busy_and_idle(number: int, lines: int, depth: int) -> Matrix:
    if number == 5:
        plain: torch.Tensor = torch.randn(lines, depth, device=DEVICE) / depth**0.5
        return plain.bfloat16()
    return integers(lines, depth, 8 if number % 3 == 0 else 4, 64, device=DEVICE)


@pytest.mark.parametrize("tokens", [1, 7, 64, 900])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_experts_in_a_graph(tokens: int, scoring: str) -> None:
    """Experts of three formats; with plain weights of the same values the layer gives the same."""
    width, inner, number, chosen = 512, 192, 16, 4
    gate_up = [[busy_and_idle(expert, inner, width) for _ in range(2)] for expert in range(number)]
    down = [busy_and_idle(expert, width, inner) for expert in range(number)]
    shared = ([busy_and_idle(5, 2 * inner, width) for _ in range(2)], busy_and_idle(5, width, 2 * inner))
    packed = pack_experts(gate_up, down, shared, chosen)
    assert packed.quantized is not None
    plain = pack_experts(
        [[kernels.dense(part, torch.bfloat16) for part in parts] for parts in gate_up],
        [kernels.dense(part, torch.bfloat16) for part in down],
        shared,
        chosen,
    )
    weight = kernels.pack_dense(torch.randn(number, width, device=DEVICE) / width**0.5)
    router = Router(weight, None, RoutingRule(chosen, scoring="sigmoid" if scoring == "sigmoid" else "softmax"))
    norm, batch = kernels.RmsNorm(torch.ones(width, device=DEVICE).bfloat16(), 1e-6), expert_batch(tokens)
    hidden = torch.randn(tokens, width, device=DEVICE).bfloat16()
    mixture(hidden.clone(), norm, router, packed, batch)
    graph = torch.cuda.CUDAGraph()
    inputs = hidden.clone()
    with torch.cuda.graph(graph):
        result = mixture(inputs, norm, router, packed, batch)
    for _ in range(2):
        hidden = torch.randn(tokens, width, device=DEVICE).bfloat16()
        inputs.copy_(hidden)
        graph.replay()
        expected = mixture(hidden.clone(), norm, router, plain, batch)
        assert distance(result.float() - hidden, (expected.float() - hidden).double()) < 2.5e-2


@pytest.mark.parametrize(
    "config", [QuantizedConfig(32, 4, 2, 4, 3, 256, True), QuantizedConfig(64, 0, 1, 4, 3, 256, True)]
)
def test_a_chain_of_layers_in_a_graph(config: QuantizedConfig) -> None:
    """Each layer reads what the one before wrote: with early starts a missing wait would show."""
    if not machine_of(0).hopper:
        pytest.skip("needs a Hopper GPU")
    width, layers = 1024, 24
    matrices = [integers(width, width, 4, 128, device=DEVICE) for _ in range(layers)]
    packed = [device_codes(matrix) for matrix in matrices]
    x = torch.randn(7, width, device=DEVICE).bfloat16()

    def chain() -> torch.Tensor:
        hidden = x
        for codes in packed:
            assert codes is not None
            hidden = quantized_linear(hidden, codes, config, residual=hidden)
        return hidden

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = chain()
    for _ in range(10):
        x.copy_(torch.randn(7, width))
        graph.replay()
        expected = x.double()
        for matrix in matrices:
            expected = (expected + exact_product(expected.bfloat16(), matrix)).bfloat16().double()
        assert distance(result, expected) < 2e-2


def random_model(folder: Path) -> Model:
    spec = EngineSpec(name="tiny", source=str(folder), random_weights=3)
    manifest = read_manifest(folder, random_weights=True)
    return load_model(manifest, spec, DEVICE, torch.bfloat16, lambda progress: None)


@pytest.mark.parametrize("architecture", ["llama", "deepseek"])
@pytest.mark.parametrize("weights", list(QUANTIZED))
def test_models_in_captured_steps(architecture: str, weights: str, tmp_path: Path) -> None:
    """What they compute is what the definition of their weights says, and what graphs compute is that too."""
    config = MODELS[architecture] | {"quantization_config": quantization_config(weights)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    prompt = torch.randint(VOCAB, (24,)).tolist()
    result = PagedRows(random_model(tmp_path), 1, 8).step({0: prompt})[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engines.kernels.quantized.pack_gpu", lambda matrix: None)
        patch.setattr("engines.kernels.experts.pack_stacks", lambda *arguments: None)
        plain = PagedRows(random_model(tmp_path), 1, 8).step({0: prompt})[0]
    # Where a token's experts are nearly tied, another one is taken.
    similar = torch.nn.functional.cosine_similarity(result.float(), plain.float()).sort().values
    assert similar[len(similar) // 4] > 0.98
    spec = EngineSpec(
        name="tiny",
        source=str(tmp_path),
        device="cuda",
        dtype="bfloat16",
        random_weights=3,
        max_batch=16,
        max_step_tokens=512,
        memory_limit=6 << 30,
    )
    engine = GenerationEngine.load(spec, lambda progress: None)
    try:
        assert engine.wait_captured(120)
        assert engine.capacity.graph_rows == (1, 2, 4, 8, 16)
        requests = mixed_items(24, VOCAB, random.Random(7))
        captured, composed = run(engine, requests, 12), run(engine, requests, 12, graphs=False)
        assert captured.ends.keys() == composed.ends.keys()
        firsts = [captured.tokens[one.item][0] == composed.tokens[one.item][0] for one in requests]
        assert sum(firsts) >= len(firsts) * 3 // 4
    finally:
        engine.close()
