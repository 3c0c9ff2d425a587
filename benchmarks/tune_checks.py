"""Whether steps whose linear layers were tuned still compute what the model says."""

from __future__ import annotations

import dataclasses

import torch

from benchmarks.tune_chain import CONTEXT, Chain, checked_layers
from benchmarks.tune_descent import Assignment, table_of
from engines.kernels.cuda.skinny import choose_from
from engines.models.config import ModelConfig

NEARNESS = 2.0
"""A right step is at most so many times as far from float32 as one whose linear layers are all cuBLAS's."""
ALIKE = 0.05
"""Without a result in float32: how far steps in bfloat16 may be from each other."""


class Checker:
    """Whether steps compute what they should: those of the first layers, against the same ones in float32."""

    def __init__(self, chain: Chain, config: ModelConfig) -> None:
        """Computes in float32 what the first layers and the head give for the most rows."""
        self._chain = chain
        layers = checked_layers(config)
        self._model = dataclasses.replace(chain.model, layers=chain.model.layers[:layers])
        self.failure = ""
        """Why there is no result in float32; steps are then compared with cuBLAS's."""
        self._expected: tuple[torch.Tensor, torch.Tensor] | None = None
        try:
            self._expected = self._exact(config, layers)
        except Exception as error:  # noqa: BLE001 - what can be checked in a weaker way is still worth its time
            self.failure = f"no result in float32: {type(error).__name__}: {error}"[:200]

    @torch.inference_mode()
    def _exact(self, config: ModelConfig, layers: int) -> tuple[torch.Tensor, torch.Tensor]:
        ours, rows = self._chain, self._chain.most_rows
        exact = Chain(config, layers, ours.device, torch.float32, rows)
        exact.state.tokens.copy_(ours.state.tokens)
        exact.state.tables.copy_(ours.state.tables)
        for theirs, tensors in zip(exact.caches, ours.caches, strict=False):
            for mine, tensor in zip(theirs, tensors, strict=True):
                mine.copy_(tensor)
        exact.set_rows(rows, CONTEXT)
        exact.step(rows)()
        return exact.hidden, exact.logits

    def distance(self, assignment: Assignment, rows: int) -> tuple[float, float]:
        """From float32, of the stream's and the logits' numbers together: relative, and the largest of one number."""
        hidden, logits = self._results(assignment, rows)
        if self._expected is None:
            exact_hidden, exact_logits = self._results(dict.fromkeys(assignment), rows)
        else:
            exact_hidden, exact_logits = (values[:rows] for values in self._expected)
        pairs = ((hidden, exact_hidden), (logits, exact_logits))
        norms = [float((got - exact).norm() / exact.norm()) for got, exact in pairs]
        most = [float((got - exact).abs().max() / exact.square().mean().sqrt()) for got, exact in pairs]
        return max(norms), max(most)

    def right(self, assignment: Assignment, rows: int) -> bool:
        found = self.distance(assignment, rows)
        if self._expected is None:
            return found[0] < ALIKE
        usual = self.distance(dict.fromkeys(assignment), rows)
        return all(ours <= NEARNESS * other for ours, other in zip(found, usual, strict=True))

    @torch.inference_mode()
    def _results(self, assignment: Assignment, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        chain = self._chain
        choose_from(table_of(assignment, rows))
        chain.set_rows(rows, CONTEXT)
        chain.step(rows, self._model)()
        return chain.hidden.float(), chain.logits
