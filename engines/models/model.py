"""What every model here is: an embedding, layers of attention and MLP with RMS norms before each, and a head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from engines.kernels import Fusion, RmsNorm
from engines.models.batch import Batch, KvLayout, LayerCache
from engines.models.layers import Embedding, Linear


class Attention(Protocol):
    def __call__(self, hidden: torch.Tensor, norm: RmsNorm, batch: Batch, cache: LayerCache) -> torch.Tensor:
        """The residual stream, (T, hidden), and its norm before attention -> the stream after; writes the step's KV.

        The stream after may lie in the memory of the one before."""


class FeedForward(Protocol):
    def __call__(self, hidden: torch.Tensor, norm: RmsNorm, batch: Batch) -> torch.Tensor:
        """The residual stream, (T, hidden), and its norm before the layer -> the stream after, as for attention."""


@dataclass(frozen=True, slots=True)
class Layer:
    attention_norm: RmsNorm
    attention: Attention
    feed_forward_norm: RmsNorm
    feed_forward: FeedForward


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A loaded model. In float32 on the CPU a token's result does not depend on the other tokens of the step."""

    embedding: Embedding
    layers: tuple[Layer, ...]
    final_norm: RmsNorm
    head: Linear
    kv_layout: KvLayout
    vocab_size: int
    max_context: int
    """Longest sequence in tokens."""
    kv_scales: tuple[torch.Tensor, ...] = ()
    """What the checkpoint says of fp8 KV: one tensor a layer, ``kv_layout.scale_shape``. Empty if it says nothing."""
    weight_bytes: int
    """All that was allocated at load: weights and the table of positions."""

    @torch.inference_mode()
    def forward(self, batch: Batch, caches: list[LayerCache]) -> torch.Tensor:
        """Write the tokens' KV into ``caches`` (one a layer) and return their residual stream, (T, hidden)."""
        hidden = self.embedding(batch.token_ids)
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden = layer.attention(hidden, layer.attention_norm, batch, cache)
            hidden = layer.feed_forward(hidden, layer.feed_forward_norm, batch)
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        """(S, hidden) rows of ``forward``'s result -> (S, vocab) float32, in ``into`` where given."""
        return self.head(hidden, Fusion(norm=self.final_norm, dtype=torch.float32, into=into))
