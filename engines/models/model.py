"""What every model here is: an embedding, layers of attention and MLP with RMS norms before each, and a head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from engines import kernels
from engines.models.batch import Batch, KvLayout, LayerCache
from engines.models.layers import Linear


class Attention(Protocol):
    def __call__(self, x: torch.Tensor, batch: Batch, cache: LayerCache) -> torch.Tensor:
        """(T, hidden) -> (T, hidden); writes this step's KV first."""


class FeedForward(Protocol):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(T, hidden) -> (T, hidden)."""


@dataclass(frozen=True, slots=True)
class Layer:
    attention_norm: torch.Tensor
    attention: Attention
    feed_forward_norm: torch.Tensor
    feed_forward: FeedForward


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A loaded model. In float32 on the CPU a token's result does not depend on the other tokens of the step."""

    embedding: torch.Tensor
    """(vocab, hidden)."""
    layers: tuple[Layer, ...]
    final_norm: torch.Tensor
    head: Linear
    eps: float
    kv_layout: KvLayout
    vocab_size: int
    max_context: int
    """Longest sequence in tokens."""
    weight_bytes: int
    """All that was allocated at load: weights and the table of positions."""

    @torch.inference_mode()
    def forward(self, batch: Batch, caches: list[LayerCache]) -> torch.Tensor:
        """Write the tokens' KV into ``caches`` (one a layer) and return their last hidden states, (T, hidden)."""
        residual = functional.embedding(batch.token_ids, self.embedding)
        x = kernels.rms_norm(residual, self.layers[0].attention_norm, self.eps)
        next_norms = [*(layer.attention_norm for layer in self.layers[1:]), self.final_norm]
        for layer, cache, next_norm in zip(self.layers, caches, next_norms, strict=True):
            x = layer.attention(x, batch, cache)
            x, residual = kernels.add_rms_norm(x, residual, layer.feed_forward_norm, self.eps)
            x = layer.feed_forward(x)
            x, residual = kernels.add_rms_norm(x, residual, next_norm, self.eps)
        return x

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(S, hidden) rows of ``forward``'s result -> (S, vocab) float32."""
        return self.head(hidden).float()
