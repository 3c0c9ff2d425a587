"""Steps of grouped-query attention over paged caches, with their definition in float64.

What no row may read is NaN: cache entries behind each row's end, and the places of this step's own keys and values.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import torch

from engines.kernels import GroupedQueries, RmsNorm, reference
from engines.models.batch import Batch
from tests.triton_interpreter import DEVICE
from tests.unit.kernels.paged import PagedCache, Row

TOLERANCE = {torch.float32: 5e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2, torch.float8_e4m3fn: 2e-2}
"""Of ||result - definition|| / ||definition||; queries and keys are rounded once between rotation and product.

Into fp8 a key that lies between two numbers may go either way, and a result over such keys follows them."""
MOST_POSITIONS = 4096


def to_device(batch: Batch) -> Batch:
    tensors = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    moved: dict[str, Any] = {name: value.to(DEVICE) for name, value in tensors.items() if torch.is_tensor(value)}
    return dataclasses.replace(batch, **moved)


def close(result: torch.Tensor, expected: torch.Tensor, fp8: bool = False) -> bool:
    assert result.shape == expected.shape
    distance = (result.cpu().double() - expected).norm() / expected.norm()
    return float(distance) < TOLERANCE[torch.float8_e4m3fn if fp8 else result.dtype]


def random_shape(heads: int, kv_heads: int, width: int, dtype: torch.dtype, normed: bool = False) -> GroupedQueries:
    rope = width if random.random() < 0.7 else width // 2
    angles = torch.rand(MOST_POSITIONS, rope // 2, device=DEVICE) * 6
    norms = [RmsNorm((torch.rand(width, device=DEVICE) + 0.5).to(dtype), 1e-6) for _ in range(2)]
    return GroupedQueries(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width,
        scale=width**-0.5,
        cos_sin=torch.cat([angles.cos(), angles.sin()], dim=1),
        query_norm=norms[0] if normed else None,
        key_norm=norms[1] if normed else None,
    )


class Step:
    """Random rows over a random cache, whose own keys and values are not written yet; fp8 with random scales if so."""

    def __init__(
        self,
        rows: Sequence[Row],
        shape: GroupedQueries,
        dtype: torch.dtype,
        block_size: int = 16,
        fp8: bool = False,
    ) -> None:
        longest = max(row.context for row in rows) + 40
        token_shapes = [(shape.kv_heads, shape.head_dim)] * 2
        self.paged = PagedCache(len(rows), longest, token_shapes, block_size, dtype, seed=random.randrange(1 << 30))
        for row in rows:
            unknown = self.paged.slots(row.sequence, longest)[row.context - row.count :]
            for tensor in self.paged.tensors:
                tensor.flatten(0, 1)[unknown] = torch.nan
        batch = self.paged.batch(rows)
        slots = [self.paged.slots(row.sequence, row.context)[row.context - row.count :] for row in rows]
        self.slots = torch.cat(slots)
        self.rows, self.shape = rows, shape
        self.batch = dataclasses.replace(batch, cache_slots=self.slots)
        self.scales = torch.ones(2, shape.kv_heads)
        if fp8:
            # Some so small that the largest numbers are cut.
            self.scales = torch.exp2(torch.randint(-8, 3, (2, shape.kv_heads)).float())
            pairs = zip(self.paged.tensors, self.scales, strict=True)
            self.paged.tensors = tuple(reference.quantize(tensor, scale[:, None]) for tensor, scale in pairs)
        tensors = (*self.paged.tensors, self.scales) if fp8 else self.paged.tensors
        self.cache = tuple(tensor.to(DEVICE) for tensor in tensors)
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self.qkv = (torch.randn(self.slots.shape[0], width) * 2).to(dtype)

    def expected(self) -> torch.Tensor:
        """(T, Hq * D) float64; the cache of the host gets this step's keys and values, rounded to its type."""
        shape = self.shape
        sizes = (shape.heads, shape.kv_heads, shape.kv_heads)
        queries, keys, values = self.qkv.double().view(-1, sum(sizes), shape.head_dim).split_with_sizes(sizes, dim=1)
        if shape.query_norm is not None and shape.key_norm is not None:
            queries = reference.rms_norm(queries, shape.query_norm.weight.cpu().double(), 1e-6)
            keys = reference.rms_norm(keys, shape.key_norm.weight.cpu().double(), 1e-6)
        queries, keys = queries.clone(), keys.clone()
        reference.rope_(queries, keys, self.batch.positions, shape.cos_sin.cpu(), interleaved=False)
        wide = []
        for tensor, entries, scale in zip(self.paged.tensors, (keys, values), self.scales[:, :, None], strict=True):
            if tensor.dtype is torch.float8_e4m3fn:
                entries = reference.quantize(entries.to(self.qkv.dtype), scale)
            reference.write_cache(entries, tensor, self.slots)
            wide.append(tensor.to(DEVICE).double() * scale.to(DEVICE))
        queries = queries.to(DEVICE)
        return reference.attention(queries, wide[0], wide[1], to_device(self.batch), shape.scale).flatten(1).cpu()

    def check_cache(self) -> None:
        """After ``expected``: this step's entries are written, and nothing else."""
        for ours, wanted in zip(self.cache[:2], self.paged.tensors, strict=True):
            tolerance, found, expected = TOLERANCE[ours.dtype], ours.cpu().double(), wanted.double()
            assert torch.equal(found.isnan(), expected.isnan())
            assert (found - expected).nan_to_num(0.0).norm() < tolerance * expected.nan_to_num(0.0).norm()


def padded(step: Step, tokens: int, rows: int, widest: int) -> Batch:
    """The step in one of ``tokens`` and ``rows``, with shuffled table lines and bounds instead of lengths."""
    batch = step.batch
    lines = torch.randperm(rows + 3)[:rows].int()
    tables = torch.zeros(rows + 3, widest, dtype=torch.int32)
    tables[lines[: len(step.rows)].long(), : batch.block_tables.shape[1]] = batch.block_tables
    missing_tokens, missing_rows = tokens - batch.positions.shape[0], rows - len(step.rows)
    all_decode = batch.decode_rows == len(step.rows)
    starts = torch.full((missing_rows,), int(batch.query_starts[-1]), dtype=torch.int32)
    if all_decode:
        starts += torch.arange(1, missing_rows + 1, dtype=torch.int32)
    return Batch(
        token_ids=torch.zeros(tokens, dtype=torch.int64),
        positions=torch.cat([batch.positions, torch.zeros(missing_tokens, dtype=torch.int64)]),
        cache_slots=torch.cat([batch.cache_slots, torch.full((missing_tokens,), -1)]),
        query_starts=torch.cat([batch.query_starts, starts]),
        context_lengths=torch.cat([batch.context_lengths, torch.zeros(missing_rows, dtype=torch.int32)]),
        block_tables=tables,
        decode_rows=rows if all_decode else None,
        longest_query=tokens,
        longest_context=widest * 16,
        table_rows=lines,
    )


def random_rows(contexts: Sequence[int], prompts: Sequence[tuple[int, int]] = ()) -> list[Row]:
    """Decodes of these contexts, then rows of (context, count)."""
    rows = [Row(number, context, 1) for number, context in enumerate(contexts)]
    return rows + [Row(len(rows) + number, context, count) for number, (context, count) in enumerate(prompts)]
