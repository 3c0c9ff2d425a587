"""What a model computes for a token and reads in a step, counted from its shape."""

from __future__ import annotations

from engines.models.config import DecoderConfig, DeepseekConfig, ModelConfig
from engines.models.model import Model
from engines.models.rope import table_bytes
from engines.protocol import ModelWork


def count_work(config: ModelConfig, model: Model, kv_itemsize: int) -> ModelWork:
    """``model`` is the one of ``config``, loaded; ``kv_itemsize`` in bytes.

    Bytes are spread evenly over the weights: where experts are stored in another width than the rest, what is read
    of each is an average.
    """
    head = config.vocab * config.hidden
    dense, expert, experts, used = _layer_weights(config)
    decode, prompt = _pair_products(config)
    byte = _bytes_read(config, model) / (head + dense + experts * expert)
    return ModelWork(
        token_flops=2.0 * (dense + used * expert),
        row_flops=2.0 * head,
        decode_pair_flops=2.0 * config.layers * config.heads * decode,
        prompt_pair_flops=2.0 * config.layers * config.heads * prompt,
        weight_bytes=byte * (head + dense),
        kv_token_bytes=float(model.kv_layout.bytes_per_token(kv_itemsize)),
        experts=experts,
        experts_per_token=used,
        expert_bytes=byte * expert,
    )


def _bytes_read(config: ModelConfig, model: Model) -> float:
    """Of all weights but the embedding, unless it is the head too; on the CPU that has a copy of its own."""
    shared = config.tied_head and model.embedding.device.type != "cpu"
    spare = 0 if shared else model.embedding.nbytes
    return float(model.weight_bytes - table_bytes(config.rope, model.max_context) - spare)


def _layer_weights(config: ModelConfig) -> tuple[float, float, int, int]:
    """Of all layers together: weights that every token takes; those of one routed expert; how many of these a layer
    has; how many a token takes."""
    if isinstance(config, DecoderConfig):
        attention = config.hidden * config.head_dim * 2 * (config.heads + config.kv_heads)
        return config.layers * (attention + 3.0 * config.hidden * config.intermediate), 0.0, 0, 0
    moe = config.moe
    sparse = config.layers - moe.dense_layers
    shared = 3.0 * config.hidden * moe.shared_intermediate + moe.experts * config.hidden
    dense = moe.dense_layers * 3.0 * config.hidden * config.intermediate + sparse * shared
    expert = sparse * 3.0 * config.hidden * moe.intermediate
    return config.layers * _latent_weights(config) + dense, expert, moe.experts, moe.experts_per_token


def _latent_weights(config: DeepseekConfig) -> float:
    """Of one layer's latent attention."""
    query = config.heads * (config.nope_dim + config.rope.dim)
    low_rank = config.q_lora_rank
    queries = config.hidden * query if low_rank is None else low_rank * (config.hidden + query)
    latent = config.hidden * (config.kv_lora_rank + config.rope.dim)
    expand = config.kv_lora_rank * config.heads * (config.nope_dim + config.value_dim)
    return float(queries + latent + expand + config.heads * config.value_dim * config.hidden)


def _pair_products(config: ModelConfig) -> tuple[int, int]:
    """Multiplications of a head for one query-key pair, the score and the value's share: of decodes, and of prompts.

    Latent attention is cheaper over the latent when one query reads it, and over keys and values when many do.
    """
    if isinstance(config, DecoderConfig):
        return 2 * config.head_dim, 2 * config.head_dim
    return 2 * config.kv_lora_rank + config.rope.dim, config.nope_dim + config.rope.dim + config.value_dim
