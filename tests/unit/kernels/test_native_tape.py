"""Native calls that are recorded and run again: the same bits as the calls themselves, on any number of threads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engines.kernels import (
    Fusion,
    GroupedQueries,
    IntegerMatrix,
    QuantizedLinear,
    RmsNorm,
    backends,
    grouped_query_attention,
    linear,
    pack_quantized,
)
from engines.kernels.native import Arena, Native, Watch
from engines.models.batch import Batch
from tests.unit.kernels.paged import PagedCache, Row

HIDDEN, HEADS, KV_HEADS, WIDTH = 64, 6, 2, 32
BLOCK = 4


@pytest.fixture(autouse=True)
def only_native(native: Native, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "native", native)


class TinyLayer:
    """Attention and a gated product with residuals, over a cache of 16 bits."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.norm = RmsNorm(torch.rand(HIDDEN), 1e-5)
        self.qkv = quantized((HEADS + 2 * KV_HEADS) * WIDTH, HIDDEN)
        self.output = quantized(HIDDEN, HEADS * WIDTH)
        self.gate_up = quantized(4 * HIDDEN, HIDDEN)
        self.down = quantized(HIDDEN, 2 * HIDDEN)
        self.shape = GroupedQueries(HEADS, KV_HEADS, WIDTH, WIDTH**-0.5, torch.randn(64, WIDTH))

    def __call__(self, hidden: torch.Tensor, cache: tuple[torch.Tensor, ...], batch: Batch) -> torch.Tensor:
        qkv = linear(hidden, self.qkv, None, Fusion(norm=self.norm))
        attended = grouped_query_attention(qkv, self.shape, cache, batch)
        hidden = linear(attended, self.output, None, Fusion(residual=hidden))
        gated = linear(hidden, self.gate_up, None, Fusion(norm=self.norm, gated=True))
        return linear(gated, self.down, None, Fusion(residual=hidden))


def quantized(out: int, width: int) -> QuantizedLinear:
    scale = (torch.rand(out, width // 32) + 0.5) / 16 / width**0.5
    return pack_quantized(IntegerMatrix(torch.randint(0, 16, (out, width), dtype=torch.uint8), 4, scale))


def with_slots(paged: PagedCache, rows: list[Row]) -> Batch:
    """The step of these rows, each of whose tokens is written where it belongs."""
    slots = [paged.slots(row.sequence, row.context)[-1] for row in rows]
    return replace(paged.batch(rows), cache_slots=torch.stack(slots))


def fill(place: Batch, batch: Batch) -> None:
    place.positions.copy_(batch.positions)
    place.cache_slots.copy_(batch.cache_slots)
    place.block_tables[:, : batch.block_tables.shape[1]].copy_(batch.block_tables)


def test_a_tape_does_what_the_calls_do_on_any_number_of_threads(native: Native) -> None:
    layer, rows, length = TinyLayer(), 5, 60
    paged = PagedCache(rows, length, [(KV_HEADS, WIDTH)] * 2, BLOCK, torch.bfloat16)
    batches = [
        with_slots(paged, [Row(row, 1 + (7 * row + 11 * step) % length, 1) for row in range(rows)]) for step in range(4)
    ]
    inputs = [torch.randn(rows, HIDDEN) for _ in batches]
    caches = [tuple(tensor.clone() for tensor in paged.tensors) for _ in range(2)]
    expected = [layer(hidden, caches[0], batch) for hidden, batch in zip(inputs, batches, strict=True)]
    place = replace(batches[0], block_tables=torch.zeros(rows, length // BLOCK, dtype=torch.int32))
    place = replace(place, positions=place.positions.clone(), cache_slots=place.cache_slots.clone())
    fill(place, batches[0])
    hidden = inputs[0].clone()
    with Watch() as watch, native.recording(3, Arena(8)) as tape:
        out = layer(hidden, caches[1], place)
    assert watch.foreign is None
    assert tape.complete
    assert torch.equal(out, expected[0])
    for threads, batch, values, wanted in zip((1, 2, 3), batches[1:], inputs[1:], expected[1:], strict=True):
        torch.set_num_threads(threads)
        fill(place, batch)
        hidden.copy_(values)
        # Whoever takes the scratch between two runs must not spoil the next.
        layer.down.product(torch.randn(70, 2 * HIDDEN), None)
        tape.run()
        assert torch.equal(out, wanted)
    for one, other in zip(*caches, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def test_a_watch_sees_what_torch_computes_and_lets_views_pass() -> None:
    x = torch.randn(4, 6)
    with Watch() as watch:
        x.view(2, 12)[:, 3:].split_with_sizes((4, 5), dim=1)
    assert watch.foreign is None
    with Watch() as watch:
        x + 1
        x.sum()
    assert watch.foreign is not None
    assert "add" in watch.foreign


def test_memory_is_used_again_once_no_tensor_lies_in_it() -> None:
    arena = Arena(8)
    first, second = arena.empty((2, 5), torch.float32), arena.empty((2, 5), torch.float32)
    assert first.data_ptr() != second.data_ptr()
    view, address = first[1], first.data_ptr()
    del first
    assert arena.empty((2, 5), torch.float32).data_ptr() != address
    view.fill_(1)
    del view
    assert arena.empty((3, 5), torch.float32).data_ptr() == address
    assert arena.empty((9, 5), torch.float32).fill_(2).sum() == 90


def test_a_tape_of_nothing_is_not_complete_and_an_error_ends_the_recording(native: Native) -> None:
    layer, x = TinyLayer(), torch.randn(3, HIDDEN)
    with native.recording(1, Arena(4)) as tape:
        pass
    assert not tape.complete
    with pytest.raises(ValueError, match="halfway"), native.recording(1, Arena(4)):
        raise ValueError("halfway")
    before = linear(x, layer.qkv)
    assert torch.equal(linear(x, layer.qkv), before)
