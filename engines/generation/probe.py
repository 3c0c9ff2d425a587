"""Steps over invented rows, run at load to choose threads and step size and to see how much memory a step needs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engines.generation import kv_cache
from engines.generation.choose_runner import make_runner
from engines.models.model import Model
from engines.protocol import Admit, Capacity, Row, SamplingParams, StepPlan, StepResult

GREEDY = SamplingParams(seed=0, temperature=0)
COSTLIEST = SamplingParams(
    seed=0, top_p=0.9, top_k=1000, min_p=1e-9, repetition_penalty=1.1, frequency_penalty=0.1, logprobs=20
)
"""Makes every part of the sampler run."""


PROMPT_LOGPROBS = 20


class Probe:
    """Rows that all share a few KV blocks: what is in them does not matter, only the work does."""

    def __init__(
        self,
        model: Model,
        max_rows: int,
        longest: int,
        context: int,
        kv_dtype: torch.dtype,
        device: torch.device,
        clock: Callable[[], float],
    ) -> None:
        """``longest`` is the most tokens of a row in one step, ``context`` the most tokens of its sequence."""
        blocks = -(-longest // kv_cache.BLOCK_SIZE)
        capacity = Capacity(
            blocks=blocks,
            block_size=kv_cache.BLOCK_SIZE,
            max_rows=max_rows,
            max_step_tokens=longest,
            max_model_len=context,
        )
        caches = kv_cache.allocate(model.kv_layout, blocks, kv_cache.BLOCK_SIZE, kv_dtype, device)
        self._runner = make_runner(model, caches, capacity, device, clock)
        # A context that is longer than the cache goes round in it.
        self._blocks = tuple(block % blocks for block in range(-(-context // kv_cache.BLOCK_SIZE)))
        self._longest = longest
        self._context = context

    def prompt(self, tokens: int) -> None:
        """Compute one prompt of so many tokens."""
        self._step([(0, tokens)], GREEDY, None)

    def seconds(self, rows: list[tuple[int, int]]) -> float:
        """Run a step of these rows, (tokens before, tokens computed); returns how long the device worked on it."""
        return self._step(rows, GREEDY, None).seconds

    def largest_step(self, max_rows: int, max_step_tokens: int) -> None:
        """One decode a row but for the last ones, whose prompts fill the step, all at the end of a full context."""
        counts = largest_counts(max_rows, max_step_tokens, self._longest)
        self._step([(self._context - count, count) for count in counts], COSTLIEST, PROMPT_LOGPROBS)

    def _step(self, rows: list[tuple[int, int]], sampling: SamplingParams, prompt_logprobs: int | None) -> StepResult:
        """Run a step to its end in which each row computes ``count`` tokens from ``start`` on and draws one.

        Log probabilities of the prompt, if asked for, are those of the last row.
        """
        admits = tuple(
            Admit(
                item=slot,
                slot=slot,
                tokens=[0] * (start + count),
                prompt_length=start + count,
                blocks=self._blocks,
                sampling=sampling,
                prompt_logprobs=prompt_logprobs if slot == len(rows) - 1 else None,
            )
            for slot, (start, count) in enumerate(rows)
        )
        plan_rows = tuple(
            Row(item=slot, slot=slot, start=start, count=count, new_blocks=(), max_new=1)
            for slot, (start, count) in enumerate(rows)
        )
        return self._runner.run(StepPlan(step=0, engine="", admits=admits, rows=plan_rows)).result()


def largest_counts(max_rows: int, max_step_tokens: int, longest: int) -> list[int]:
    """Tokens of each row of the largest step: one a row but for the last ones, whose prompts fill it."""
    decodes = min(max_rows, max_step_tokens) - 1
    left = max_step_tokens - decodes
    prompts = [longest] * (left // longest)
    if left % longest:
        prompts.append(left % longest)
    return ([1] * decodes + prompts)[-max_rows:]
