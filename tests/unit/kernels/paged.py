"""Random paged caches and the steps that read them. What no token was written to is NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engines.models.batch import Batch


@dataclass(frozen=True)
class Row:
    """One row of a step: ``count`` queries at the end of ``context`` cached tokens of sequence ``sequence``."""

    sequence: int
    context: int
    count: int


class PagedCache:
    """Sequences of one length in shuffled blocks."""

    def __init__(
        self,
        sequences: int,
        length: int,
        token_shapes: Sequence[tuple[int, ...]],
        block_size: int,
        dtype: torch.dtype,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        each = -(-length // block_size)
        self.block_size, self.length = block_size, length
        self.tables = (torch.randperm(sequences * each + 1, generator=generator)[:-1]).view(sequences, each).int()
        self.tensors = tuple(
            torch.full((sequences * each + 1, block_size, *shape), torch.nan, dtype=dtype) for shape in token_shapes
        )
        for sequence in range(sequences):
            slots = self.slots(sequence, length)
            for tensor in self.tensors:
                entries = torch.randn(length, *tensor.shape[2:], generator=generator)
                tensor.view(-1, *tensor.shape[2:])[slots] = entries.to(dtype)

    @property
    def keys(self) -> torch.Tensor:
        """The first tensor, (blocks, block_size, heads, width)."""
        return self.tensors[0]

    @property
    def values(self) -> torch.Tensor:
        """The second tensor."""
        return self.tensors[1]

    def slots(self, sequence: int, length: int) -> torch.Tensor:
        """Cache slots of the first ``length`` tokens."""
        offsets = torch.arange(self.block_size)
        return (self.tables[sequence].long().unsqueeze(1) * self.block_size + offsets).flatten()[:length]

    def forget_after(self, sequence: int, length: int) -> tuple[torch.Tensor, ...]:
        """Copies of the cache in which that sequence's tokens from ``length`` on were never written."""
        copies = tuple(tensor.clone() for tensor in self.tensors)
        for copy in copies:
            copy.view(-1, *copy.shape[2:])[self.slots(sequence, self.length)[length:]] = torch.nan
        return copies

    def batch(self, rows: Sequence[Row]) -> Batch:
        """The step that computes the given rows; those of one token come first."""
        assert [row.count == 1 for row in rows] == sorted((row.count == 1 for row in rows), reverse=True)
        positions = torch.cat([torch.arange(row.context - row.count, row.context) for row in rows])
        widest = max(-(-row.context // self.block_size) for row in rows)
        tables = torch.zeros(len(rows), widest, dtype=torch.int32)
        for index, row in enumerate(rows):
            used = -(-row.context // self.block_size)
            tables[index, :used] = self.tables[row.sequence, :used]
        starts = torch.tensor([0, *(row.count for row in rows)]).cumsum(0).int()
        return Batch(
            token_ids=torch.zeros_like(positions),
            positions=positions,
            cache_slots=torch.zeros_like(positions),
            query_starts=starts,
            context_lengths=torch.tensor([row.context for row in rows], dtype=torch.int32),
            block_tables=tables,
            decode_rows=sum(row.count == 1 for row in rows),
            longest_query=max(row.count for row in rows),
            longest_context=max(row.context for row in rows),
        )
