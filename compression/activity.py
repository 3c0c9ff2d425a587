"""What each routed expert does on calibration text, and what each of its formats would cost the model.

The model runs layer by layer in float32. Beside the exact residual stream there is one more for each layer of experts,
in which that layer alone computes with the smaller format: the divergence of each token's last distribution from the
exact one is shared out among the experts of that token by the squared errors of what they add to the stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch
from torch.nn import functional

from compression.base_model import FINAL_NORM, BaseModel
from compression.calibrated_layer import CalibratedLinear, LayerWeights, build_calibrated
from compression.hidden_states import HiddenStates
from compression.layerwise import Window
from compression.plan import LayerPlan, LinearLayer, has_experts, layer_index
from compression.quantize.rounding import RoundToNearest
from engines.kernels import QuantizedMatrix, RmsNorm, Stream, silu_mul
from engines.kernels.experts import choose
from engines.models.config import DeepseekConfig
from engines.models.experts import Experts

LOGITS_AT_ONCE = 256
"""Rows."""
PARTS = ("gate_proj", "up_proj", "down_proj")

Formats = tuple[Mapping[str, LayerPlan], ...]
"""By layer name; layers that one does not name stay as they are in it. The first is the smallest."""


class ExpertActivity(msgspec.Struct, frozen=True, kw_only=True):
    """One routed expert over the sampled tokens."""

    name: str
    """As in the checkpoint, such as ``model.layers.1.mlp.experts.0``."""
    tokens: int
    """That chose it."""
    gate_weight: float
    """Mean weight that the router gives it, over those tokens."""
    contribution: float
    """Mean of weight times length of its output, over those tokens: REAP's measure (arXiv 2510.13999)."""
    losses: list[float]
    """For each format: estimated divergence of the model's next-token distribution, nats a token."""


class ActivityPass:
    """Runs the model once over sampled windows. Disk: one stream of hidden states for each layer of experts."""

    def __init__(
        self,
        base: BaseModel,
        layers: list[LinearLayer],
        formats: Formats,
        cos_sin: torch.Tensor,
        windows: list[Window],
        folder: Path,
    ) -> None:
        """``layers``: all linear layers of the model. ``folder`` is for the streams, which are removed at the end."""
        assert isinstance(base.config, DeepseekConfig)
        self._base = base
        self._config = base.config
        self._layers = layers
        self._formats = formats
        self._cos_sin = cos_sin
        self._windows = windows
        self._folder = folder
        self._streams: dict[int, HiddenStates] = {}

    def run(self) -> list[ExpertActivity]:
        """In the order of the layers. Raises ValueError for NaN in weights."""
        embedding = self._base.linear(self._base.outer_layers()[0])
        exact = self._stream(-1)
        for place, window in enumerate(self._windows):
            exact.write(place, embedding[window.batch.token_ids])
        del embedding
        found: dict[int, _LayerExperts] = {}
        for index in range(self._config.layers):
            own = [layer for layer in self._layers if layer_index(layer.name) == index]
            experts = self._layer(index, LayerWeights(self._base.layer_tensors(index, own)))
            if experts is not None:
                found[index] = experts
        divergences = self._divergences()
        for stream in self._streams.values():
            stream.path.unlink()
        return [activity for index, experts in found.items() for activity in experts.activities(divergences[index])]

    def _stream(self, index: int) -> HiddenStates:
        """In which layer ``index`` computes with the smallest format; -1 is the exact one."""
        if index not in self._streams:
            path = self._folder / ("exact.bin" if index < 0 else f"changed-{index:05}.bin")
            path.unlink(missing_ok=True)
            count = self._windows[0].batch.token_ids.shape[0]
            self._streams[index] = HiddenStates(path, len(self._windows), count, self._config.hidden)
        return self._streams[index]

    def _layer(self, index: int, weights: LayerWeights) -> _LayerExperts | None:
        """All streams through one layer; None for one without experts."""
        layer = build_calibrated(self._config, index, weights, self._cos_sin, self._base.device).layer
        attended = []
        for number, stream in list(self._streams.items()):
            for place, window in enumerate(self._windows):
                hidden = stream.read(place, self._base.device)
                attention = layer.attention(Stream(hidden), layer.attention_norm, window.batch, window.cache)
                hidden = attention.hidden
                if number < 0:
                    attended.append(hidden)
                after = layer.feed_forward(Stream(hidden), layer.feed_forward_norm, window.batch)
                stream.write(place, after.hidden)
        if not has_experts(self._config, index):
            return None
        assert isinstance(layer.feed_forward, Experts)
        routed = self._route(layer.feed_forward, layer.feed_forward_norm, torch.cat(attended))
        changed, experts = self._watch(index, weights, *routed)
        exact, stream = self._stream(-1), self._stream(index)
        for place, change in enumerate(changed.chunk(len(self._windows))):
            stream.write(place, exact.read(place, self._base.device) + change)
        return experts

    def _route(
        self, experts: Experts, norm: RmsNorm, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The experts' inputs, (N, hidden), and each token's weights and choices, (N, k)."""
        x = norm(hidden)
        return (x, *choose(x, experts.router, self._windows[0].batch))

    def _watch(
        self, index: int, weights: LayerWeights, x: torch.Tensor, gates: torch.Tensor, chosen: torch.Tensor
    ) -> tuple[torch.Tensor, _LayerExperts]:
        """What the smallest format changes in the layer's output, (N, hidden), and what was seen of each expert."""
        changed, seen = torch.zeros_like(x), []
        errors = torch.zeros(len(self._formats), *chosen.shape, device=x.device)
        for expert in range(self._config.moe.experts):
            name = f"model.layers.{index}.mlp.experts.{expert}"
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            gate = gates[rows, places].unsqueeze(1)
            output = _expert_output(x[rows], weights, name)
            for number, plan in enumerate(self._formats):
                change = gate * (_expert_output(x[rows], _quantized(weights, name, plan), name) - output)
                errors[number, rows, places] = change.square().sum(dim=1)
                if number == 0:
                    changed.index_add_(0, rows, change)
            contribution = float((gate.squeeze(1) * output.norm(dim=1)).sum())
            seen.append(_Expert(name, rows, places, float(gate.sum()), contribution))
        return changed, _LayerExperts(seen, errors.cpu())

    def _divergences(self) -> dict[int, torch.Tensor]:
        """For each layer of experts: (N,) divergence of each token's distribution, nats."""
        gain = self._base.tensor(FINAL_NORM)
        head = self._base.linear(self._base.outer_layers()[-1])
        norm = RmsNorm(gain, self._config.eps)
        exact = self._streams[-1]
        parts: dict[int, list[torch.Tensor]] = {index: [] for index in self._streams if index >= 0}
        tokens = 0
        for place in range(exact.windows):
            for rows in torch.split(exact.read(place, self._base.device), LOGITS_AT_ONCE):
                start = tokens % self._windows[0].batch.token_ids.shape[0]
                tokens += rows.shape[0]
                true = (norm(rows) @ head.t()).log_softmax(-1)
                for index, found in parts.items():
                    changed = self._streams[index].read(place, self._base.device)[start : start + rows.shape[0]]
                    own = (norm(changed) @ head.t()).log_softmax(-1)
                    found.append(functional.kl_div(own, true, reduction="none", log_target=True).sum(dim=1).cpu())
        return {index: torch.cat(found) for index, found in parts.items()}


@dataclass(frozen=True, slots=True)
class _Expert:
    """What was seen of one expert."""

    name: str
    rows: torch.Tensor
    """(n,) tokens that chose it; and for each, (n,), which of its choices it was."""
    places: torch.Tensor
    gate_weight: float
    """Summed over the tokens."""
    contribution: float


@dataclass(frozen=True, slots=True)
class _LayerExperts:
    """All experts of one layer."""

    seen: list[_Expert]
    errors: torch.Tensor
    """(formats, N, k): squared change of the layer's output by each token's experts."""

    def activities(self, divergence: torch.Tensor) -> list[ExpertActivity]:
        """``divergence``: (N,) of each token's distribution, with all experts in the smallest format."""
        whole = self.errors[0].sum(dim=1, keepdim=True)
        losses = self.errors * (divergence.unsqueeze(1) / torch.where(whole > 0, whole, 1.0)) / divergence.shape[0]
        return [
            ExpertActivity(
                name=each.name,
                tokens=each.rows.shape[0],
                gate_weight=each.gate_weight / max(1, each.rows.shape[0]),
                contribution=each.contribution / max(1, each.rows.shape[0]),
                losses=[max(0.0, float(of_format[each.rows.cpu(), each.places.cpu()].sum())) for of_format in losses],
            )
            for each in self.seen
        ]


def _quantized(weights: LayerWeights, expert: str, plan: Mapping[str, LayerPlan]) -> LayerWeights:
    """One expert rounded to the nearest."""
    names = [f"{expert}.{part}" for part in PARTS]
    rounded = LayerWeights({f"{name}.weight": weights.tensors[f"{name}.weight"] for name in names})
    for name in names:
        if name in plan:
            rounded.replace(name, _rounded(rounded.tensors[f"{name}.weight"], plan[name], name))
    return rounded


def _rounded(weight: torch.Tensor, plan: LayerPlan, name: str) -> QuantizedMatrix:
    """Whatever the method: the order of experts by loss is the same, and rounding takes a moment. A fixed input scale
    would need the layer's inputs, so inputs are scaled token by token here."""
    try:
        return RoundToNearest().quantize(weight, None, replace(plan.scheme, static_input=False))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _expert_output(x: torch.Tensor, weights: LayerWeights, expert: str) -> torch.Tensor:
    """(N, hidden) -> (N, hidden), before the router's weight."""
    gate, up, down = (CalibratedLinear(weights, (f"{expert}.{part}",), 0, 0) for part in PARTS)
    return down.product(silu_mul(torch.cat((gate.product(x, None), up.product(x, None)), dim=1)), None)
