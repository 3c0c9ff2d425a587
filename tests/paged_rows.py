"""Drives a model over a paged KV cache, as the generation engine does, for tests of models and kernels."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch

from engines.models.batch import Batch, LayerCache
from engines.models.loader import Model


class PagedRows:
    """Rows with shuffled block ids. Unwritten cache is NaN, so that a read of it shows in every result."""

    def __init__(self, model: Model, rows: int, longest: int, block_size: int = 4) -> None:
        self.model = model
        self.block_size = block_size
        self.lengths = [0] * rows
        each = -(-longest // block_size)
        ids = list(range(rows * each))
        random.Random(rows).shuffle(ids)
        self.tables = [ids[row * each : (row + 1) * each] for row in range(rows)]
        device, dtype = model.embedding.device, model.embedding.dtype
        self.caches: list[LayerCache] = [
            tuple(
                torch.full((len(ids), block_size, *shape), torch.nan, dtype=dtype, device=device)
                for shape in model.kv_layout.token_shapes
            )
            for _ in range(model.kv_layout.layers)
        ]

    def step(self, tokens: Mapping[int, Sequence[int]]) -> dict[int, torch.Tensor]:
        """Compute the next tokens of some rows in one step: (count, vocab) logits by row."""
        order = _order(tokens)
        logits = self.model.logits(self.model.forward(self.batch(tokens), self.caches))
        results = logits.split([len(tokens[row]) for row in order])  # type: ignore[no-untyped-call]
        return dict(zip(order, results, strict=True))

    def batch(self, tokens: Mapping[int, Sequence[int]]) -> Batch:
        """The step that computes these next tokens, rows of one token first; the rows grow by them."""
        order = _order(tokens)
        device = self.model.embedding.device
        positions, slots, starts = [], [], [0]
        for row in order:
            for position in range(self.lengths[row], self.lengths[row] + len(tokens[row])):
                positions.append(position)
                block, offset = divmod(position, self.block_size)
                slots.append(self.tables[row][block] * self.block_size + offset)
            self.lengths[row] += len(tokens[row])
            starts.append(len(positions))
        contexts = [self.lengths[row] for row in order]
        widest = -(-max(contexts) // self.block_size)
        return Batch(
            token_ids=torch.tensor([token for row in order for token in tokens[row]], device=device),
            positions=torch.tensor(positions, device=device),
            cache_slots=torch.tensor(slots, device=device),
            query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
            context_lengths=torch.tensor(contexts, dtype=torch.int32, device=device),
            block_tables=torch.tensor([self._table(row, widest) for row in order], dtype=torch.int32, device=device),
            decode_rows=sum(len(tokens[row]) == 1 for row in order),
            longest_query=max(len(tokens[row]) for row in order),
            longest_context=max(contexts),
        )

    def _table(self, row: int, widest: int) -> list[int]:
        used = -(-self.lengths[row] // self.block_size)
        return self.tables[row][:used] + [0] * (widest - used)


def _order(tokens: Mapping[int, Sequence[int]]) -> list[int]:
    return sorted(tokens, key=lambda row: len(tokens[row]) > 1)
