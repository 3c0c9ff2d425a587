"""Runs one step: plan in, drawn tokens on their way to the host out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from engines.generation.logit_edits import apply_edits
from engines.generation.logprobs import ScoredTokens, normalized, score, score_prompt
from engines.generation.rows import RowStates
from engines.generation.sampler import draw
from engines.generation.step_inputs import Drawing, Integers, PromptScoring, StepInputs, build_inputs
from engines.generation.threads import ThreadGovernor
from engines.generation.transfer import to_host
from engines.models.batch import LayerCache
from engines.models.model import Model
from engines.protocol import Capacity, Row, RowResult, StepPlan, StepResult, TokenLogprobs


@dataclass(slots=True)
class LaunchedStep:
    """A step whose work is done (CPU) or enqueued (GPU)."""

    step: int
    rows: Sequence[Row]
    drawing_rows: Integers
    drawn: torch.Tensor | None
    """(S,) on the host, valid once the step is finished."""
    scored: ScoredTokens | None
    scored_rows: list[int] = field(default_factory=list)
    scored_widths: list[int] = field(default_factory=list)
    prompts: list[tuple[PromptScoring, ScoredTokens]] = field(default_factory=list)
    seconds: float = 0.0
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def result(self) -> StepResult:
        """Wait for the device and give the results in the plan's order."""
        seconds = self.seconds
        if self.events is not None:
            self.events[1].synchronize()
            seconds = self.events[0].elapsed_time(self.events[1]) / 1000
        tokens: list[list[int]] = [[] for _ in self.rows]
        if self.drawn is not None:
            for row, token in zip(self.drawing_rows.tolist(), self.drawn.tolist(), strict=True):
                tokens[row] = [token]
        logprobs: dict[int, list[TokenLogprobs]] = {}
        if self.scored is not None:
            entries = self.scored.entries(self.scored_widths)
            logprobs = {row: [entry] for row, entry in zip(self.scored_rows, entries, strict=True)}
        prompts = {prompt.row: scored.entries([prompt.width] * prompt.count) for prompt, scored in self.prompts}
        results = [
            RowResult(
                item=row.item,
                tokens=tokens[index],
                logprobs=logprobs.get(index, []),
                prompt_logprobs=prompts.get(index, []),
            )
            for index, row in enumerate(self.rows)
        ]
        return StepResult(step=self.step, rows=results, seconds=seconds)


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
        self._states = RowStates(capacity, model.vocab_size, device)
        self._counts = torch.zeros((capacity.max_rows, model.vocab_size), dtype=torch.int32, device=device)

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
        hidden = self._model.forward(inputs.batch, self._caches)
        launched = self._draw(plan, inputs, hidden)
        launched.prompts = [(prompt, self._score_prompt(prompt, hidden)) for prompt in inputs.prompts]
        self._finish(launched, started, begin)
        if self._governor is not None:
            self._governor.observe(tokens, launched.seconds)
        return launched

    def _draw(self, plan: StepPlan, inputs: StepInputs, hidden: torch.Tensor) -> LaunchedStep:
        drawing = inputs.drawing
        if drawing is None:
            return LaunchedStep(plan.step, plan.rows, np.zeros(0, np.int64), None, None)
        logits = self._model.logits(hidden.index_select(0, drawing.last_tokens))
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

    def _score_prompt(self, prompt: PromptScoring, hidden: torch.Tensor) -> ScoredTokens:
        states = hidden[prompt.first : prompt.first + prompt.count]
        following = self._states.tokens[prompt.slot, prompt.place : prompt.place + prompt.count].long()
        return score_prompt(states, following, prompt.width, self._model.logits).map(to_host)

    def _record(self) -> torch.cuda.Event | None:
        if self._device.type == "cpu":
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _finish(self, launched: LaunchedStep, started: float, begin: torch.cuda.Event | None) -> LaunchedStep:
        end = self._record()
        if begin is not None and end is not None:
            launched.events = (begin, end)
        launched.seconds = self._clock() - started
        return launched
