"""Runs one step on a GPU with Triton kernels: the host sends what changed, the device does the rest.

Needs Triton; ``runner.StepRunner`` serves every other device.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engines.generation.captured_steps import CapturedSteps, prepare, row_sizes
from engines.generation.device_state import DeviceState, Words
from engines.generation.launched import LaunchedStep, score_prompts, timestamp
from engines.generation.logit_edits import apply_edits
from engines.generation.logprobs import normalized, score
from engines.generation.rows import RowStates
from engines.generation.step_inputs import Integers, edits_of, leading_ones, prompt_scorings
from engines.generation.transfer import reserve_pinned, to_device, to_host
from engines.kernels.cuda.launch import Launcher
from engines.kernels.cuda.sampling import draw_rows
from engines.kernels.cuda.truncation import Truncates
from engines.models.batch import FEWEST_SPARED, Batch, LastTokens, LayerCache
from engines.models.model import Model
from engines.protocol import Capacity, Row, StepPlan

MULTIPLE = 64
"""What the tokens of a step without a graph are filled up to a multiple of, if it has more: see ``_Rows.ending``."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a step on the host, (R,) each."""

    slots: Integers
    counts: Integers
    ends: Integers
    """Tokens in the cache once the step has run: the place of the token that a row draws."""
    query_starts: Integers
    """(R+1,)."""
    drawing: Integers
    """(S,) rows that draw."""
    decodes: int
    """So many rows come first that compute one token."""

    @property
    def tokens(self) -> int:
        return int(self.query_starts[-1])

    @property
    def all_decode(self) -> bool:
        return len(self.drawing) == len(self.slots) == self.decodes

    def ending(self, sizes: Sequence[int]) -> Integers:
        """Rows whose last tokens the last layer computes, where it computes no others: the drawing ones, or any one.

        Repeated up to the next of ``sizes``: each number of rows would have library kernels of its own, and the
        device stands still while one is loaded.
        """
        rows = self.drawing if len(self.drawing) else np.array([len(self.slots) - 1], np.int64)
        return np.pad(rows, (0, sizes[bisect_left(sizes, len(rows))] - len(rows)), mode="edge")


def _read(rows: Sequence[Row]) -> _Rows:
    counts = np.array([row.count for row in rows], np.int64)
    query_starts = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(counts, out=query_starts[1:])
    return _Rows(
        slots=np.array([row.slot for row in rows], np.int64),
        counts=counts,
        ends=np.array([row.start + row.count for row in rows], np.int64),
        query_starts=query_starts,
        drawing=np.flatnonzero([row.max_new for row in rows]),
        decodes=leading_ones(counts),
    )


class GpuStepRunner:
    """Enqueues plans on the current stream, in the order in which they are given. One thread only."""

    def __init__(
        self,
        model: Model,
        caches: list[LayerCache],
        capacity: Capacity,
        device: torch.device,
        clock: Callable[[], float],
        graph_memory: int,
    ) -> None:
        """``graph_memory``: bytes that captured graphs may take; 0 captures none."""
        self._model = model
        self._caches = caches
        self._capacity = capacity
        self._row_sizes = row_sizes(capacity.max_rows)
        self._device = device
        self._clock = clock
        if device.type == "cuda":
            reserve_pinned()
        self._state = DeviceState(capacity, device)
        self._states = RowStates(capacity, model.vocab_size, device, self._state)
        self._counts = torch.zeros((capacity.max_rows, model.vocab_size), dtype=torch.int32, device=device)
        self.captured = CapturedSteps(model, caches, self._state, capacity, graph_memory) if graph_memory else None

    @staticmethod
    def state_bytes(model: Model, max_rows: int, max_step_tokens: int, max_model_len: int, block_size: int) -> int:
        """Bytes that a runner takes for itself, beside its graphs."""
        vocab, hidden, itemsize = model.vocab_size, model.embedding.shape[1], model.embedding.itemsize
        graphs = CapturedSteps.static_bytes(max_rows, max_step_tokens, vocab, hidden, itemsize)
        return DeviceState.bytes(max_rows, max_model_len, block_size) + 4 * max_rows * vocab + graphs

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> LaunchedStep:
        """Enqueue the step without waiting for anything."""
        started, begin, launches = self._clock(), timestamp(), Launcher.first_launches
        for admit in plan.admits:
            self._states.admit(admit)
        if plan.rows:
            self._states.extend(plan.rows)
            rows = _read(plan.rows)
            bound = plan.graph_rows or (self._capacity.max_rows if plan.graph_tokens else len(plan.rows))
            self._send(rows, bound)
            launched = self._compute(plan, rows)
        else:
            self._state.flush()
            launched = LaunchedStep(plan.step, (), np.zeros(0, np.int64), None, None)
        launched.events = (begin, timestamp())
        launched.seconds = self._clock() - started
        launched.irregular = "compile" if Launcher.first_launches > launches else ""
        return launched

    @torch.inference_mode()
    def rehearse(self, rows: Sequence[Row], truncates: Truncates) -> None:
        """Launch what an eager step of these rows launches on the device, on the meta device: see ``rehearsal``."""
        step = _read(rows)
        logits = self._logits(step, *self._eager(step, whole=False))
        if logits is not None:
            self._drawn(step, logits, truncates)

    def _send(self, rows: _Rows, bound: int) -> None:
        """All changes and the step's rows, filled up to ``bound``."""
        padding = bound - len(rows.slots)
        self._state.write_rows(
            np.pad(rows.query_starts.astype(np.int32), (0, padding), mode="edge"),
            np.pad(rows.ends.astype(np.int32), (0, padding)),
            np.pad(rows.slots.astype(np.int32), (0, padding)),
        )
        if not rows.all_decode:
            ending = rows.ending(self._row_sizes)
            last: Words = (rows.query_starts[1:][ending] - 1).astype(np.int32)
            self._state.write_draws(rows.slots[ending].astype(np.int32), rows.ends[ending].astype(np.int32), last)
        self._state.flush()

    def _compute(self, plan: StepPlan, rows: _Rows) -> LaunchedStep:
        launched = LaunchedStep(plan.step, plan.rows, rows.drawing, None, None)
        if plan.graph_rows and self.captured is not None:
            self._draw(launched, rows, self.captured.logits(plan.graph_rows)[: len(plan.rows)])
            return launched
        prompts = prompt_scorings(plan.rows, self._states, rows.slots, rows.query_starts)
        hidden, picked = self._hidden(plan, rows, whole=bool(prompts))
        logits = self._logits(rows, hidden, picked)
        if logits is not None:
            self._draw(launched, rows, logits)
        launched.prompts = score_prompts(prompts, hidden, self._state.tokens, self._model.logits)
        return launched

    def _hidden(self, plan: StepPlan, rows: _Rows, whole: bool) -> tuple[torch.Tensor, bool]:
        """States of all tokens, or True and those of ``rows.ending`` alone, which is not done if ``whole``."""
        if self.captured is not None:
            if plan.graph_tokens:
                return self.captured.hidden(plan.graph_tokens), False
            self.captured.missed(rows.tokens, rows.all_decode)
        return self._eager(rows, whole)

    def _eager(self, rows: _Rows, whole: bool) -> tuple[torch.Tensor, bool]:
        batch = self._batch(rows)
        prepare(batch, self._state, self._capacity.block_size)
        last = None if whole or rows.all_decode else self._last(rows, batch)
        return self._model.forward(batch, self._caches, last), last is not None

    def _last(self, rows: _Rows, batch: Batch) -> LastTokens | None:
        count, state = len(rows.ending(self._row_sizes)), self._state
        if count * FEWEST_SPARED > rows.tokens:
            return None
        tokens, lengths, slots = (part[:count] for part in (state.draw_tokens, state.draw_places, state.draw_slots))
        return LastTokens.of(batch, tokens, lengths, state.tables, slots)

    def _batch(self, rows: _Rows) -> Batch:
        """Inputs of exactly these rows."""
        count, state = len(rows.slots), self._state
        # As in a graph, what comes behind the last row is padding.
        multiple = MULTIPLE if rows.tokens > MULTIPLE and not rows.all_decode else 2
        inputs = torch.empty((3, -(-rows.tokens // multiple) * multiple), dtype=torch.int64, device=self._device)
        token_ids, positions, cache_slots = inputs if multiple == MULTIPLE else inputs[:, : rows.tokens]
        return Batch(
            token_ids=token_ids,
            positions=positions,
            cache_slots=cache_slots,
            query_starts=state.query_starts[: count + 1],
            context_lengths=state.context_lengths[:count],
            block_tables=state.tables,
            decode_rows=rows.decodes,
            longest_query=int(rows.counts.max()),
            longest_context=int(rows.ends.max()),
            table_rows=state.slots[:count],
            prompt_blocks=int((-(-rows.ends[rows.decodes :] // self._capacity.block_size)).sum()),
        )

    def _logits(self, rows: _Rows, hidden: torch.Tensor, picked: bool) -> torch.Tensor | None:
        if not len(rows.drawing):
            return None
        if not rows.all_decode and not picked:
            hidden = hidden.index_select(0, self._state.draw_tokens[: len(rows.ending(self._row_sizes))])
        return self._model.logits(hidden)[: len(rows.drawing)]

    def _draw(self, launched: LaunchedStep, rows: _Rows, logits: torch.Tensor) -> None:
        state = self._state
        host_slots = rows.slots[rows.drawing]
        particular = bool(self._states.particular[host_slots].any())
        raw, scored = None, np.zeros(0, np.int64)
        if particular:
            scored = np.flatnonzero(self._states.logprobs[host_slots] >= 0)
            if scored.size:
                (scored_rows,) = to_device((scored,), self._device)
                # The raw distribution is taken before the edits change the logits in place.
                raw = normalized(logits.index_select(0, scored_rows))
            apply_edits(logits, edits_of(self._states, host_slots, rows.ends[rows.drawing]), state.tokens, self._counts)
        drawn = self._drawn(rows, logits, self._truncates(host_slots))
        launched.drawn = to_host(drawn)
        if raw is not None:
            widths = self._states.logprobs[host_slots[scored]].tolist()
            launched.scored = score(raw, drawn[scored_rows], max(widths)).map(to_host)
            launched.scored_rows = rows.drawing[scored].tolist()
            launched.scored_widths = widths

    def _drawn(self, rows: _Rows, logits: torch.Tensor, truncates: Truncates) -> torch.Tensor:
        """(S,) int64: a token of each row that draws, which also goes into its sequence."""
        state, count = self._state, len(rows.drawing)
        slots, places = (
            (state.slots, state.context_lengths) if rows.all_decode else (state.draw_slots, state.draw_places)
        )
        drawn = torch.empty(count, dtype=torch.int64, device=self._device)
        draw_rows(logits, slots[:count], places[:count], state.parameters, state.tokens, drawn, truncates)
        return drawn

    def _truncates(self, slots: Integers) -> Truncates:
        states = self._states
        return Truncates(
            top_k=bool((states.top_k[slots] > 0).any()),
            top_p=bool((states.top_p[slots] < 1).any()),
            min_p=bool((states.min_p[slots] > 0).any()),
        )
