"""Whether routers still choose the same experts: mean overlap of the chosen sets, token by token and layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from compression.card import ROUTER_AGREEMENT
from compression.measures.intervals import Estimate, ratio_of_sums
from compression.measures.models import LoadedModel
from compression.measures.texts import Windows
from engines.generation.whole_prompts import WholePrompts
from engines.kernels import RmsNorm, Stream
from engines.kernels.experts import choose
from engines.models.batch import Batch
from engines.models.experts import Experts
from engines.models.model import Model

MOST_WINDOWS = 32
Choices = np.ndarray[tuple[int, ...], np.dtype[np.int16]]


class _Watched:
    """An expert layer that writes down whom its router chooses."""

    takes_handover = False

    def __init__(self, experts: Experts, found: list[torch.Tensor]) -> None:
        self._experts = experts
        self._found = found

    def __call__(self, stream: Stream, norm: RmsNorm, batch: Batch, next_norm: RmsNorm | None = None) -> Stream:
        self._found.append(choose(norm(stream.hidden), self._experts.router, batch)[1])
        return self._experts(stream, norm, batch, next_norm)


class RouterWatch:
    """Compares the routers of two models, whichever comes first."""

    def __init__(self) -> None:
        self._choices: list[list[Choices]] = []

    def watch(self, loaded: LoadedModel, windows: Windows) -> None:
        """Called once for each of the two, with the same windows."""
        if any(isinstance(layer.feed_forward, Experts) for layer in loaded.model.layers):
            self._choices.append(chosen_experts(loaded, [window.tolist() for window in windows[:MOST_WINDOWS]]))

    def figures(self) -> dict[str, Estimate]:
        """For the card; empty for models without experts."""
        if len(self._choices) != 2:
            return {}
        return {ROUTER_AGREEMENT: overlap(*self._choices)}


def chosen_experts(loaded: LoadedModel, sequences: Sequence[Sequence[int]]) -> list[Choices]:
    """For each sequence (layers with experts, tokens, k)."""
    found: list[torch.Tensor] = []
    prompts = WholePrompts(_watched(loaded.model, found), loaded.device, loaded.dtype)
    choices: list[Choices] = []
    for sequence in sequences:
        found.clear()
        prompts.hidden([sequence])
        choices.append(torch.stack(found).to(torch.int16).cpu().numpy())
    return choices


def _watched(model: Model, found: list[torch.Tensor]) -> Model:
    layers = tuple(
        dataclasses.replace(layer, feed_forward=_Watched(layer.feed_forward, found))
        if isinstance(layer.feed_forward, Experts)
        else layer
        for layer in model.layers
    )
    return dataclasses.replace(model, layers=layers)


def overlap(one: Sequence[Choices], other: Sequence[Choices]) -> Estimate:
    """Share of chosen experts that both models chose, with an interval over the sequences."""
    same = [(ours[..., :, None] == theirs[..., None, :]).sum() for ours, theirs in zip(one, other, strict=True)]
    return ratio_of_sums(np.array(same, np.float64), np.array([theirs.size for theirs in other], np.float64))
