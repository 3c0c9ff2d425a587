"""The model's part of a step as CUDA graphs, one for each of some sizes, captured one at a time between steps.

A graph of decodes goes from the rows to their logits; a graph of tokens (prompts, with or without decodes) to the
hidden states. Both read what differs from step to step out of the ``DeviceState`` and the static inputs here, and a
step that is smaller than its graph fills it up with padding. All graphs share one memory pool: they run one after the
other, and what one leaves behind is read before the next one runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engines.generation.device_state import DeviceState
from engines.generation.launched import timestamp
from engines.kernels.cuda.steps import prepare_tokens
from engines.models.batch import Batch, LayerCache
from engines.models.model import Model
from engines.protocol import Capacity

ROW_SIZES = (1, 2, 4, 8, *range(16, 64, 8), *range(64, 257, 16))
TOKEN_SIZES = (16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1152, 1280, 1536, 1792, 2048)
LATENT_TOKENS = 64
DEVICE_PER_HOST = 2.0
"""A step gains by a graph where the device takes less than so many times what the host takes to launch it. A longer one
is better off without: it is not filled up with padding, and its last layer computes what is read alone."""
GRAPH_BYTES = 4 << 20
"""Roughly what the driver takes for one graph beside the memory that its kernels use."""

_log = logging.getLogger(__name__)


def row_sizes(max_rows: int) -> list[int]:
    """Rows that steps of decodes are filled up to, ascending."""
    return sorted({size for size in ROW_SIZES if size <= max_rows} | {max_rows})


@dataclass(frozen=True, slots=True)
class GraphSize:
    """Rows of a graph of decodes, or flat tokens of any other."""

    count: int
    decodes: bool


class _Shared:
    """What all captures of one runner use, made at the first one."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()


class CapturedSteps:
    """Graphs of one runner. One thread captures and replays; ``rows`` and ``tokens`` may be read from any."""

    def __init__(
        self, model: Model, caches: list[LayerCache], state: DeviceState, capacity: Capacity, memory: int
    ) -> None:
        """``memory``: bytes that graphs may take beside the static inputs and outputs."""
        self._model = model
        self._caches = caches
        self._state = state
        self._capacity = capacity
        self._left = memory
        device = state.tokens.device
        rows = row_sizes(capacity.max_rows)
        tokens = [size for size in TOKEN_SIZES if size <= min(capacity.max_step_tokens, _longest(model))]
        self._pending = [GraphSize(size, True) for size in rows] + [GraphSize(size, False) for size in tokens]
        self._wanted: dict[GraphSize, int] = {}
        self._graphs: dict[GraphSize, torch.cuda.CUDAGraph] = {}
        self.rows: tuple[int, ...] = ()
        """Sizes of captured graphs of decodes, ascending; so ``tokens`` of the others."""
        self.tokens: tuple[int, ...] = ()
        widest = max(rows[-1], tokens[-1] if tokens else 1)
        self._inputs = tuple(torch.zeros(widest, dtype=torch.int64, device=device) for _ in range(3))
        self._logits = torch.empty((rows[-1], model.vocab_size), dtype=torch.float32, device=device)
        shape = (tokens[-1] if tokens else 1, model.embedding.shape[1])
        self._hidden = torch.empty(shape, dtype=model.embedding.dtype, device=device)
        self._shared: _Shared | None = None
        self._longest_gain: float | None = None

    @staticmethod
    def static_bytes(max_rows: int, max_step_tokens: int, vocab: int, hidden: int, itemsize: int) -> int:
        """Of the inputs and outputs that the graphs share."""
        tokens = min(TOKEN_SIZES[-1], max_step_tokens)
        return 4 * max_rows * vocab + tokens * (hidden * itemsize + 24)

    # --- replay

    def logits(self, rows: int) -> torch.Tensor:
        """Run the decodes of ``rows`` rows, a captured size: (rows, vocab) float32, valid until the next graph runs."""
        self._graphs[GraphSize(rows, True)].replay()
        return self._logits[:rows]

    def hidden(self, tokens: int) -> torch.Tensor:
        """Run any step of up to ``tokens`` flat tokens, a captured size: (tokens, hidden), valid as long."""
        self._graphs[GraphSize(tokens, False)].replay()
        return self._hidden[:tokens]

    # --- capture

    def rehearse(self) -> None:
        """Run the steps of all sizes in about the order of their capture, on the meta device: see ``rehearsal``."""
        for size in sorted(self._pending, key=lambda size: size.count, reverse=True):
            self._step_of(size)()

    def missed(self, count: int, decodes: bool) -> None:
        """A step of this size ran without a graph: its size is captured before others that were missed less."""
        fitting = (size for size in self._pending if size.decodes == decodes and size.count >= count)
        size = min(fitting, key=lambda one: one.count, default=None)
        if size is not None:
            self._wanted[size] = self._wanted.get(size, 0) + 1

    @torch.inference_mode()
    def capture_next(self) -> bool:
        """Capture one more graph; False when none is left to capture. Takes some tens of milliseconds."""
        if not self._pending:
            return False
        size = self._next()
        self._pending.remove(size)
        # All rows are padding: what runs before the capture writes nothing.
        self._state.clear_rows()
        if not size.decodes:
            if self._longest_gain is None:
                self._longest_gain = self._longest_gaining(size)
            if size.count > self._longest_gain:
                # Libraries load a kernel when it is first launched, and the device stands still meanwhile.
                self._step_of(size)()
                return bool(self._pending)
        before = torch.cuda.memory_reserved()
        self._graphs[size] = self._capture(self._step_of(size))
        taken = torch.cuda.memory_reserved() - before + GRAPH_BYTES
        if taken > self._left:
            del self._graphs[size]
            larger = [other for other in self._pending if other.decodes == size.decodes and other.count > size.count]
            self._pending = [other for other in self._pending if other not in larger]
            _log.warning("no CUDA graph of %s: it takes %d MiB, %d MiB are left", size, taken >> 20, self._left >> 20)
        else:
            self._left -= taken
            self._publish()
        return bool(self._pending)

    def _next(self) -> GraphSize:
        """The largest of each kind first, because the others then fit in its memory; then what was missed most."""
        for decodes in (True, False):
            if not any(size.decodes == decodes for size in self._graphs):
                sizes = [size for size in self._pending if size.decodes == decodes]
                if sizes:
                    return max(sizes, key=lambda size: size.count)
        return max(self._pending, key=lambda size: self._wanted.get(size, 0))

    def _longest_gaining(self, size: GraphSize) -> float:
        """Tokens of the longest step that gains by a graph, after the times of one of this size, the longest of all."""
        step = self._step_of(size)
        step()
        torch.cuda.synchronize()
        begin, started = timestamp(), time.perf_counter()
        step()
        host = time.perf_counter() - started
        end = timestamp()
        end.synchronize()
        device: float = begin.elapsed_time(end) / 1000
        return size.count * DEVICE_PER_HOST * host / device

    def _publish(self) -> None:
        self.rows = tuple(sorted(size.count for size in self._graphs if size.decodes))
        self.tokens = tuple(sorted(size.count for size in self._graphs if not size.decodes))

    def _capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        # Compiles kernels and lets libraries set up what they may not while a graph is captured.
        step()
        shared = self._shared = self._shared or _Shared(self._logits.device)
        current = torch.cuda.current_stream()
        shared.stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(shared.stream):
            # The other threads go on waiting for events meanwhile.
            graph.capture_begin(pool=shared.pool, capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        current.wait_stream(shared.stream)
        return graph

    def _step_of(self, size: GraphSize) -> Callable[[], None]:
        rows = size.count if size.decodes else self._capacity.max_rows
        state = self._state
        token_ids, positions, cache_slots = (values[: size.count] for values in self._inputs)
        batch = Batch(
            token_ids=token_ids,
            positions=positions,
            cache_slots=cache_slots,
            query_starts=state.query_starts[: rows + 1],
            context_lengths=state.context_lengths[:rows],
            block_tables=state.tables,
            decode_rows=rows if size.decodes else None,
            longest_query=1 if size.decodes else size.count,
            longest_context=self._capacity.max_model_len,
            table_rows=state.slots[:rows],
        )

        def step() -> None:
            prepare(batch, state, self._capacity.block_size)
            hidden = self._model.forward(batch, self._caches)
            if size.decodes:
                self._model.logits(hidden, self._logits[: size.count])
            else:
                self._hidden[: size.count].copy_(hidden)

        return step


def _longest(model: Model) -> int:
    """Most tokens of a graph. Without numbers on the host, latent attention computes prompts in its absorbed form,
    which takes several times the work of the other one: that is worth it for few tokens only."""
    latent = len(model.kv_layout.token_shapes) == 1
    return LATENT_TOKENS if latent else TOKEN_SIZES[-1]


def prepare(batch: Batch, state: DeviceState, block_size: int) -> None:
    """Fill in the batch's ids, positions and cache slots from its rows."""
    if batch.table_rows is None:
        raise ValueError("a step on a GPU names its rows' slots")
    prepare_tokens(
        (batch.query_starts, batch.context_lengths, batch.table_rows),
        state.tokens,
        state.tables,
        (batch.token_ids, batch.positions, batch.cache_slots),
        block_size,
    )
