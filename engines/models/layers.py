"""The parts that all models are built of, and the builder that takes their weights while it makes them."""

from __future__ import annotations

from typing import Any

import torch

from engines.kernels import PLAIN, Fusion, RmsNorm, Router
from engines.models.batch import Batch
from engines.models.config import MoeConfig
from engines.protocol import EngineLoadError
from engines.quant.base import LinearLayout, LinearPart, QuantMethod, Split, WeightSource
from engines.quant.dense import DenseMethod, DenseWeights

Method = QuantMethod[Any, Any, Any]


class Linear:
    """One linear layer in some weight format; stacked parts come out side by side."""

    def __init__(self, method: Method, weights: Any) -> None:
        self._apply = method.apply
        self._weights = weights

    def __call__(self, x: torch.Tensor, fusion: Fusion = PLAIN) -> torch.Tensor:
        """(T, in) -> (T, out), or (T, out / 2) where ``fusion`` gates."""
        return self._apply(self._weights, x, fusion)


class ExpertProducts:
    """Routed and shared experts in some weight format."""

    def __init__(self, method: Method, weights: Any) -> None:
        self._apply = method.apply_experts
        self._weights = weights

    def __call__(self, hidden: torch.Tensor, norm: RmsNorm, router: Router, batch: Batch) -> torch.Tensor:
        """(T, hidden) -> (T, hidden): the residual stream in and out."""
        return self._apply(self._weights, hidden, norm, router, batch)


class Mlp:
    """``hidden + down(silu(gate(x)) * up(x))`` with x the norm of hidden."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up = gate_up
        self.down = down

    def __call__(self, hidden: torch.Tensor, norm: RmsNorm, batch: Batch) -> torch.Tensor:
        """(T, hidden) -> (T, hidden): the residual stream in and out."""
        gated = self.gate_up(hidden, Fusion(norm=norm, gated=True))
        return self.down(gated, Fusion(residual=hidden))


class ModelBuilder:
    """Makes layers out of a weight source. On the ``meta`` device it only declares them, to count their bytes."""

    def __init__(self, source: WeightSource, method: Method) -> None:
        self.source = source
        self.method = method
        self.counting = source.device.type == "meta"

    def share(self, count: int, what: str) -> int:
        """This rank's share of ``count`` heads or experts. Raises EngineLoadError if they cannot be shared evenly."""
        if count % self.source.world:
            raise EngineLoadError(f"{count} {what} cannot be shared by {self.source.world} devices evenly")
        return count // self.source.world

    def tensor(
        self, name: str, shape: tuple[int, ...], split: Split = "none", dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """A weight outside any linear layer."""
        return self.source.take(name, shape, split, dtype)

    def norm(self, name: str, width: int, eps: float) -> RmsNorm:
        """An RMS norm over ``width`` features."""
        return RmsNorm(self.tensor(name, (width,)), eps)

    def linear(self, parts: dict[str, int], in_features: int, split: Split, bias: bool = False) -> Linear:
        """``parts``: output features by name, stacked in this order."""
        weights = self.method.create_weights(_layout(parts, in_features, split, bias), self.source)
        return Linear(self.method, weights if self.counting else self.method.finish(weights))

    def experts(self, name: str, config: MoeConfig, hidden: int) -> ExpertProducts:
        """Routed and shared experts. Experts of other ranks are skipped."""
        share, width = self.share(config.experts, "experts"), config.intermediate
        first = self.source.rank * share
        for expert in range(config.experts):
            if not first <= expert < first + share:
                for part in ("gate_proj", "up_proj", "down_proj"):
                    self.source.skip(f"{name}.experts.{expert}.{part}.weight")
        routed = [
            self._expert(f"{name}.experts.{expert}", hidden, width, ("none", "none"))
            for expert in range(first, first + share)
        ]
        shared = self._expert(f"{name}.shared_experts", hidden, config.shared_intermediate, ("out", "in"))
        gate_up, down = [pair[0] for pair in routed], [pair[1] for pair in routed]
        weights = (
            shared if self.counting else self.method.finish_experts(gate_up, down, shared, config.experts_per_token)
        )
        return ExpertProducts(self.method, weights)

    def _expert(self, name: str, hidden: int, width: int, splits: tuple[Split, Split]) -> tuple[Any, Any]:
        """Raw weights of gate and up, and of down."""
        gate_up = _layout({f"{name}.gate_proj": width, f"{name}.up_proj": width}, hidden, splits[0], bias=False)
        down = _layout({f"{name}.down_proj": hidden}, width, splits[1], bias=False)
        return self.method.create_weights(gate_up, self.source), self.method.create_weights(down, self.source)

    def mlp(self, name: str, hidden: int, intermediate: int, bias: bool = False) -> Mlp:
        gate_up = {f"{name}.gate_proj": intermediate, f"{name}.up_proj": intermediate}
        return Mlp(
            self.linear(gate_up, hidden, "out", bias),
            self.linear({f"{name}.down_proj": hidden}, intermediate, "in", bias),
        )

    def plain(self, weight: torch.Tensor) -> Linear:
        """A linear layer without a weight format out of an (out, in) tensor."""
        method, weights = DenseMethod(), DenseWeights(weight, None)
        return Linear(method, weights if self.counting else method.finish(weights))


def _layout(parts: dict[str, int], in_features: int, split: Split, bias: bool) -> LinearLayout:
    return LinearLayout(tuple(LinearPart(name, size) for name, size in parts.items()), in_features, split, bias)
