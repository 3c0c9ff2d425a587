"""Every kernel in plain torch: the definition that all other implementations are tested against. Runs on any device.

Shapes: T flat tokens of a step, Hq query heads, Hk key/value heads (Hq a multiple of Hk), D head dimension.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
LOW_32 = 0xFFFFFFFF
PADDED_BYTES = 256 << 20
FP8 = torch.float8_e4m3fn
LARGEST_FP8 = 448.0
PADDED_QUERIES, PADDED_KEYS = 256, 1024
"""Queries and keys of a row that ``padded_attention`` multiplies at once."""


class AttentionBatch(Protocol):
    """The fields of a step's batch that attention reads; ``engines.models.batch.Batch`` has them."""

    @property
    def positions(self) -> torch.Tensor:
        """(T,) int64: place of each token in its sequence."""

    @property
    def cache_slots(self) -> torch.Tensor:
        """(T,) int64: where each token's KV is written; -1 writes none."""

    @property
    def query_starts(self) -> torch.Tensor:
        """(R+1,) int32: row r holds flat tokens ``query_starts[r] .. query_starts[r+1]-1``."""

    @property
    def context_lengths(self) -> torch.Tensor:
        """(R,) int32: tokens of each row in the cache, this step's included."""

    @property
    def block_tables(self) -> torch.Tensor:
        """(lines, widest) int32: block ids in sequence order."""

    @property
    def table_rows(self) -> torch.Tensor | None:
        """(R,) int32: the line of ``block_tables`` that belongs to each row; None: row r has line r."""

    @property
    def decode_rows(self) -> int | None:
        """The first so many rows have exactly one token each. None: the host does not know, the device has to look;
        some rows may then have no token at all."""

    @property
    def longest_query(self) -> int:
        """Most tokens of one row."""

    @property
    def longest_context(self) -> int:
        """Most cached tokens of one row."""

    @property
    def prompt_blocks(self) -> int | None:
        """Cache blocks that the rows behind ``decode_rows`` take together, or more; None: not counted."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / rms(x) * weight`` over the last dimension, in float32, rounded once to x's dtype."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """(T, 2I) -> (T, I): ``silu(gate) * up`` with the gate in the first half, in float32, rounded once."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (functional.silu(gate) * up).to(gate_up.dtype)


def rope_(
    queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool
) -> None:
    """Rotate the first ``rope_dim`` dimensions of (T, Hq, D) and (T, Hk, D) in place.

    ``cos_sin`` is (max_pos, rope_dim) float32: cosines in the first half, sines in the second. Pairs are
    (i, i + rope_dim/2), or (2i, 2i+1) where ``interleaved``.
    """
    half = cos_sin.shape[1] // 2
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    for heads in (queries, keys):
        rotated = heads[..., : 2 * half]
        if interleaved:
            first, second = rotated[..., 0::2], rotated[..., 1::2]
        else:
            first, second = rotated[..., :half], rotated[..., half:]
        left, right = first.float(), second.float()
        new_first, new_second = left * cos - right * sin, right * cos + left * sin
        first.copy_(new_first)
        second.copy_(new_second)


def quantize(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``x / scales`` in e4m3, rounded to even; what is larger than it can hold becomes the largest. NaN stays NaN."""
    return (x.float() / scales).clamp(-LARGEST_FP8, LARGEST_FP8).to(FP8)


def write_cache(entries: torch.Tensor, cache: torch.Tensor, cache_slots: torch.Tensor) -> None:
    """Write (T, ...) entries into a (blocks, block_size, ...) cache at slots ``block_id * block_size + offset``."""
    cache.view(-1, *cache.shape[2:])[cache_slots] = entries.to(cache.dtype)


def row_tables(batch: AttentionBatch) -> torch.Tensor:
    """(R, widest) int32: each row's own line of the block tables."""
    return batch.block_tables if batch.table_rows is None else batch.block_tables[batch.table_rows.long()]


def attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: AttentionBatch, scale: float
) -> torch.Tensor:
    """Causal attention over a paged cache, query by query: (T, Hq, D) -> (T, Hq, Dv).

    ``keys`` is (blocks, block_size, Hk, D) and ``values`` (blocks, block_size, Hk, Dv). The query at position p
    attends to positions 0 .. p of its row, so its result depends on nothing else in the step. Reads the batch's
    numbers on the host: for a device that would be waited for, see ``padded_attention``.
    """
    output = queries.new_empty(*queries.shape[:2], values.shape[-1])
    starts, positions, tables = batch.query_starts.tolist(), batch.positions.tolist(), row_tables(batch)
    for row in range(len(starts) - 1):
        longest = max((positions[token] + 1 for token in range(starts[row], starts[row + 1])), default=0)
        blocks = tables[row, : -(-longest // keys.shape[1])].long()
        row_keys, row_values = (
            cache[blocks].flatten(0, 1).transpose(0, 1).to(queries.dtype) for cache in (keys, values)
        )
        for token in range(starts[row], starts[row + 1]):
            context = positions[token] + 1
            output[token] = functional.scaled_dot_product_attention(
                queries[token].unsqueeze(1),
                row_keys[:, :context],
                row_values[:, :context],
                scale=scale,
                enable_gqa=True,
            ).squeeze(1)
    return output


def padded_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: AttentionBatch, scale: float
) -> torch.Tensor:
    """As ``attention``, in groups of rows that are padded to one length, so that the host never waits for the device.

    Its temporary memory is bounded by ``PADDED_BYTES``, whatever the rows' number and lengths, or by what one row's
    part of ``PADDED_QUERIES`` queries and ``PADDED_KEYS`` keys takes, if that is more.
    """
    output = queries.new_empty(*queries.shape[:2], values.shape[-1])
    rows, decodes = batch.context_lengths.shape[0], batch.decode_rows or 0
    for first, last, longest in ((0, decodes, 1), (decodes, rows, batch.longest_query)):
        size = min(longest, PADDED_QUERIES)
        group = _rows_at_once(size, queries, keys, values, batch)
        for row in range(first, last, group):
            for begin in range(0, longest, size):
                _attend_padded(
                    range(row, min(row + group, last)), begin, size, queries, keys, values, batch, scale, output
                )
    return output


def _rows_at_once(
    size: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: AttentionBatch
) -> int:
    """How many rows of ``size`` queries each fit in ``PADDED_BYTES``, at least one."""
    heads, kv_heads = queries.shape[1], keys.shape[2]
    part = min(PADDED_KEYS, batch.longest_context + keys.shape[1])
    # Of each row in float32, all copies counted: gathered keys and values, scores, and sums with their update.
    gathered = 3 * part * kv_heads * (keys.shape[-1] + values.shape[-1])
    computed = heads * size * (4 * part + 3 * values.shape[-1] + 2 * queries.shape[-1])
    return max(1, PADDED_BYTES // (4 * (gathered + computed)))


def _attend_padded(
    rows: range,
    begin: int,
    size: int,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    output: torch.Tensor,
) -> None:
    """Queries ``begin .. begin+size-1`` of each of the rows; rows that have fewer repeat their last one."""
    part, block_size = slice(rows.start, rows.stop), keys.shape[1]
    starts, ends = batch.query_starts[rows.start : rows.stop].long(), batch.query_starts[rows.start + 1 : rows.stop + 1]
    places = (starts.unsqueeze(1) + torch.arange(begin, begin + size, device=queries.device)).minimum(
        ends.long().unsqueeze(1) - 1
    )
    positions, kv_heads = batch.positions[places], keys.shape[2]
    # (rows, Hk, group * size, D): the heads of a group stand one after the other, as queries of one key head.
    asked = (queries[places].float() * scale).view(len(rows), size, kv_heads, -1, queries.shape[2])
    asked = asked.permute(0, 2, 3, 1, 4).flatten(2, 3)
    best = asked.new_full((*asked.shape[:-1], 1), -torch.inf)
    total = torch.zeros_like(best)
    sums = asked.new_zeros(*asked.shape[:-1], values.shape[-1])
    blocks_at_once, tables = max(1, PADDED_KEYS // block_size), row_tables(batch)
    for block in range(0, -(-batch.longest_context // block_size), blocks_at_once):
        blocks = tables[part, block : block + blocks_at_once].long()
        visible_at = torch.arange(block * block_size, (block + blocks.shape[1]) * block_size, device=queries.device)
        # A slot that no token was ever written to may hold anything; its weight is 0, and 0 * NaN would still be NaN.
        written = (visible_at < batch.context_lengths[part].unsqueeze(1))[:, :, None, None]
        found = [cache[blocks].flatten(1, 2).float().where(written, 0).transpose(1, 2) for cache in (keys, values)]
        hidden = (visible_at > positions.unsqueeze(-1))[:, None, None]
        scores = torch.matmul(asked, found[0].transpose(-1, -2))
        scores.view(len(rows), kv_heads, -1, size, blocks.shape[1] * block_size).masked_fill_(hidden, -torch.inf)
        # Every query sees the first key of its row, so from the first part on the maximum is finite.
        higher = scores.amax(dim=-1, keepdim=True).maximum(best)
        weights = scores.sub_(higher).exp_()
        shrink = (best - higher).exp_()
        total = total * shrink + weights.sum(dim=-1, keepdim=True)
        sums = sums.mul_(shrink) + torch.matmul(weights, found[1])
        best = higher
    # Repeated queries are written more than once, each time with the same bits.
    attended = (sums / total).view(len(rows), kv_heads, -1, size, values.shape[-1]).permute(0, 3, 1, 2, 4)
    output[places] = attended.flatten(2, 3).to(output.dtype)


def philox_4x32(key: tuple[torch.Tensor, torch.Tensor], counter: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10: four random words of 32 bits for each counter. Words are int64 tensors in [0, 2**32)."""
    key_low, key_high = key
    c0, c1, c2, c3 = counter
    for _ in range(PHILOX_ROUNDS):
        # The 64-bit product may wrap to a negative number; shift and mask still give its two exact halves.
        product_0, product_1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c2 = ((product_1 >> 32) & LOW_32) ^ c1 ^ key_low, ((product_0 >> 32) & LOW_32) ^ c3 ^ key_high
        c1, c3 = product_1 & LOW_32, product_0 & LOW_32
        key_low, key_high = (key_low + PHILOX_KEY_STEPS[0]) & LOW_32, (key_high + PHILOX_KEY_STEPS[1]) & LOW_32
    return c0, c1, c2, c3


def gumbel_noise(seeds: torch.Tensor, choices: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """(R,) int64 seeds (the 64 bits of the seed), choices and output positions -> (R, vocab) float32 Gumbel noise.

    Entry v is ``-log(-log(u))`` with u from lane ``v % 4`` of Philox at counter (v // 4, position, choice, 0): the
    lane's upper 24 bits plus one half, over 2**24. u is exact in float64, never 0 and never 1.
    """
    seeds, choices, positions = seeds.unsqueeze(1), choices.unsqueeze(1), positions.unsqueeze(1)
    key = (seeds & LOW_32, (seeds >> 32) & LOW_32)
    groups = torch.arange(-(-vocab // 4), device=seeds.device).unsqueeze(0)
    words = torch.stack(
        philox_4x32(key, (groups, positions & LOW_32, choices & LOW_32, torch.zeros_like(seeds))), dim=-1
    )
    uniform = ((words.flatten(1)[:, :vocab] >> 8).double() + 0.5) / 2**24
    return (-torch.log(-torch.log(uniform))).float()
