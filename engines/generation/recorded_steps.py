"""Steps of decodes on the CPU, recorded: all layers' native calls run as one."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch

from engines.generation.threads import available_cores
from engines.kernels.native import Arena, Tape, Watch, shared_native
from engines.models.batch import Batch, LayerCache
from engines.models.model import Model
from engines.protocol import Capacity

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A step of some number of rows."""

    tape: Tape
    batch: Batch
    """What the tape reads: views of ``RecordedSteps``' memory."""
    embedded: torch.Tensor
    hidden: torch.Tensor
    """What it writes."""


class RecordedSteps:
    """The layers of steps in which every row decodes. The first step of each number of rows is recorded.

    Only a model whose layers are native calls alone can be: the first other operation ends the attempts. What a step
    computes is the same bits either way.
    """

    def __init__(self, model: Model, caches: list[LayerCache], capacity: Capacity) -> None:
        self._model, self._caches = model, caches
        self._native = shared_native()
        rows, blocks = capacity.max_rows, -(-capacity.max_model_len // capacity.block_size)
        self._threads = max(available_cores(), torch.get_num_threads())
        self._arena = Arena(rows)
        self._by_rows: dict[int, _Recorded] = {}
        self._batch = Batch(
            token_ids=torch.zeros(rows, dtype=torch.int64),
            positions=torch.zeros(rows, dtype=torch.int64),
            cache_slots=torch.zeros(rows, dtype=torch.int64),
            query_starts=torch.arange(rows + 1, dtype=torch.int32),
            context_lengths=torch.zeros(rows, dtype=torch.int32),
            block_tables=torch.zeros((rows, blocks), dtype=torch.int32),
            decode_rows=rows,
            longest_query=1,
            longest_context=capacity.max_model_len,
        )
        self._embedded = torch.zeros(rows, model.embedding.shape[1], dtype=model.embedding.dtype)

    @property
    def rows(self) -> set[int]:
        """Of the steps that were recorded so far."""
        return set(self._by_rows)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor | None:
        """As ``Model.forward``, valid until the next call; None where this step cannot be one of those recorded."""
        rows = batch.context_lengths.shape[0]
        if self._native is None or batch.decode_rows != rows or rows > self._embedded.shape[0]:
            return None
        recorded = self._by_rows.get(rows)
        if recorded is None:
            return self._record(rows, batch)
        self._fill(recorded.batch, recorded.embedded, batch)
        recorded.tape.run()
        return recorded.hidden

    def _fill(self, to: Batch, embedded: torch.Tensor, batch: Batch) -> None:
        embedded.copy_(self._model.embedding(batch.token_ids))
        to.positions.copy_(batch.positions)
        to.cache_slots.copy_(batch.cache_slots)
        to.context_lengths.copy_(batch.context_lengths)
        to.block_tables[:, : batch.block_tables.shape[1]].copy_(batch.block_tables)

    def _record(self, rows: int, batch: Batch) -> torch.Tensor | None:
        assert self._native is not None
        own = replace(
            self._batch,
            token_ids=self._batch.token_ids[:rows],
            positions=self._batch.positions[:rows],
            cache_slots=self._batch.cache_slots[:rows],
            query_starts=self._batch.query_starts[: rows + 1],
            context_lengths=self._batch.context_lengths[:rows],
            block_tables=self._batch.block_tables[:rows],
            decode_rows=rows,
        )
        embedded = self._embedded[:rows]
        self._fill(own, embedded, batch)
        watch = Watch()
        with watch, self._native.recording(self._threads, self._arena) as tape:
            hidden = self._model.through_layers(embedded, own, self._caches)
        if watch.foreign is not None or not tape.complete:
            _log.debug("steps are not recorded: %s", watch.foreign or "no memory")
            self._native = None
        else:
            self._by_rows[rows] = _Recorded(tape, own, embedded, hidden)
        return hidden
