"""Scales of an fp8 KV cache where the checkpoint has none: from what one fixed prompt reaches in each layer.

Scales are fixed before the first request, because blocks that were written under one scale cannot be read under
another. The prompt's tokens are drawn from the whole vocabulary, so no tokenizer is needed.
"""

from __future__ import annotations

import torch

from engines.generation import kv_cache
from engines.kernels.reference import LARGEST_FP8
from engines.models.batch import Batch, KvLayout, LayerCache
from engines.models.kv_scales import round_up
from engines.models.model import Model

TOKENS = 256
MARGIN = 4.0
"""How much larger than in the prompt a number may become before it is cut."""
SEED = 20


def choose_scales(
    model: Model, first_token: int | None, model_len: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Each layer's scales, ``model.kv_layout.scale_shape`` float32: the checkpoint's, else calibrated ones.

    ``first_token`` begins the prompt, as it begins every text: what stands first is often far larger than the rest.
    ``dtype`` is that of the activations.
    """
    if model.kv_scales:
        return model.kv_scales
    length = min(TOKENS, model_len)
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(model.vocab_size, (length,), generator=generator)
    if first_token is not None:
        tokens[0] = first_token
    blocks = -(-length // kv_cache.BLOCK_SIZE)
    caches = kv_cache.allocate(model.kv_layout, blocks, kv_cache.BLOCK_SIZE, dtype, device)
    model.forward(Batch.of_prompt(tokens.to(device), blocks), caches)
    return tuple(scales_of(model.kv_layout, cache) for cache in caches)


def scales_of(layout: KvLayout, cache: LayerCache) -> torch.Tensor:
    """``layout.scale_shape`` float32: with them, ``MARGIN`` times the largest numbers in the cache fit in fp8."""
    if layout.latent_rank is None:
        largest = torch.stack([tensor.abs().amax(dim=(0, 1, 3)) for tensor in cache])
    else:
        parts = cache[0].abs().amax(dim=(0, 1)).tensor_split([layout.latent_rank])
        largest = torch.cat([part.amax().expand(part.shape[0]) for part in parts])
    largest = largest.float()
    # A head that the prompt left at zero says nothing of other prompts.
    return round_up(torch.where(largest > 0, largest, LARGEST_FP8) * (MARGIN / LARGEST_FP8))
