"""The student as it is trained: DeepSeek-V2 with latent attention, in plain differentiable torch.

All experts compute all tokens, and the weights of those that were not chosen are zero: two large products, which at
this size are faster than gathering tokens. The engine computes the same function on the exported weights.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from compression.student.shape import EPS, Shape

INITIAL_STD = 0.03


class Rotation(nn.Module):
    """Rotary positions of DeepSeek-V2: pairs are neighbours (2i, 2i + 1)."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, shape: Shape, theta: float = 10000.0) -> None:
        super().__init__()
        frequencies = theta ** -(torch.arange(0, shape.rope, 2, dtype=torch.float64) / shape.rope)
        angles = torch.outer(torch.arange(shape.context, dtype=torch.float64), frequencies)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """(B, H, S, rope) -> the same, rotated."""
        cos, sin = self.cos[: heads.shape[2]], self.sin[: heads.shape[2]]
        first, second = heads.float().reshape(*heads.shape[:-1], -1, 2).unbind(-1)
        rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return rotated.flatten(-2).to(heads.dtype)


class LatentAttention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.query, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(shape.hidden, shape.latent + shape.rope, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(shape.latent, eps=EPS)
        self.kv_b_proj = nn.Linear(shape.latent, shape.heads * (shape.nope + shape.value), bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.value, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor, rotate: Rotation) -> torch.Tensor:
        shape = self.shape
        queries = self._heads(self.q_proj(x))
        latent, shared_key = torch.split(self.kv_a_proj_with_mqa(x), [shape.latent, shape.rope], dim=-1)
        up = self._heads(self.kv_b_proj(self.kv_a_layernorm(latent.float())))
        plain_keys, values = torch.split(up, [shape.nope, shape.value], dim=-1)
        plain, turned = torch.split(queries, [shape.nope, shape.rope], dim=-1)
        turned_key = rotate(shared_key.unsqueeze(1)).expand(-1, shape.heads, -1, -1)
        queries = torch.cat((plain, rotate(turned)), dim=-1)
        keys = torch.cat((plain_keys, turned_key), dim=-1)
        attended = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        output: torch.Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return output

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, H * D) -> (B, H, S, D)."""
        return x.view(*x.shape[:-1], self.shape.heads, -1).transpose(1, 2)


class Mlp(nn.Module):
    """A dense feed-forward; also the shared experts, which are one wider one."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The output, and nothing: it has no router."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x)), None


class Mixture(nn.Module):
    """Routed and shared experts. The router computes in float32."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.gate = nn.Parameter(torch.empty(shape.experts, shape.hidden))
        self.expert_gate = nn.Parameter(torch.empty(shape.experts, shape.intermediate, shape.hidden))
        self.expert_up = nn.Parameter(torch.empty(shape.experts, shape.intermediate, shape.hidden))
        self.expert_down = nn.Parameter(torch.empty(shape.experts, shape.hidden, shape.intermediate))
        self.shared_experts = Mlp(shape.hidden, shape.shared * shape.intermediate)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The output, and (2, experts): each one's share of the tokens, 1 when all get the same, and its mean
        probability."""
        with torch.autocast(x.device.type, enabled=False):
            probabilities = functional.linear(x.float(), self.gate.float()).softmax(dim=-1)
        weights, experts = probabilities.topk(self.shape.chosen, dim=-1)
        sparse = torch.zeros_like(probabilities).scatter(-1, experts, weights)
        tokens = sparse.flatten(0, -2)
        load = (tokens > 0).float().mean(dim=0) * (self.shape.experts / self.shape.chosen)
        usage = torch.stack((load, probabilities.flatten(0, -2).mean(dim=0)))
        gates = functional.linear(x, self.expert_gate.flatten(0, 1))
        inner = functional.silu(gates) * functional.linear(x, self.expert_up.flatten(0, 1))
        by_expert = inner.view(*inner.shape[:-1], self.shape.experts, -1)
        weighted = by_expert * sparse.to(inner.dtype).unsqueeze(-1)
        down = self.expert_down.transpose(0, 1).flatten(1)
        return functional.linear(weighted.flatten(-2), down) + self.shared_experts(x)[0], usage


class DecoderLayer(nn.Module):
    def __init__(self, shape: Shape, dense: bool) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=EPS)
        self.self_attn = LatentAttention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=EPS)
        self.mlp = Mlp(shape.hidden, shape.dense_intermediate) if dense else Mixture(shape)

    def forward(self, hidden: torch.Tensor, rotate: Rotation) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotate)
        output, usage = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + output, usage


class Student(nn.Module):
    """Embedding, layers, norm; the head is the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(DecoderLayer(shape, dense=index == 0) for index in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=EPS)
        self.rotation = Rotation(shape)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, S) int64 -> (B, S, vocab) logits, and (mixtures, 2, experts) as of ``Mixture``."""
        hidden = self.embed_tokens(tokens)
        usages = []
        for layer in self.layers:
            hidden, usage = layer(hidden, self.rotation)
            if usage is not None:
                usages.append(usage)
        return functional.linear(self.norm(hidden), self.embed_tokens.weight), torch.stack(usages)


def balance_loss(usage: torch.Tensor) -> torch.Tensor:
    """(mixtures, 2, experts) -> (mixtures,): DeepSeek-V2 (arXiv 2405.04434, equation 23); 1 when all get the same."""
    return usage.prod(dim=1).sum(dim=1)


def initialise(model: Student, seed: int) -> None:
    """Normal weights; those that write into the residual stream are smaller the more layers there are."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            continue
        into_stream = name.endswith(("o_proj.weight", "down_proj.weight", "expert_down"))
        std = INITIAL_STD / (2 * model.shape.layers) ** 0.5 if into_stream else INITIAL_STD
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def checkpoint_tensors(model: Student) -> dict[str, torch.Tensor]:
    """Weights under the names of a Hugging Face checkpoint, on the CPU in float32, experts one by one."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().float().cpu()
        layer, _, kind = name.rpartition(".")
        if kind == "gate":
            tensors[f"model.{layer}.gate.weight"] = value
        elif kind.startswith("expert_"):
            part = kind.removeprefix("expert_")
            for expert, weight in enumerate(value):
                tensors[f"model.{layer}.experts.{expert}.{part}_proj.weight"] = weight.clone()
        else:
            tensors[f"model.{name}"] = value
    return tensors
