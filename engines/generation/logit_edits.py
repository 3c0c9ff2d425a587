"""Changes that a row asks for to its logits before anything is drawn: bias, penalties, stop ids that must wait."""

from __future__ import annotations

from dataclasses import dataclass

import torch

PENALTY_ELEMENTS = 1 << 20
"""Context tokens worked on at once, so that penalties over long contexts need bounded memory."""


@dataclass(frozen=True, slots=True)
class PenaltyRows:
    """P rows with a penalty; tensors are (P,)."""

    rows: torch.Tensor
    """int64 rows of the logits."""
    slots: torch.Tensor
    """int64 rows of the token buffer."""
    known: torch.Tensor
    """int64 tokens of the sequence, prompt and output."""
    prompt_lengths: torch.Tensor
    repetition: torch.Tensor
    """float32, like the other two penalties."""
    frequency: torch.Tensor
    presence: torch.Tensor
    longest: int
    """Largest of ``known``."""


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """Edits of S rows of logits, in the order in which they are applied."""

    biases: tuple[tuple[int, torch.Tensor, torch.Tensor], ...] = ()
    """Row, (B,) token ids without repeats, (B,) what is added."""
    penalties: PenaltyRows | None = None
    masked: tuple[tuple[int, torch.Tensor], ...] = ()
    """Row, (B,) token ids that may not be drawn."""


def apply_edits(logits: torch.Tensor, edits: LogitEdits, tokens: torch.Tensor, counts: torch.Tensor) -> None:
    """Edit (S, V) logits in place.

    ``tokens`` is the (slots, length) buffer of sequences, ``counts`` an int32 scratch of (at least P, V) zeros that
    is all zeros again afterwards.
    """
    for row, ids, values in edits.biases:
        logits[row].index_add_(0, ids, values)
    if edits.penalties is not None:
        _penalize(logits, edits.penalties, tokens, counts)
    for row, ids in edits.masked:
        logits[row].index_fill_(0, ids, float("-inf"))


def _penalize(logits: torch.Tensor, penalties: PenaltyRows, tokens: torch.Tensor, counts: torch.Tensor) -> None:
    """Count what each row has drawn from the token buffer itself, which is the only record of it.

    The work is proportional to the contexts, not to the vocabulary: only tokens of a context change.
    """
    stride = max(1, PENALTY_ELEMENTS // penalties.longest)
    places = torch.arange(penalties.longest, device=logits.device)
    for first in range(0, penalties.rows.shape[0], stride):
        part = slice(first, first + stride)
        known = penalties.known[part].unsqueeze(1)
        # Places past a row's end repeat its last token, which gets the same value once more.
        ids = tokens[penalties.slots[part].unsqueeze(1), torch.minimum(places, known - 1)].long()
        drawn = (places >= penalties.prompt_lengths[part].unsqueeze(1)) & (places < known)
        scratch = counts[: ids.shape[0]]
        times = scratch.scatter_add_(1, ids, drawn.int()).gather(1, ids)
        scratch.scatter_(1, ids, 0)
        rows = penalties.rows[part].unsqueeze(1)
        values = logits[rows, ids]
        repetition = penalties.repetition[part].unsqueeze(1)
        values = torch.where(values > 0, values / repetition, values * repetition)
        values -= penalties.frequency[part].unsqueeze(1) * times
        values -= penalties.presence[part].unsqueeze(1) * (times > 0)
        logits[rows, ids] = values
