"""Mixture of experts as DeepSeek-V2 and V3 have it: routed experts beside shared ones."""

from __future__ import annotations

import torch

from engines import kernels
from engines.kernels import RmsNorm
from engines.models.config import MoeConfig
from engines.models.layers import ModelBuilder


class Experts:
    """The feed-forward of an expert layer. No step waits for the device, and none depends on other tokens."""

    def __init__(self, config: MoeConfig, hidden: int, builder: ModelBuilder, name: str) -> None:
        self.config = config
        router = builder.tensor(f"{name}.gate.weight", (config.experts, hidden), dtype=torch.float32)
        self.router = builder.plain(router)
        self.correction: torch.Tensor | None = None
        if config.correction_bias:
            bias = f"{name}.gate.e_score_correction_bias"
            self.correction = builder.tensor(bias, (config.experts,), dtype=torch.float32)
        experts = [f"{name}.experts.{index}" for index in range(config.experts)]
        width = config.intermediate
        gate_up = [{f"{expert}.gate_proj": width, f"{expert}.up_proj": width} for expert in experts]
        self.gate_up = builder.grouped_linear(gate_up, hidden)
        self.down = builder.grouped_linear([{f"{expert}.down_proj": hidden} for expert in experts], width)
        self.shared = builder.mlp(f"{name}.shared_experts", hidden, config.shared_intermediate)
        self.numbers = torch.arange(config.experts, device=router.device)

    def __call__(self, hidden: torch.Tensor, norm: RmsNorm) -> torch.Tensor:
        """The residual stream, (T, hidden), in and out."""
        x = norm(hidden)
        weights, experts = route(self.router(x.float()), self.config, self.correction)
        chosen, order = experts.flatten().sort(stable=True)
        ends = torch.searchsorted(chosen, self.numbers, right=True).int()
        per_token = self.config.experts_per_token
        routed = self.down(kernels.silu_mul(self.gate_up(x[order // per_token], ends)), ends)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0], device=order.device)
        weighted = routed[back].view(-1, per_token, x.shape[1]) * weights.unsqueeze(-1)
        total = self.shared(hidden, norm).float()
        # One by one: the order of a reduction could depend on how many tokens there are.
        for rank in range(per_token):
            total = total + weighted[:, rank]
        return total.to(x.dtype)


def route(
    logits: torch.Tensor, config: MoeConfig, correction: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, experts) float32 router logits -> weights (T, k) float32 and experts (T, k) int64."""
    scores = _sigmoid(logits) if config.scoring == "sigmoid" else logits.softmax(dim=-1)
    ranked = scores if correction is None else scores + correction
    if config.groups > 1:
        grouped = ranked.view(ranked.shape[0], config.groups, -1)
        strength = grouped.amax(dim=-1) if correction is None else grouped.topk(2, dim=-1).values.sum(dim=-1)
        best = strength.topk(config.top_groups, dim=-1).indices
        closed = torch.ones_like(strength, dtype=torch.bool).scatter_(1, best, value=False)
        ranked = grouped.masked_fill(closed.unsqueeze(-1), -torch.inf).flatten(1)
    experts = ranked.topk(config.experts_per_token, dim=-1).indices
    weights = scores.gather(1, experts)
    if not config.normalise:
        return weights * config.scale, experts
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    # V2's own code scales only weights that it did not normalise; V3's scales both.
    return (weights * config.scale if config.scoring == "sigmoid" else weights), experts


def _sigmoid(logits: torch.Tensor) -> torch.Tensor:
    """As a softmax over (x, 0), which works row by row: torch's own sigmoid computes what is left over after whole
    vectors in another way, so that a token's last bit would depend on its place in the step."""
    return torch.stack((logits, torch.zeros_like(logits)), dim=-1).softmax(dim=-1)[..., 0]
