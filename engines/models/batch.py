"""The tokens of one step as the models see them: rows flattened one after the other, no padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LayerCache = tuple[torch.Tensor, ...]
"""KV bytes of one layer: GQA has (keys, values), each (blocks, block_size, kv_heads, head_dim);
MLA has (latent,), (blocks, block_size, kv_lora_rank + rope_dim). In fp8 the scales follow, ``KvLayout.scale_shape``."""


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Shape of one token's KV in one layer, one entry for each tensor of the ``LayerCache``; the same in all layers."""

    layers: int
    token_shapes: tuple[tuple[int, ...], ...]
    latent_rank: int | None = None
    """Of MLA: so many entries of the latent have one scale, those behind them, which carry the position, another."""

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Of a layer's float32 scales: (2, kv_heads) of keys and values, or one for each column of the latent."""
        heads_or_columns = self.token_shapes[0][0]
        return (len(self.token_shapes), heads_or_columns) if self.latent_rank is None else (heads_or_columns,)

    def bytes_per_token(self, itemsize: int) -> int:
        """Bytes that one token takes over all layers."""
        values = 0
        for shape in self.token_shapes:
            size = 1
            for extent in shape:
                size *= extent
            values += size
        return self.layers * values * itemsize


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of R rows. Row r holds flat tokens ``query_starts[r] .. query_starts[r+1]-1``.

    The first ``decode_rows`` rows have exactly one token each. All tensors are on the model's device.

    In a captured step the numbers on the host are bounds, ``decode_rows`` is None unless every row decodes, and what
    fills the step up is padding: tokens with cache slot -1, which write no KV, and rows with context length 0, which
    attend to nothing and whose results are never read.
    """

    token_ids: torch.Tensor
    """(T,) int64."""
    positions: torch.Tensor
    """(T,) int64: place in the sequence, from 0."""
    cache_slots: torch.Tensor
    """(T,) int64: where each token's KV is written, ``block_id * block_size + offset``."""
    query_starts: torch.Tensor
    """(R+1,) int32."""
    context_lengths: torch.Tensor
    """(R,) int32: tokens in the cache after this step's write; the last query of row r attends to this many."""
    block_tables: torch.Tensor
    """(lines, widest) int32: block ids in sequence order; entries past a row's last block are 0 and never read."""
    decode_rows: int | None
    longest_query: int
    """Most tokens of one row."""
    longest_context: int
    table_rows: torch.Tensor | None = None
    """(R,) int32: the line of ``block_tables`` that belongs to each row; None: row r has line r."""
    prompt_blocks: int | None = None
    """Cache blocks that the contexts of the rows behind ``decode_rows`` take together, or more; None: not counted."""

    @classmethod
    def of_prompt(cls, tokens: torch.Tensor, blocks: int) -> Batch:
        """One row of (T,) tokens, a whole prompt in the first ``blocks`` of a cache."""
        count, device = tokens.shape[0], tokens.device
        places = torch.arange(count, device=device)
        return cls(
            token_ids=tokens,
            positions=places,
            cache_slots=places,
            query_starts=torch.tensor([0, count], dtype=torch.int32, device=device),
            context_lengths=torch.tensor([count], dtype=torch.int32, device=device),
            block_tables=torch.arange(blocks, dtype=torch.int32, device=device).unsqueeze(0),
            decode_rows=0,
            longest_query=count,
            longest_context=count,
            prompt_blocks=blocks,
        )


FEWEST_SPARED = 4
"""Tokens of a step for each that is read, from which on it gains by ``LastTokens``."""


@dataclass(frozen=True, slots=True)
class LastTokens:
    """The S >= 1 tokens of a step whose results are read: the last layer computes the KV of all others and no more."""

    tokens: torch.Tensor
    """(S,) flat tokens of the step."""
    batch: Batch
    """A step of S rows that have one of them each."""

    @classmethod
    def of(
        cls,
        step: Batch,
        tokens: torch.Tensor,
        context_lengths: torch.Tensor,
        block_tables: torch.Tensor,
        table_rows: torch.Tensor | None = None,
    ) -> LastTokens:
        """Each is the last of a row; the others are the (S,) rows' lengths and tables, as a ``Batch`` has them."""
        count = tokens.shape[0]
        batch = Batch(
            token_ids=step.token_ids.index_select(0, tokens),
            positions=step.positions.index_select(0, tokens),
            cache_slots=step.cache_slots.index_select(0, tokens),
            query_starts=torch.arange(count + 1, dtype=torch.int32, device=tokens.device),
            context_lengths=context_lengths,
            block_tables=block_tables,
            decode_rows=count,
            longest_query=1,
            longest_context=step.longest_context,
            table_rows=table_rows,
        )
        return cls(tokens, batch)
