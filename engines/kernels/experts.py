"""Mixtures of experts: routing and the products of one layer, the fastest implementation that fits.

``mixture`` is one signature over all: few tokens in bfloat16 on a GPU run four kernels that read each weight once,
many tokens are sorted by expert first, and everything else is composed of plain products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch.nn import functional

from engines.kernels import backends, reference
from engines.kernels.cuda.scratch import counters
from engines.kernels.elementwise import silu_mul
from engines.kernels.linear import SKINNY_TYPES, Fusion, RmsNorm, linear
from engines.kernels.matrices import Matrix
from engines.kernels.packing import PackedLinear, PackedWeight, pack_linear
from engines.kernels.quantized_experts import QuantizedStacks, pack_stacks


class RoutedBatch(Protocol):
    """The fields of a step's batch that routing reads; ``engines.models.batch.Batch`` has them."""

    @property
    def positions(self) -> torch.Tensor:
        """(T,) int64."""

    @property
    def token_ids(self) -> torch.Tensor:
        """(T,) int64."""

    @property
    def cache_slots(self) -> torch.Tensor:
        """(T,) int64; -1 for a token that only fills the step up, whose result nobody reads."""


@dataclass(frozen=True, slots=True)
class RoutingRule:
    """How router logits become weights and experts."""

    experts_per_token: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    groups: int = 1
    """Experts are chosen inside the best ``top_groups`` of these; 1 does not limit them."""
    top_groups: int = 1
    normalise: bool = False
    scale: float = 1.0
    uniform_layer: int | None = None
    """Experts are drawn uniformly at random instead, afresh for each token and place; the number of the layer."""


@dataclass(frozen=True, slots=True)
class Router:
    """The router of one layer."""

    weight: PackedLinear
    """(experts, width) float32."""
    correction: torch.Tensor | None
    """(experts,) float32: takes part in the choice, not in the weights; groups then rank by the sum of two."""
    rule: RoutingRule


@dataclass(frozen=True, slots=True)
class Stacks:
    """All experts of a layer on a GPU, the shared ones last, cut to the routed ones' width."""

    gate_up: torch.Tensor
    """(E, 2 I, width)."""
    down: torch.Tensor
    """(E, width, I)."""
    chosen: int
    shared: int

    @property
    def columns(self) -> int:
        return self.chosen + self.shared

    def tiles(self, tokens: int, pairs: int) -> int:
        """At most so many tiles of ``pairs`` pairs one step of ``tokens`` tokens has, over all experts."""
        return self.chosen_tiles(tokens, pairs) + self.shared * -(-tokens // pairs)

    def chosen_tiles(self, tokens: int, pairs: int) -> int:
        """The same over the routed experts alone."""
        routed, routed_pairs = self.gate_up.shape[0] - self.shared, tokens * self.chosen
        active = min(routed, routed_pairs)
        return active + (routed_pairs - active) // pairs


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """Routed and shared experts in the layout that ``mixture`` reads."""

    gate_up: tuple[PackedWeight, ...]
    """On the CPU, and where experts are quantized: one an expert; so ``down``."""
    down: tuple[PackedWeight, ...]
    shared: tuple[PackedWeight, PackedWeight] | None
    """Beside them: gate and up, down."""
    stacks: Stacks | None
    """Otherwise: all of them."""
    quantized: QuantizedStacks | None = None
    """Or the routed ones, on a GPU where some of them are quantized, in place of ``gate_up`` and ``down``."""


def pack_experts(
    gate_up: Sequence[Sequence[Matrix]],
    down: Sequence[Matrix],
    shared: tuple[Sequence[Matrix], Matrix],
    experts_per_token: int,
) -> PackedExperts:
    """(I, width) gate and up and (width, I) down of each expert, and of the shared ones, which are one wider layer."""
    everything = [*down, shared[1], *(part for parts in (*gate_up, shared[0]) for part in parts)]
    plain = [matrix for matrix in everything if isinstance(matrix, torch.Tensor) and not matrix.is_cpu]
    if len(plain) < len(everything):
        both = (pack_linear(*shared[0]), pack_linear(shared[1]))
        device = (down[0] if isinstance(down[0], torch.Tensor) else down[0].codes).device
        if device.type != "cpu" and (quantized := pack_stacks(gate_up, down, experts_per_token)) is not None:
            counters(device)
            return PackedExperts((), (), both, None, quantized)
        return PackedExperts(
            tuple(pack_linear(*parts) for parts in gate_up),
            tuple(pack_linear(matrix) for matrix in down),
            both,
            None,
        )
    counters(plain[0].device)
    wide = [_joined(parts) for parts in (*gate_up, shared[0])]
    return PackedExperts((), (), None, _stacks(wide, plain[: len(down) + 1], experts_per_token))


def _joined(parts: Sequence[Matrix]) -> torch.Tensor:
    return torch.cat([part for part in parts if isinstance(part, torch.Tensor)])


def _stacks(gate_up: list[torch.Tensor], down: list[torch.Tensor], experts_per_token: int) -> Stacks:
    """The shared ones' weights stand last."""
    wide, narrow = cut_shared(gate_up[-1], down[-1], inner=down[0].shape[1])
    return Stacks(
        torch.stack([*gate_up[:-1], *wide]), torch.stack([*down[:-1], *narrow]), experts_per_token, len(narrow)
    )


def cut_shared(gate_up: torch.Tensor, down: torch.Tensor, inner: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """One wide layer as several of width ``inner``, whose outputs sum to its; zeros fill the last one up."""
    width = down.shape[1]
    missing = -width % inner
    gate, up = (functional.pad(half, (0, 0, 0, missing)) for half in (gate_up[:width], gate_up[width:]))
    down = functional.pad(down, (0, missing))
    places = [slice(first, first + inner) for first in range(0, width, inner)]
    return [torch.cat((gate[place], up[place])) for place in places], [down[:, place] for place in places]


def mixture(
    hidden: torch.Tensor, norm: RmsNorm, router: Router, packed: PackedExperts, batch: RoutedBatch
) -> torch.Tensor:
    """(T, width) residual stream, whose memory may be taken -> the stream after the layer. Never waits for the device.

    In float32 on the CPU a token's result does not depend on the others of the step.
    """
    stacks = packed.stacks
    if stacks is not None and hidden.dtype is torch.bfloat16:
        triton = backends.triton_for(hidden, stacks.gate_up)
        if triton is not None:
            if _fits_kernel(router):
                return triton.mixture(hidden, norm.weight, norm.eps, router, stacks, batch)
            normed = norm(hidden)
            weights, experts = choose(normed, router, batch)
            return triton.sorted_mixture(hidden, normed, weights, experts, stacks, batch.cache_slots)
    if packed.quantized is not None:
        return _quantized_mixture(hidden, norm, router, packed, packed.quantized, batch)
    return _composed(hidden, norm, router, packed, batch)


def _fits_kernel(router: Router) -> bool:
    """Whether one kernel routes: softmax, without groups and correction, over a power of two of experts."""
    rule, experts = router.rule, router.weight.out_features
    plain = rule.scoring == "softmax" and rule.groups == 1 and router.correction is None
    return plain and 16 <= experts <= 256


def _quantized_mixture(
    hidden: torch.Tensor,
    norm: RmsNorm,
    router: Router,
    packed: PackedExperts,
    stacks: QuantizedStacks,
    batch: RoutedBatch,
) -> torch.Tensor:
    """The kernels read 16-bit floats; what is wider goes through bfloat16, whose range it may need."""
    stream = hidden if hidden.dtype in SKINNY_TYPES else hidden.bfloat16()
    triton = backends.triton_for(stream)
    assert triton is not None, "weights in its layout are packed only where there is Triton"
    if _fits_kernel(router) and stream.dtype is torch.bfloat16:
        routed = triton.route(stream, norm.weight, norm.eps, router, batch)
    else:
        normed = norm(stream)
        routed = triton.routed(normed, *choose(normed, router, batch), batch.cache_slots)
    return triton.quantized_mixture(_add_shared(stream, norm, packed), routed, stacks).to(hidden.dtype)


def _composed(
    hidden: torch.Tensor, norm: RmsNorm, router: Router, packed: PackedExperts, batch: RoutedBatch
) -> torch.Tensor:
    x = norm(hidden)
    weights, experts = choose(x, router, batch)
    per_token = weights.shape[1]
    chosen, order = experts.flatten().sort(stable=True)
    numbers = torch.arange(router.weight.out_features, device=x.device)
    ends = torch.searchsorted(chosen, numbers, right=True).int()
    routed = _routed_products(x[order // per_token], packed, ends)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0], device=order.device)
    weighted = routed[back].view(-1, per_token, x.shape[1]) * weights.unsqueeze(-1)
    total = _add_shared(hidden, norm, packed).float()
    # One by one: the order of a reduction could depend on how many tokens there are.
    for rank in range(per_token):
        total = total + weighted[:, rank]
    return total.to(x.dtype)


def _routed_products(x: torch.Tensor, packed: PackedExperts, ends: torch.Tensor) -> torch.Tensor:
    """(N, width) by expert, rows ``ends[e-1] .. ends[e]-1`` of expert e -> (N, width)."""
    if packed.stacks is not None:
        routed = ends.shape[0]
        gate_up = packed.stacks.gate_up[:routed].transpose(1, 2)
        gated = silu_mul(functional.grouped_mm(x, gate_up, offs=ends))
        return functional.grouped_mm(gated, packed.stacks.down[:routed].transpose(1, 2), offs=ends)
    output = torch.empty_like(x)
    start = 0
    for wide, narrow, end in zip(packed.gate_up, packed.down, ends.tolist(), strict=True):
        if end > start:
            output[start:end] = linear(linear(x[start:end], wide, fusion=Fusion(gated=True)), narrow)
        start = end
    return output


def _add_shared(hidden: torch.Tensor, norm: RmsNorm, packed: PackedExperts) -> torch.Tensor:
    if packed.shared is not None:
        gated = linear(hidden, packed.shared[0], fusion=Fusion(norm=norm, gated=True))
        return linear(gated, packed.shared[1], fusion=Fusion(residual=hidden, reuse=True))
    assert packed.stacks is not None
    x, total = norm(hidden), hidden
    for expert in range(packed.stacks.gate_up.shape[0] - packed.stacks.shared, packed.stacks.gate_up.shape[0]):
        total = total + silu_mul(x @ packed.stacks.gate_up[expert].t()) @ packed.stacks.down[expert].t()
    return total


def choose(x: torch.Tensor, router: Router, batch: RoutedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, width) -> weights (T, k) float32 and experts (T, k) int64."""
    logits = linear(x.float(), router.weight)
    rule = router.rule
    drawn = None
    if rule.uniform_layer is not None:
        drawn = uniform_scores(batch.positions, batch.token_ids, rule.uniform_layer, logits.shape[1])
    return route(logits, rule, router.correction, drawn)


def route(
    logits: torch.Tensor, rule: RoutingRule, correction: torch.Tensor | None, drawn: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, experts) float32 router logits -> weights (T, k) float32 and experts (T, k) int64.

    ``drawn``, if given, ranks the experts instead of their scores.
    """
    scores = _sigmoid(logits) if rule.scoring == "sigmoid" else logits.softmax(dim=-1)
    ranked = scores if correction is None else scores + correction
    if drawn is not None:
        ranked = drawn
    elif rule.groups > 1:
        grouped = ranked.view(ranked.shape[0], rule.groups, -1)
        strength = grouped.amax(dim=-1) if correction is None else grouped.topk(2, dim=-1).values.sum(dim=-1)
        best = strength.topk(rule.top_groups, dim=-1).indices
        closed = torch.ones_like(strength, dtype=torch.bool).scatter_(1, best, value=False)
        ranked = grouped.masked_fill(closed.unsqueeze(-1), -torch.inf).flatten(1)
    experts = ranked.topk(rule.experts_per_token, dim=-1).indices
    weights = scores.gather(1, experts)
    if not rule.normalise:
        return weights * rule.scale, experts
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    # V2's own code scales only weights that it did not normalise; V3's scales both.
    return (weights * rule.scale if rule.scoring == "sigmoid" else weights), experts


def uniform_scores(positions: torch.Tensor, token_ids: torch.Tensor, layer: int, experts: int) -> torch.Tensor:
    """(T, experts) float32 noise whose order is uniformly random, afresh for each layer, position and token id.

    Entry e is the upper 24 bits of lane ``e % 4`` of Philox with the layer as key, at (e // 4, position, token id, 0).
    """
    positions, token_ids = positions.unsqueeze(1), token_ids.unsqueeze(1)
    zero = torch.zeros_like(positions)
    groups = torch.arange(-(-experts // 4), device=positions.device).unsqueeze(0)
    words = reference.philox_4x32((zero + layer, zero), (groups, positions, token_ids, zero))
    return (torch.stack(words, dim=-1).flatten(1)[:, :experts] >> 8).float()


def _sigmoid(logits: torch.Tensor) -> torch.Tensor:
    """As a softmax over (x, 0), which works row by row: torch's own sigmoid computes what is left over after whole
    vectors in another way, so that a token's last bit would depend on its place in the step."""
    return torch.stack((logits, torch.zeros_like(logits)), dim=-1).softmax(dim=-1)[..., 0]
