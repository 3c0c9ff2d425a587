"""An engine over an fp8 KV cache: scales chosen at load, twice the blocks, and tokens close to those without it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from engines.generation import kv_cache
from engines.generation.calibration import MARGIN, choose_scales, scales_of
from engines.generation.engine import GenerationEngine
from engines.generation.placement import require_fp8
from engines.kernels.reference import FP8, LARGEST_FP8, quantize
from engines.manifest import read_manifest
from engines.models.batch import KvLayout
from engines.models.loader import load_model
from engines.protocol import Admit, EngineLoadError, Measured, Row, SamplingParams, StepPlan, TokenLogprobs
from tests.unit.generation.tiny_models import DEEPSEEK, LLAMA, load_tiny, model_folder, tiny_spec

CPU = torch.device("cpu")
MEASURED = Measured(max_rows=8, step_tokens=64, workspace=0)
PROMPT = [5, 17, 200, 31, 31, 8, 150, 44, 2, 99, 7, 7, 7, 250, 3, 60, 61, 62, 63]


@pytest.fixture(scope="module", params=[LLAMA, DEEPSEEK], ids=["llama", "deepseek"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models"), request.param)


def prompt_logprobs(engine: GenerationEngine, cut: int) -> list[TokenLogprobs]:
    """Of the prompt's tokens, computed in two chunks."""
    sampling = SamplingParams(seed=0, temperature=0)
    admit = Admit(
        item=1,
        slot=0,
        tokens=PROMPT,
        prompt_length=len(PROMPT),
        blocks=(),
        sampling=sampling,
        prompt_logprobs=1,
    )
    found = []
    for step, (start, end) in enumerate([(0, cut), (cut, len(PROMPT))]):
        row = Row(item=1, slot=0, start=start, count=end - start, new_blocks=((3, 1), ())[step], max_new=step)
        engine.launch(StepPlan(step=step, engine="tiny", admits=(admit,) if step == 0 else (), rows=(row,)))
        found += engine.collect(step).rows[0].prompt_logprobs
    return found


def test_tokens_are_as_likely_as_without_it_and_chunks_change_no_bit(folder: Path) -> None:
    engines = [load_tiny(folder, kv_dtype=kv_dtype) for kv_dtype in ("auto", "fp8")]
    plain, narrow = (prompt_logprobs(engine, 7) for engine in engines)
    again = prompt_logprobs(engines[1], 12)
    for engine in engines:
        engine.close()
    assert again == narrow
    differences = [abs(left.logprob - right.logprob) for left, right in zip(plain, narrow, strict=True)]
    assert 0 < sum(differences) / len(differences) < 0.15


def test_a_given_memory_holds_twice_the_blocks_of_a_16_bit_cache(folder: Path) -> None:
    loaded = load_tiny(folder, measured=MEASURED)
    limit = loaded.info.weight_bytes + (100 << 10)
    loaded.close()
    blocks = {}
    for kv_dtype in ("bfloat16", "fp8"):
        engine = load_tiny(folder, kv_dtype=kv_dtype, measured=MEASURED, memory_limit=limit)
        blocks[kv_dtype] = engine.capacity.blocks
        assert engine.info.kv_dtype == kv_dtype
        assert engine.info.kv_bytes <= 100 << 10
        engine.close()
    assert blocks["fp8"] in (2 * blocks["bfloat16"], 2 * blocks["bfloat16"] + 1)
    assert blocks["fp8"] < 8 * 16, "the limit must be what decides"


def test_blocks_of_another_kv_dtype_never_match(folder: Path) -> None:
    engines = [load_tiny(folder, measured=MEASURED, kv_dtype=kv_dtype) for kv_dtype in ("bfloat16", "fp8", "fp8")]
    narrow, first, second = (engine.info.fingerprint for engine in engines)
    for engine in engines:
        engine.close()
    assert narrow != first == second


def test_calibration_gives_the_same_powers_of_two_each_time_unless_the_checkpoint_has_scales(folder: Path) -> None:
    manifest = read_manifest(folder, True)
    model = load_model(manifest, tiny_spec(folder), CPU, torch.float32, lambda progress: None)
    layout = model.kv_layout
    first, second = (choose_scales(model, 0, model.max_context, torch.float32, CPU) for _ in range(2))
    assert len(first) == layout.layers
    for one, other in zip(first, second, strict=True):
        assert one.shape == layout.scale_shape
        assert torch.equal(one, other)
        assert torch.equal(one.frexp().mantissa, torch.full_like(one, 0.5))
    stored = tuple(torch.full_like(layer, 2.0) for layer in first)
    assert choose_scales(dataclasses.replace(model, kv_scales=stored), 0, 64, torch.float32, CPU) is stored


def test_scales_come_from_what_is_largest_in_each_head_or_part() -> None:
    heads = KvLayout(1, ((2, 4), (2, 4)))
    keys, values = torch.zeros(3, 16, 2, 4), torch.zeros(3, 16, 2, 4)
    keys[1, 3, 0, 2], keys[0, 0, 1, 1], values[2, 15, 1, 0] = -3.0, 100.0, 1e-9
    unit = LARGEST_FP8 / MARGIN
    found = scales_of(heads, (keys, values))
    assert (found * unit >= torch.tensor([[3.0, 100.0], [unit, 1e-9]])).all()
    assert (found[0] * unit < torch.tensor([6.0, 200.0])).all()
    latent = torch.zeros(2, 16, 6)
    latent[0, 1, 2], latent[1, 4, 5] = 30.0, -0.5
    found = scales_of(KvLayout(1, ((6,),), latent_rank=4), (latent,))
    assert found.tolist() == [found[0].item()] * 4 + [found[4].item()] * 2
    assert 30.0 <= found[0] * unit < 60.0
    assert 0.5 <= found[4] * unit < 1.0


def test_an_fp8_cache_without_scales_has_ones() -> None:
    (cache,) = kv_cache.allocate(KvLayout(1, ((2, 4), (2, 4))), 3, 16, FP8, CPU)
    assert [tensor.dtype for tensor in cache] == [FP8, FP8, torch.float32]
    assert torch.equal(cache[2], torch.ones(2, 2))


def test_quantizing_cuts_what_is_too_large_and_keeps_nan() -> None:
    x = torch.tensor([1.0, -1e30, 500.0, 0.26, torch.nan, torch.inf])
    assert quantize(x, torch.tensor(1.0)).float().nan_to_num(7.0).tolist() == [1.0, -448.0, 448.0, 0.25, 7.0, 448.0]
    assert quantize(x, torch.tensor(2.0)).float()[2] == 256.0


def test_a_gpu_without_fp8_is_refused_in_words() -> None:
    require_fp8("m", "L4", (8, 9))
    with pytest.raises(EngineLoadError, match=r"fp8 needs .* 8\.9 .*A100 has 8\.0"):
        require_fp8("m", "A100", (8, 0))


def test_unknown_kv_dtypes_are_named(folder: Path) -> None:
    with pytest.raises(EngineLoadError, match=r"unknown --kv-dtype 'fp4'; use auto, .*fp8"):
        load_tiny(folder, kv_dtype="fp4")
    with pytest.raises(EngineLoadError, match="unknown --dtype 'fp8'"):
        load_tiny(folder, dtype="fp8")
