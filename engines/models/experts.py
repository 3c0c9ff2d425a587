"""Mixture of experts as DeepSeek-V2 and V3 have it: routed experts beside shared ones."""

from __future__ import annotations

import torch

from engines.kernels import RmsNorm, Router, RoutingRule, Stream, pack_dense
from engines.models.batch import Batch
from engines.models.config import MoeConfig
from engines.models.layers import ModelBuilder


class Experts:
    """The feed-forward of an expert layer. No step waits for the device, and none depends on other tokens."""

    takes_handover = False

    def __init__(
        self, config: MoeConfig, hidden: int, builder: ModelBuilder, name: str, uniform_layer: int | None = None
    ) -> None:
        """``uniform_layer``: draw experts at random, with the noise of this layer, instead of routing."""
        weight = builder.tensor(f"{name}.gate.weight", (config.experts, hidden), dtype=torch.float32)
        correction: torch.Tensor | None = None
        if config.correction_bias:
            bias = f"{name}.gate.e_score_correction_bias"
            correction = builder.tensor(bias, (config.experts,), dtype=torch.float32)
        rule = RoutingRule(
            experts_per_token=config.experts_per_token,
            scoring=config.scoring,
            groups=config.groups,
            top_groups=config.top_groups,
            normalise=config.normalise,
            scale=config.scale,
            uniform_layer=uniform_layer,
        )
        self.router = Router(pack_dense(weight), correction, rule)
        self.products = builder.experts(name, config, hidden)

    def __call__(self, stream: Stream, norm: RmsNorm, batch: Batch, next_norm: RmsNorm | None = None) -> Stream:
        """The norms are its own affair: it takes none that was handed over, and hands none over."""
        return Stream(self.products(stream.hidden, norm, self.router, batch))
