"""A step that was launched, and its results once the device is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from engines.generation.logprobs import ScoredTokens, score_prompt
from engines.generation.step_inputs import Integers, PromptScoring
from engines.generation.transfer import to_host
from engines.protocol import Irregular, Row, RowResult, StepResult, TokenLogprobs


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
    irregular: Irregular = ""
    """``compile`` where kernels were compiled while it was enqueued, and the device may have waited for them."""

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
        return StepResult(step=self.step, rows=results, seconds=seconds, irregular=self.irregular)


def score_prompts(
    prompts: Sequence[PromptScoring],
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    project: Callable[[torch.Tensor], torch.Tensor],
) -> list[tuple[PromptScoring, ScoredTokens]]:
    """Log probabilities of the prompts' own tokens, on their way to the host.

    ``hidden`` is the step's (T, hidden), ``tokens`` the (slots, length) buffer of sequences.
    """
    scored = []
    for prompt in prompts:
        states = hidden[prompt.first : prompt.first + prompt.count]
        following = tokens[prompt.slot, prompt.place : prompt.place + prompt.count].long()
        scored.append((prompt, score_prompt(states, following, prompt.width, project).map(to_host)))
    return scored


def timestamp() -> torch.cuda.Event:
    """An event that the device records when it gets here."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
