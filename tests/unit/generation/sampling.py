"""The sampler driven as a step drives it, from admits and rows, and what it should do written out in plain Python."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from engines.generation.logit_edits import apply_edits
from engines.generation.rows import RowStates
from engines.generation.sampler import draw
from engines.generation.step_inputs import build_inputs
from engines.kernels import gumbel_noise
from engines.kernels.row_parameters import GREEDY_BELOW
from engines.protocol import Admit, Capacity, Row, SamplingParams


@dataclass(frozen=True)
class Case:
    """One row: its sequence so far, how it draws, and its logits."""

    logits: torch.Tensor
    """(V,)."""
    sampling: SamplingParams
    tokens: tuple[int, ...] = (0,)
    prompt_length: int = 1

    @property
    def position(self) -> int:
        return len(self.tokens) - self.prompt_length


def draw_together(cases: list[Case], device: str = "cpu") -> list[int]:
    """Tokens that the rows get when they are one batch, in the given order."""
    vocab, longest = cases[0].logits.shape[0], max(len(case.tokens) for case in cases)
    capacity = Capacity(
        blocks=1, block_size=16, max_rows=len(cases), max_step_tokens=len(cases), max_model_len=longest + 1
    )
    states = RowStates(capacity, vocab, torch.device(device))
    for slot, case in enumerate(cases):
        states.admit(
            Admit(
                item=slot,
                slot=slot,
                tokens=list(case.tokens),
                prompt_length=case.prompt_length,
                blocks=(),
                sampling=case.sampling,
            )
        )
    rows = [
        Row(item=slot, slot=slot, start=len(case.tokens) - 1, count=1, new_blocks=(), max_new=1)
        for slot, case in enumerate(cases)
    ]
    drawing = build_inputs(rows, states).drawing
    assert drawing is not None
    logits = torch.stack([case.logits for case in cases]).to(device)[drawing.last_tokens]
    counts = torch.zeros((len(cases), vocab), dtype=torch.int32, device=device)
    apply_edits(logits, drawing.edits, states.tokens, counts)
    assert not counts.any()
    drawn = draw(logits, drawing.draws).tolist()
    ordered = [0] * len(cases)
    for row, token in zip(drawing.rows.tolist(), drawn, strict=True):
        ordered[row] = token
    return ordered


def expected_token(case: Case) -> int:
    """The token by the documented rules, one number at a time."""
    sampling = case.sampling
    logits = _edited(case)
    if sampling.temperature < GREEDY_BELOW:
        return max(range(len(logits)), key=lambda token: logits[token])
    scaled = [value / sampling.temperature for value in logits]
    kept = _kept(scaled, sampling)
    seed = sampling.seed if sampling.seed < 1 << 63 else sampling.seed - (1 << 64)
    noise = gumbel_noise(
        torch.tensor([seed]), torch.tensor([sampling.choice]), torch.tensor([case.position]), len(logits)
    )[0].tolist()
    return max(kept, key=lambda token: scaled[token] + noise[token])


def _edited(case: Case) -> list[float]:
    sampling, logits = case.sampling, case.logits.tolist()
    for token, bias in sampling.logit_bias:
        logits[token] += bias
    outputs = case.tokens[case.prompt_length :]
    for token in set(case.tokens):
        penalty = sampling.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    for token in set(outputs):
        logits[token] -= sampling.frequency_penalty * outputs.count(token) + sampling.presence_penalty
    if case.position < sampling.min_tokens:
        for token in sampling.stop_token_ids:
            logits[token] = -math.inf
    return logits


def _kept(scaled: list[float], sampling: SamplingParams) -> list[int]:
    best = max(scaled)
    kept = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    kept = [token for token in kept if math.exp(scaled[token] - best) >= sampling.min_p]
    if sampling.top_k:
        kept = kept[: sampling.top_k]
    if sampling.top_p < 1:
        total = math.fsum(math.exp(scaled[token] - best) for token in kept)
        mass, nucleus = 0.0, []
        for token in kept:
            nucleus.append(token)
            mass += math.exp(scaled[token] - best) / total
            if mass >= sampling.top_p:
                break
        kept = nucleus
    return kept
