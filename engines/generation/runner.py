"""Runs one step in plain torch calls: plan in, drawn tokens on their way to the host out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from engines.generation.launched import LaunchedStep, score_prompts, timestamp
from engines.generation.logit_edits import apply_edits
from engines.generation.logprobs import normalized, score
from engines.generation.recorded_steps import RecordedSteps
from engines.generation.rows import RowStates
from engines.generation.sampler import draw
from engines.generation.step_inputs import Drawing, StepInputs, build_inputs
from engines.generation.threads import ThreadGovernor
from engines.generation.transfer import to_host
from engines.models.batch import LayerCache
from engines.models.model import Model
from engines.protocol import Capacity, StepPlan


class StepRunner:
    """Computes plans in the order in which they are given. One thread only."""

    def __init__(
        self,
        model: Model,
        caches: list[LayerCache],
        capacity: Capacity,
        device: torch.device,
        clock: Callable[[], float],
        governor: ThreadGovernor | None = None,
    ) -> None:
        """``governor`` may change the thread count between steps."""
        self._model = model
        self._caches = caches
        self._clock = clock
        self._device = device
        self._governor = governor
        self.captured: None = None
        self._states = RowStates(capacity, model.vocab_size, device)
        self._counts = torch.zeros((capacity.max_rows, model.vocab_size), dtype=torch.int32, device=device)
        self._recorded = RecordedSteps(model, caches, capacity) if device.type == "cpu" else None

    @staticmethod
    def state_bytes(max_rows: int, max_model_len: int, vocab: int) -> int:
        """Bytes that a runner takes for itself, roughly: sequences and the scratch of the penalties."""
        return 4 * max_rows * (max_model_len + vocab)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> LaunchedStep:
        """Compute the step on the CPU, or enqueue it on the GPU's current stream without waiting for it."""
        tokens = sum(row.count for row in plan.rows)
        if self._governor is not None and tokens:
            self._governor.prepare(tokens)
        started, begin = self._clock(), self._record()
        for admit in plan.admits:
            self._states.admit(admit)
        if not plan.rows:
            empty = LaunchedStep(plan.step, (), np.zeros(0, np.int64), None, None)
            return self._finish(empty, started, begin)
        self._states.extend(plan.rows)
        inputs = build_inputs(plan.rows, self._states)
        hidden = None if self._recorded is None else self._recorded.forward(inputs.batch)
        if hidden is None:
            hidden = self._model.forward(inputs.batch, self._caches, inputs.last)
        launched = self._draw(plan, inputs, hidden)
        launched.prompts = score_prompts(inputs.prompts, hidden, self._states.tokens, self._model.logits)
        self._finish(launched, started, begin)
        if self._governor is not None:
            self._governor.observe(tokens, launched.seconds)
        return launched

    def _draw(self, plan: StepPlan, inputs: StepInputs, hidden: torch.Tensor) -> LaunchedStep:
        drawing = inputs.drawing
        if drawing is None:
            return LaunchedStep(plan.step, plan.rows, np.zeros(0, np.int64), None, None)
        if inputs.last is None:
            hidden = hidden.index_select(0, drawing.last_tokens)
        logits = self._model.logits(hidden)
        # The raw distribution is taken before the edits change the logits in place.
        raw = None if drawing.scored is None else normalized(logits.index_select(0, drawing.scored))
        apply_edits(logits, drawing.edits, self._states.tokens, self._counts)
        drawn = draw(logits, drawing.draws)
        self._states.tokens[drawing.slots, drawing.places] = drawn.int()
        launched = LaunchedStep(plan.step, plan.rows, drawing.rows, to_host(drawn), None)
        if raw is not None and drawing.scored is not None:
            self._attach_scores(launched, drawing, raw, drawn[drawing.scored])
        return launched

    @staticmethod
    def _attach_scores(launched: LaunchedStep, drawing: Drawing, raw: torch.Tensor, drawn: torch.Tensor) -> None:
        launched.scored = score(raw, drawn, max(drawing.scored_widths)).map(to_host)
        launched.scored_rows = drawing.rows[drawing.scored_rows].tolist()
        launched.scored_widths = drawing.scored_widths

    def _record(self) -> torch.cuda.Event | None:
        return None if self._device.type == "cpu" else timestamp()

    def _finish(self, launched: LaunchedStep, started: float, begin: torch.cuda.Event | None) -> LaunchedStep:
        end = self._record()
        if begin is not None and end is not None:
            launched.events = (begin, end)
        launched.seconds = self._clock() - started
        return launched
