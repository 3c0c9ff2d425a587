"""Log probabilities of the model's own distribution, before bias, penalties, temperature and truncation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engines.protocol import TokenLogprobs

PROMPT_CHUNK = 256
"""Prompt positions whose logits exist at once."""

FLOOR = -9999.0
"""Reported for a probability of 0 and for what is not a number: infinities have no place in JSON."""


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """N tokens and the best alternatives beside them, on the device or on the host."""

    chosen: torch.Tensor
    """(N,) float32."""
    top_values: torch.Tensor
    """(N, width) float32, descending."""
    top_ids: torch.Tensor
    """(N, width) int64."""

    def map(self, move: Callable[[torch.Tensor], torch.Tensor]) -> ScoredTokens:
        """The same with each tensor moved."""
        return ScoredTokens(move(self.chosen), move(self.top_values), move(self.top_ids))

    def entries(self, widths: Sequence[int]) -> list[TokenLogprobs]:
        """One entry a token, with ``widths[i]`` alternatives. Only for tensors on the host."""
        chosen, values, ids = self.chosen.tolist(), self.top_values.tolist(), self.top_ids.tolist()
        return [TokenLogprobs(chosen[i], ids[i][:width], values[i][:width]) for i, width in enumerate(widths)]


def normalized(logits: torch.Tensor) -> torch.Tensor:
    """(N, V) logits -> (N, V) finite log probabilities."""
    return torch.nan_to_num(logits.log_softmax(dim=-1), nan=FLOOR, posinf=FLOOR, neginf=FLOOR).clamp_(min=FLOOR)


def score(log_probabilities: torch.Tensor, tokens: torch.Tensor, width: int) -> ScoredTokens:
    """(N, V) and the (N,) int64 tokens that stand there -> their log probabilities and the ``width`` best."""
    top = log_probabilities.topk(min(width, log_probabilities.shape[1]), dim=-1)
    return ScoredTokens(log_probabilities.gather(1, tokens.unsqueeze(1)).squeeze(1), top.values, top.indices)


def score_prompt(
    hidden: torch.Tensor, tokens: torch.Tensor, width: int, project: Callable[[torch.Tensor], torch.Tensor]
) -> ScoredTokens:
    """(N, hidden) states and the (N,) tokens that follow them -> scores, with logits for few positions at a time."""
    parts = [
        score(normalized(project(hidden[first : first + PROMPT_CHUNK])), tokens[first : first + PROMPT_CHUNK], width)
        for first in range(0, hidden.shape[0], PROMPT_CHUNK)
    ]
    return ScoredTokens(
        torch.cat([part.chosen for part in parts]),
        torch.cat([part.top_values for part in parts]),
        torch.cat([part.top_ids for part in parts]),
    )
