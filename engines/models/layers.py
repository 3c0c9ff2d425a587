"""The parts that all models are built of, and the builder that takes their weights while it makes them."""

from __future__ import annotations

from typing import Any

import torch

from engines import kernels
from engines.kernels import PLAIN, Fusion, PackedLinear, RmsNorm
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


class GroupedLinear:
    """As many layers of one shape as there are experts; each input row takes one of them."""

    def __init__(self, method: Method, weights: Any) -> None:
        self._apply = method.apply_group
        self._weights = weights

    def __call__(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """(N, in) -> (N, out): rows ``ends[e-1] .. ends[e]-1`` through expert e."""
        return self._apply(self._weights, x, ends)


class HeadwiseLinear:
    """One small linear layer a head, without a weight format: MLA's absorbed projections."""

    def __init__(self, weight: torch.Tensor) -> None:
        """``weight`` is (heads, out, in)."""
        self._out = weight.shape[1]
        self._stacked: torch.Tensor | None = None
        self._heads: tuple[PackedLinear, ...] = ()
        if weight.device.type == "cpu":
            # A batched product would sum in an order that depends on T; the packed one never does.
            self._heads = tuple(kernels.pack_linear(head.contiguous()) for head in weight)
        else:
            self._stacked = weight.transpose(1, 2)

    def __call__(self, x: torch.Tensor, output: torch.Tensor) -> None:
        """(T, heads, in) into ``output`` (T, heads, out)."""
        if self._stacked is not None:
            output.copy_(torch.bmm(x.transpose(0, 1), self._stacked).transpose(0, 1))
            return
        for head, packed in enumerate(self._heads):
            output[:, head] = kernels.linear(x[:, head].contiguous(), packed)


class Mlp:
    """``hidden + down(silu(gate(x)) * up(x))`` with x the norm of hidden."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up = gate_up
        self.down = down

    def __call__(self, hidden: torch.Tensor, norm: RmsNorm) -> torch.Tensor:
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

    def grouped_linear(self, experts: list[dict[str, int]], in_features: int) -> GroupedLinear:
        """One entry an expert, as for ``linear``. Experts of other ranks are skipped."""
        share = self.share(len(experts), "experts")
        first = self.source.rank * share
        for index, parts in enumerate(experts):
            if not first <= index < first + share:
                for name in parts:
                    self.source.skip(f"{name}.weight")
        weights = [
            self.method.create_weights(_layout(parts, in_features, "none", bias=False), self.source)
            for parts in experts[first : first + share]
        ]
        return GroupedLinear(self.method, weights if self.counting else self.method.finish_group(weights))

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
