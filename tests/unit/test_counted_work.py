from __future__ import annotations

import pytest
import torch

from benchmarks.floors import decode_bytes
from engines.models.config import DecoderConfig, DeepseekConfig, MoeConfig, RopeConfig
from engines.models.loader import build_model
from engines.models.weights import Placement, ShapeSource
from engines.models.work import count_work as count_model
from engines.protocol import ModelWork, OneShotRow, Row, StepPlan
from server.scheduler.core import StepWork
from server.worker.counted_work import count_work

MODEL = ModelWork(
    token_flops=100.0,
    row_flops=10.0,
    decode_pair_flops=2.0,
    prompt_pair_flops=1.0,
    weight_bytes=1000.0,
    kv_token_bytes=3.0,
)


def row(item: int, start: int, count: int, max_new: int) -> Row:
    return Row(item=item, slot=item, start=start, count=count, new_blocks=(), max_new=max_new)


def test_a_mixed_step_is_counted() -> None:
    """Two decodes over 8 and 11 tokens, the middle of a prompt (tokens 4 to 7), and the end of another (0 to 4)."""
    rows = (row(0, 7, 1, 1), row(1, 10, 1, 1), row(2, 4, 4, 0), row(3, 0, 5, 1))
    pairs = (5 + 6 + 7 + 8) + (1 + 2 + 3 + 4 + 5)
    work = StepWork(rows=4, tokens=11, prompt_tokens=9, decode_pairs=19, prompt_pairs=pairs)
    counted = count_work(StepPlan(step=1, engine="m", rows=rows), work, MODEL)
    assert counted.flops == 11 * 100 + 3 * 10 + 19 * 2 + pairs
    assert counted.bytes_read == 1000 + 3 * (8 + 11 + 8 + 5)
    assert counted.padding == 0


def test_padding_is_what_nobody_asked_for() -> None:
    decode = StepPlan(step=1, engine="m", rows=(row(0, 7, 1, 1),), graph_rows=8)
    assert count_work(decode, StepWork(rows=1, tokens=1), MODEL).padding == 7
    prompt = StepPlan(step=1, engine="m", rows=(row(0, 0, 20, 1),), graph_tokens=32)
    assert count_work(prompt, StepWork(rows=1, tokens=20), None).padding == 12
    batch = StepPlan(step=1, engine="m", one_shot=(OneShotRow(item=1, bucket=0, rows=3),), padded_rows=4)
    assert count_work(batch, StepWork(rows=3), MODEL).padding == 1


def test_what_is_not_known_is_not_counted() -> None:
    counted = count_work(StepPlan(step=1, engine="m", rows=(row(0, 7, 1, 1),)), StepWork(rows=1, tokens=1), None)
    assert (counted.flops, counted.bytes_read) == (0.0, 0.0)


ROPE = RopeConfig(kind="default", dim=16, theta=1e4)
DENSE = DecoderConfig(
    layers=3, hidden=64, intermediate=160, heads=4, kv_heads=2, head_dim=16, vocab=320, eps=1e-5, tied_head=False,
    qkv_bias=False, output_bias=False, mlp_bias=False, qk_norm=False, rope=ROPE,
)  # fmt: skip
MOE = MoeConfig(
    experts=8, experts_per_token=2, intermediate=32, shared_intermediate=64, dense_layers=1, scoring="softmax",
    groups=1, top_groups=1, correction_bias=False, normalise=False, scale=1.0,
)  # fmt: skip
SPARSE = DeepseekConfig(
    layers=3, hidden=64, intermediate=160, heads=4, vocab=320, eps=1e-5, tied_head=False, attention_bias=False,
    q_lora_rank=None, kv_lora_rank=32, nope_dim=16, value_dim=16, rope=ROPE, rope_interleaved=True, moe=MOE,
    mtp_layers=0,
)  # fmt: skip


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "experts"])
@pytest.mark.parametrize("rows", [1, 16])
def test_the_bytes_of_a_decode_are_the_floor_of_the_benchmarks(
    config: DecoderConfig | DeepseekConfig, rows: int
) -> None:
    model = build_model(config, ShapeSource(Placement(device=torch.device("cuda"), dtype=torch.bfloat16)), 128)
    counted = count_model(config, model, kv_itemsize=2)
    plan = StepPlan(step=1, engine="m", rows=tuple(row(item, 29, 1, 1) for item in range(rows)))
    step = count_work(plan, StepWork(rows=rows, tokens=rows, decode_pairs=30 * rows), counted)
    floor = decode_bytes(config, "bfloat16", counted.kv_token_bytes, [30] * rows)
    assert step.bytes_read == pytest.approx(floor, rel=0.02)


def test_two_operations_for_each_weight_and_token() -> None:
    model = build_model(DENSE, ShapeSource(Placement(device=torch.device("cuda"), dtype=torch.bfloat16)), 128)
    counted = count_model(DENSE, model, kv_itemsize=2)
    layer = 64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 160
    assert counted.token_flops == 2 * 3 * layer
    assert counted.row_flops == 2 * 64 * 320
    assert counted.decode_pair_flops == 2 * 3 * (64 + 64)
    assert counted.kv_token_bytes == 3 * 2 * 32 * 2
