"""What every model here is: an embedding, layers of attention and MLP with RMS norms before each, and a head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from engines.kernels import Fusion, RmsNorm, Stream
from engines.models.batch import Batch, KvLayout, LastTokens, LayerCache
from engines.models.layers import Embedding, Linear


class Attention(Protocol):
    def __call__(
        self,
        stream: Stream,
        norm: RmsNorm,
        batch: Batch,
        cache: LayerCache,
        next_norm: RmsNorm | None = None,
        last: LastTokens | None = None,
    ) -> Stream:
        """The residual stream and its norm before attention -> the stream after; writes the step's KV.

        ``next_norm`` reads the stream next: what the kernel at hand can compute of it goes along. The stream
        after may lie in the memory of the one before. With ``last`` it has those tokens only.
        """


class FeedForward(Protocol):
    takes_handover: bool
    """Whether it gains by a norm that the layer before has begun."""

    def __call__(self, stream: Stream, norm: RmsNorm, batch: Batch, next_norm: RmsNorm | None = None) -> Stream:
        """The residual stream and its norm before the layer -> the stream after; ``next_norm`` as in attention."""


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
    def forward(self, batch: Batch, caches: list[LayerCache], last: LastTokens | None = None) -> torch.Tensor:
        """Write the tokens' KV into ``caches`` (one a layer) and return their residual stream, (T, hidden).

        Or that of ``last`` alone, (S, hidden), which saves most of the last layer.
        """
        return self.through_layers(self.embedding(batch.token_ids), batch, caches, last)

    @torch.inference_mode()
    def through_layers(
        self, hidden: torch.Tensor, batch: Batch, caches: list[LayerCache], last: LastTokens | None = None
    ) -> torch.Tensor:
        """As ``forward``, from the tokens' (T, hidden) embeddings on, whose memory may be taken."""
        stream = Stream(hidden)
        # What follows the last layer takes some rows only: their norm is cheap.
        following = [layer.attention_norm for layer in self.layers[1:]] + [None]
        for layer, cache, next_norm in zip(self.layers, caches, following, strict=True):
            between = layer.feed_forward_norm if layer.feed_forward.takes_handover else None
            ending = last if layer is self.layers[-1] else None
            stream = layer.attention(stream, layer.attention_norm, batch, cache, between, ending)
            batch = batch if ending is None else ending.batch
            stream = layer.feed_forward(stream, layer.feed_forward_norm, batch, next_norm)
        return stream.hidden

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        """(S, hidden) rows of ``forward``'s result -> (S, vocab) float32, in ``into`` where given."""
        return self.head(hidden, Fusion(norm=self.final_norm, dtype=torch.float32, into=into))
