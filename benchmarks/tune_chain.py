"""A model of few layers whose decode steps are timed: the real layers, attention and head, over real paged caches."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.model_configs import MODEL_LEN, config_folder
from benchmarks.tune_descent import Assignment, table_of
from engines.generation import kv_cache
from engines.generation.captured_steps import prepare
from engines.generation.device_state import DeviceState
from engines.kernels.cuda.skinny import choose_from
from engines.kernels.cuda.tuning import MOST_ROWS, SkinnyConfig, SkinnyShape, Table
from engines.manifest import read_manifest
from engines.models.batch import Batch
from engines.models.config import DeepseekConfig, ModelConfig, parse_config
from engines.models.loader import build_model
from engines.models.model import Model
from engines.models.weights import CountingSource, Placement, RandomSource, ShapeSource
from engines.protocol import Capacity
from engines.quant.base import Split

DTYPE = torch.bfloat16
SEED = 0
LAYER_BYTES = 700_000_000
"""Of all layers together: so much that no cache keeps a part of it until the next step."""
LEAST_LAYERS = 4
CONTEXT, CONTEXT_ALONE = 576, 192
"""Tokens of each row, and of a row alone."""
REPLAYS, FIRST_REPLAYS, TURNS = 16, 5, 24
HOPELESS = 1.015
"""What takes so many times the limit in the first replays is not looked at more closely."""
KEPT_GRAPHS = 4


class WidenedSource(RandomSource):
    """The numbers that a RandomSource makes in bfloat16, in float32."""

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        split: Split,
        dtype: torch.dtype | None = None,
        invented: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return super().take(name, shape, split, dtype or DTYPE, invented).float()


@functools.cache
def model_config(name: str) -> ModelConfig:
    """Of ``benchmarks.model_configs``, whole."""
    with tempfile.TemporaryDirectory() as folder:
        return parse_config(read_manifest(config_folder(Path(folder), name), random_weights=True))


def least_layers(config: ModelConfig) -> int:
    """With these there is one layer of each kind, and one that is not the last."""
    return 2 + (config.moe.dense_layers if isinstance(config, DeepseekConfig) else 0)


def checked_layers(config: ModelConfig) -> int:
    """With these all kinds of linear layers are there; experts, which do not run in float32 on a GPU, are not."""
    return config.moe.dense_layers if isinstance(config, DeepseekConfig) else 2


def chain_layers(config: ModelConfig) -> int:
    """How many are timed."""

    def size(layers: int) -> int:
        source = CountingSource(Placement(device=torch.device("meta"), dtype=DTYPE))
        return build_model(dataclasses.replace(config, layers=layers), source, 1).weight_bytes

    least = least_layers(config)
    each = size(least + 1) - size(least)
    return min(config.layers, max(LEAST_LAYERS, -(-LAYER_BYTES // each)))


def _source(placement: Placement) -> ShapeSource | RandomSource:
    if placement.device.type == "meta":
        return ShapeSource(placement)
    return RandomSource(placement, SEED) if placement.dtype is DTYPE else WidenedSource(placement, SEED)


class Chain:
    """Steps of one token in each of some rows, on a GPU or the meta device."""

    def __init__(
        self,
        config: ModelConfig,
        layers: int,
        device: torch.device,
        dtype: torch.dtype = DTYPE,
        most_rows: int = MOST_ROWS,
    ) -> None:
        """In float32 the weights are the same numbers."""
        placement = Placement(device=device, dtype=dtype)
        self.model = build_model(dataclasses.replace(config, layers=layers), _source(placement), MODEL_LEN, True)
        size = kv_cache.BLOCK_SIZE
        each = -(-CONTEXT // size)
        self.caches = kv_cache.allocate(self.model.kv_layout, most_rows * each, size, dtype, device)
        for tensors in self.caches:
            for tensor in tensors:
                tensor.normal_()
        capacity = Capacity(
            blocks=most_rows * each,
            block_size=size,
            max_rows=most_rows,
            max_step_tokens=most_rows,
            max_model_len=MODEL_LEN,
        )
        self.state = DeviceState(capacity, device)
        self.state.tokens.random_(0, self.model.vocab_size)
        blocks = torch.randperm(most_rows * each).view(most_rows, each)
        self.state.tables[:, :each].copy_(blocks)
        self._inputs = tuple(torch.zeros(most_rows, dtype=torch.int64, device=device) for _ in range(3))
        self.device, self.most_rows = device, most_rows
        self.hidden = self.logits = torch.empty(0, device=device)

    def set_rows(self, rows: int, context: int) -> None:
        """The next steps have so many rows, each of ``context`` tokens with the new one."""
        state, count = self.state, rows + 1
        state.query_starts[:count].copy_(torch.arange(count, dtype=torch.int32))
        state.slots[:rows].copy_(torch.arange(rows, dtype=torch.int32))
        state.context_lengths[:rows].fill_(context)

    def step(self, rows: int, model: Model | None = None) -> Callable[[], None]:
        """What a captured step of so many decodes runs; ``hidden`` and ``logits`` are its results."""
        state, model, caches = self.state, model or self.model, self.caches
        token_ids, positions, cache_slots = (values[:rows] for values in self._inputs)
        batch = Batch(
            token_ids=token_ids,
            positions=positions,
            cache_slots=cache_slots,
            query_starts=state.query_starts[: rows + 1],
            context_lengths=state.context_lengths[:rows],
            block_tables=state.tables,
            decode_rows=rows,
            longest_query=1,
            longest_context=MODEL_LEN,
            table_rows=state.slots[:rows],
        )

        def run() -> None:
            prepare(batch, state, kv_cache.BLOCK_SIZE)
            self.hidden = model.forward(batch, caches[: len(model.layers)])
            self.logits = model.logits(self.hidden)

        return run


class SeenTable(Table):
    """A table that notes which layers ask."""

    def __init__(self, entries: dict[str, dict[str, list[int] | None]]) -> None:
        super().__init__(entries)
        self.shapes: dict[SkinnyShape, None] = {}

    def find(self, shape: SkinnyShape, rows: int) -> tuple[bool, SkinnyConfig | None]:
        self.shapes[shape] = None
        return super().find(shape, rows)


def shapes_of(step: Callable[[], None], entries: dict[str, dict[str, list[int] | None]]) -> list[SkinnyShape]:
    """Of the linear layers that the step asks a configuration for, in order. Runs it with the table's ``entries``.

    Whether a layer's norm is inside depends on what runs before it. A table finds an entry either way, so a layer that
    was seen without is not looked at with it.
    """
    seen = SeenTable(entries)
    choose_from(seen)
    try:
        with torch.inference_mode():
            step()
    finally:
        choose_from(None)
    return [
        shape for shape in seen.shapes if not (shape.norm and dataclasses.replace(shape, norm=False) in seen.shapes)
    ]


class StepTimer:
    """Times steps of one number of rows inside CUDA graphs. Implements ``tune_descent.Timer``."""

    def __init__(self, chain: Chain, rows: int) -> None:
        self._chain, self._rows = chain, rows
        self._run = chain.step(rows)
        self._graphs: dict[tuple[tuple[SkinnyShape, SkinnyConfig | None], ...], torch.cuda.CUDAGraph] = {}
        captures = _captures()
        self._stream, self._pool = captures.stream, captures.pool
        self._events = [
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(4 * TURNS)
        ]
        chain.set_rows(rows, CONTEXT_ALONE if rows == 1 else CONTEXT)
        torch.cuda.synchronize()

    def measure(self, assignment: Assignment, limit: float) -> float:
        graph = self._graph(assignment)
        first = statistics.median(self._replay([graph] * FIRST_REPLAYS))
        if first > HOPELESS * limit:
            return first
        return statistics.median(self._replay([graph] * REPLAYS))

    def compare(self, first: Assignment, second: Assignment) -> tuple[float, float]:
        times = self._replay([self._graph(first), self._graph(second)] * TURNS)
        return statistics.median(times[::2]), statistics.median(times[1::2])

    def _replay(self, graphs: list[torch.cuda.CUDAGraph]) -> list[float]:
        """Microseconds of each, one behind the other."""
        pairs = list(zip(self._events[::2], self._events[1::2], strict=True))[: len(graphs)]
        with torch.cuda.stream(self._stream):
            graphs[0].replay()
            for graph, (begin, end) in zip(graphs, pairs, strict=True):
                begin.record(self._stream)
                graph.replay()
                end.record(self._stream)
        self._stream.synchronize()
        return [1000 * float(begin.elapsed_time(end)) for begin, end in pairs]

    def _graph(self, assignment: Assignment) -> torch.cuda.CUDAGraph:
        key = tuple(assignment.items())
        if (known := self._graphs.pop(key, None)) is None:
            known = self._capture(assignment)
        self._graphs[key] = known  # the last ones used are kept
        while len(self._graphs) > KEPT_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        return known

    @torch.inference_mode()
    def _capture(self, assignment: Assignment) -> torch.cuda.CUDAGraph:
        choose_from(table_of(assignment, self._rows))
        with torch.cuda.stream(self._stream):
            # Loads kernels, and lets libraries set up what they may not while a graph is captured.
            self._run()
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                self._run()
            finally:
                graph.capture_end()
        return graph


class _Captures:
    """Stream and memory that all captures share."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()
        # A pool whose last graph is gone cannot be captured into again.
        self._anchor = torch.cuda.CUDAGraph()
        number = torch.zeros(1, device="cuda")
        with torch.cuda.stream(self.stream):
            self._anchor.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            number.add_(1)
            self._anchor.capture_end()


@functools.cache
def _captures() -> _Captures:
    return _Captures()
