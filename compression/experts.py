"""Formats of routed experts under a number of bytes: who needs many bits gets them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import torch

from compression.activity import PARTS, ActivityPass, ExpertActivity
from compression.allocate import least_loss, most_frequent
from compression.base_model import BaseModel
from compression.errors import CompressionError
from compression.layerwise import make_window
from compression.plan import LayerPlan, LinearLayer, Plan, is_expert, plan_layer
from compression.recipe import ExpertBudget, LayerRule, matching
from compression.stored_formats import stored_bytes
from engines.models.config import DeepseekConfig

DECISION = "experts.json"
"""What was decided and why; stays in the engine folder."""
SAMPLE_TOKENS = 8192
"""At most so many tokens of the calibration text are looked at."""


class ExpertFormats(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided, and on what ground."""

    hot: list[str]
    """Experts that have the larger format, as in the checkpoint; all others have the smaller one."""
    bytes: int
    """Of all routed experts."""
    least_bytes: int
    """With all of them cold; so ``most_bytes`` with all of them hot."""
    most_bytes: int
    loss: float
    """Estimated divergence that the experts' rounding causes, nats a token."""
    activities: list[ExpertActivity]

    def notes(self, rule: str) -> list[str]:
        """For the card."""
        silent = [each.name for each in self.activities if not each.tokens]
        lines = [
            f"{len(self.hot)} of {len(self.activities)} routed experts have the larger format, chosen by {rule}: "
            f"{self.bytes / 1e6:.2f} MB between {self.least_bytes / 1e6:.2f} and {self.most_bytes / 1e6:.2f}; "
            f"estimated divergence from their rounding {self.loss:.5f} nats a token"
        ]
        if 0 < len(self.hot) < len(self.activities):
            lines.append(
                "experts of one layer have different formats, which only slimserve loads; with experts.budget 0 or 1 "
                "in the recipe other servers load the folder too"
            )
        if silent:
            lines.append(f"no token of the sample chose {', '.join(silent)}: they have the smaller format")
        return lines


class ExpertPlans:
    """The two plans that each routed expert's layers can have."""

    def __init__(self, budget: ExpertBudget, layers: list[LinearLayer], scale_dtype: torch.dtype) -> None:
        """Raises CompressionError where the patterns name no whole experts, or not the same ones."""
        self.notes: list[str] = []
        self.layers = [layer for layer in layers if is_expert(layer.name)]
        if not self.layers:
            raise CompressionError("the recipe has a budget for experts, and this model has no routed experts")
        self.cold, self.hot = (self._plans(rule, scale_dtype) for rule in (budget.cold, budget.hot))
        self.sizes = {layer.name: tuple(_bytes(layer, plan) for plan in (self.cold, self.hot)) for layer in self.layers}

    def _plans(self, rule: LayerRule, scale_dtype: torch.dtype) -> dict[str, LayerPlan]:
        names = [layer.name for layer in self.layers]
        if matching(rule.match, names) != set(names):
            raise CompressionError("the patterns of experts.hot and experts.cold must match all routed experts")
        notes: list[str] = []
        plans = {layer.name: plan_layer(rule, layer, scale_dtype, notes) for layer in self.layers}
        self.notes += [f"{note} ({notes.count(note)} layers)" for note in dict.fromkeys(notes)]
        return {name: plan for name, plan in plans.items() if plan is not None}

    def chosen(self, formats: ExpertFormats) -> dict[str, LayerPlan]:
        """By layer name, for all layers of experts that are quantized."""
        hot = set(formats.hot)
        plans = {}
        for layer in self.layers:
            plan = (self.hot if layer.name.rpartition(".")[0] in hot else self.cold).get(layer.name)
            if plan is not None:
                plans[layer.name] = plan
        return plans


def _bytes(layer: LinearLayer, plans: dict[str, LayerPlan]) -> int:
    if layer.name not in plans:
        return 2 * layer.out_features * layer.in_features
    return stored_bytes(plans[layer.name].scheme, layer.out_features, layer.in_features)


def plan_experts(
    base: BaseModel,
    layers: list[LinearLayer],
    budget: ExpertBudget,
    plan: Plan,
    scale_dtype: torch.dtype,
    cos_sin: torch.Tensor,
    tokens: torch.Tensor,
    folder: Path,
) -> None:
    """Put the routed experts' formats into ``plan``, with notes.

    ``tokens``: the calibration's, (windows, width) int64, of which ``SAMPLE_TOKENS``, spread evenly, are looked at.
    What was decided is kept in ``folder``, where a run that goes on finds it. Raises CompressionError.
    """
    plans = ExpertPlans(budget, layers, scale_dtype)
    path = folder / DECISION
    if path.exists():
        formats = msgspec.json.decode(path.read_bytes(), type=ExpertFormats)
    else:
        formats = decide(watch_experts(base, layers, plans, cos_sin, tokens, folder), plans, budget)
        partial = path.with_suffix(".partial")
        partial.write_bytes(msgspec.json.encode(formats))
        partial.replace(path)
    for layer in plans.layers:
        plan.layers.pop(layer.name, None)
    plan.layers |= plans.chosen(formats)
    plan.notes += plans.notes + formats.notes(budget.rule)


def watch_experts(
    base: BaseModel,
    layers: list[LinearLayer],
    plans: ExpertPlans,
    cos_sin: torch.Tensor,
    tokens: torch.Tensor,
    folder: Path,
) -> list[ExpertActivity]:
    """Activity of all routed experts on a sample of the windows. Raises CompressionError for weights with NaN."""
    assert isinstance(base.config, DeepseekConfig)
    count = min(tokens.shape[0], max(1, SAMPLE_TOKENS // tokens.shape[1]))
    places = torch.arange(count) * tokens.shape[0] // count
    windows = [make_window(row, base.config, base.device) for row in tokens[places]]
    try:
        return ActivityPass(base, layers, (plans.cold, plans.hot), cos_sin, windows, folder).run()
    except ValueError as error:
        raise CompressionError(f"{error}; the model cannot be compressed by this recipe") from error


def decide(activities: list[ExpertActivity], plans: ExpertPlans, budget: ExpertBudget) -> ExpertFormats:
    """Who is hot, by the recipe's rule. Raises CompressionError where scipy is missing."""
    sizes = np.array([_expert_bytes(each.name, plans) for each in activities], np.int64)
    losses = np.array([each.losses for each in activities], np.float64)
    least, most = (int(sizes[:, column].sum()) for column in (0, 1))
    allowed = least + int(budget.budget * (most - least))
    if budget.rule == "frequency":
        chosen = most_frequent(np.array([each.tokens for each in activities], np.int64), sizes, allowed)
    else:
        chosen = least_loss(losses, sizes, allowed)
    rows = np.arange(len(activities))
    return ExpertFormats(
        hot=[each.name for each, place in zip(activities, chosen, strict=True) if place],
        bytes=int(sizes[rows, chosen].sum()),
        least_bytes=least,
        most_bytes=most,
        loss=float(losses[rows, chosen].sum()),
        activities=activities,
    )


def _expert_bytes(expert: str, plans: ExpertPlans) -> list[int]:
    parts = [plans.sizes[f"{expert}.{part}"] for part in PARTS]
    return [sum(part[column] for part in parts) for column in (0, 1)]
