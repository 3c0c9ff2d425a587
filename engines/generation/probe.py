"""Steps over invented rows, run at load to choose threads and step size and to see how much memory a step needs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engines.generation import kv_cache
from engines.generation.runner import StepRunner
from engines.models.model import Model
from engines.protocol import Admit, Capacity, Row, SamplingParams, StepPlan

GREEDY = SamplingParams(seed=0, temperature=0)
COSTLIEST = SamplingParams(
    seed=0, top_p=0.9, top_k=1000, min_p=1e-9, repetition_penalty=1.1, frequency_penalty=0.1, logprobs=20
)
"""Makes every part of the sampler run."""


class Probe:
    """Rows that all share a few KV blocks: what is in them does not matter, only the work does."""

    def __init__(
        self,
        model: Model,
        max_rows: int,
        longest: int,
        kv_dtype: torch.dtype,
        device: torch.device,
        clock: Callable[[], float],
    ) -> None:
        blocks = -(-longest // kv_cache.BLOCK_SIZE)
        capacity = Capacity(
            blocks=blocks,
            block_size=kv_cache.BLOCK_SIZE,
            max_rows=max_rows,
            max_step_tokens=longest,
            max_model_len=longest,
        )
        caches = kv_cache.allocate(model.kv_layout, blocks, kv_cache.BLOCK_SIZE, kv_dtype, device)
        self._runner = StepRunner(model, caches, capacity, device, clock)
        self._blocks = tuple(range(blocks))
        self._longest = longest
        self._device = device

    def step(self, lengths: list[int], sampling: SamplingParams = GREEDY) -> None:
        """Run a step to its end in which row i computes ``lengths[i]`` tokens and draws one."""
        admits = tuple(
            Admit(
                item=slot, slot=slot, tokens=[0] * length, prompt_length=length, blocks=self._blocks, sampling=sampling
            )
            for slot, length in enumerate(lengths)
        )
        rows = tuple(
            Row(item=slot, slot=slot, start=0, count=length, new_blocks=(), max_new=1)
            for slot, length in enumerate(lengths)
        )
        self._runner.run(StepPlan(step=0, engine="", admits=admits, rows=rows)).result()

    def prompt(self, tokens: int) -> None:
        """Compute one prompt of so many tokens."""
        self.step([tokens])

    def largest_step(self, max_rows: int, max_step_tokens: int) -> None:
        """One decode a row but for the last ones, whose prompts fill the step."""
        decodes = min(max_rows, max_step_tokens) - 1
        left = max_step_tokens - decodes
        prompts = [self._longest] * (left // self._longest)
        if left % self._longest:
            prompts.append(left % self._longest)
        self.step(([1] * decodes + prompts)[-max_rows:], COSTLIEST)
