"""How much a step computed, counted from its plan and the model's shape; nothing here is measured."""

from __future__ import annotations

from dataclasses import dataclass

from engines.protocol import ModelWork, StepPlan
from server.scheduler.core import StepWork


@dataclass(frozen=True, slots=True)
class CountedWork:
    padding: int = 0
    """Tokens, or rows of one-shot items, that were computed for nobody."""
    flops: float = 0.0
    bytes_read: float = 0.0


def count_work(plan: StepPlan, work: StepWork, model: ModelWork | None) -> CountedWork:
    """Decodes are not looked at one by one. Logits of prompts (``prompt_logprobs``) are not counted."""
    padding = padded(plan, work)
    if model is None or not plan.rows:
        return CountedWork(padding)
    draws, context = len(plan.rows), work.decode_pairs
    for row in reversed(plan.rows):
        if row.count == 1 and row.max_new == 1:
            break
        draws -= row.max_new == 0
        context += row.start + row.count if row.count > 1 else 0
    attention = work.decode_pairs * model.decode_pair_flops + work.prompt_pairs * model.prompt_pair_flops
    flops = work.tokens * model.token_flops + draws * model.row_flops + attention
    weights = model.weight_bytes + model.expert_bytes * distinct_experts(model, work.tokens)
    return CountedWork(padding, flops, weights + context * model.kv_token_bytes)


def padded(plan: StepPlan, work: StepWork) -> int:
    """What a captured graph, or a batch of one-shot items, computes beyond its rows."""
    if plan.padded_rows:
        return plan.padded_rows - work.rows
    if plan.graph_rows:
        return plan.graph_rows - len(plan.rows)
    return plan.graph_tokens - work.tokens if plan.graph_tokens else 0


def distinct_experts(model: ModelWork, tokens: int) -> float:
    """Expected number of a layer's experts that a step reads, if each token draws its own uniformly."""
    if not model.experts:
        return 0.0
    return model.experts * (1 - (1 - model.experts_per_token / model.experts) ** tokens)
