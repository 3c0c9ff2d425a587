"""Whole sequences through a loaded model in one step, without a scheduler: for checks and measurements."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engines.generation import kv_cache
from engines.generation.transfer import to_device
from engines.models.batch import Batch, LayerCache
from engines.models.model import Model


class WholePrompts:
    """Holds KV memory for as many tokens as the largest call had; each call begins with empty contexts."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype) -> None:
        """``dtype`` is the KV cache's."""
        self._model = model
        self._device = device
        self._dtype = dtype
        self._blocks = 0
        self._caches: list[LayerCache] = []

    def hidden(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """The residual stream after the last layer, (all tokens, hidden), sequences one after the other.

        ``Model.logits`` makes next-token logits of any of its rows. No sequence may be empty.
        """
        batch, blocks = _batch(sequences, self._device)
        if blocks > self._blocks:
            self._blocks = blocks
            self._caches = []  # the old ones go before the new ones are taken
            self._caches = kv_cache.allocate(
                self._model.kv_layout, blocks, kv_cache.BLOCK_SIZE, self._dtype, self._device
            )
        return self._model.forward(batch, self._caches)

    def last_logprobs(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """Log probabilities of what follows each sequence, (sequences, vocab) float32."""
        last = torch.tensor([len(sequence) for sequence in sequences], device=self._device).cumsum(0) - 1
        return self._model.logits(self.hidden(sequences).index_select(0, last)).log_softmax(-1)


def _batch(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Batch, int]:
    """The step, and the blocks that it takes: those of each sequence one after the other, none shared."""
    size = kv_cache.BLOCK_SIZE
    counts = np.array([len(sequence) for sequence in sequences], np.int64)
    widths = -(-counts // size)
    firsts = np.cumsum(widths) - widths
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1], counts)
    tables = firsts[:, None] + np.minimum(np.arange(widths.max()), widths[:, None] - 1)
    moved = to_device(
        [
            np.concatenate([np.asarray(sequence, np.int64) for sequence in sequences]),
            positions,
            positions + np.repeat(firsts * size, counts),
            starts.astype(np.int32),
            counts.astype(np.int32),
            np.ascontiguousarray(tables, np.int32),
        ],
        device,
    )
    batch = Batch(
        token_ids=moved[0],
        positions=moved[1],
        cache_slots=moved[2],
        query_starts=moved[3],
        context_lengths=moved[4],
        block_tables=moved[5],
        decode_rows=int((counts == 1).cumprod().sum()),
        longest_query=int(counts.max()),
        longest_context=int(counts.max()),
    )
    return batch, int(widths.sum())
