"""SmolLM2 in ``transformers``, in fp32: the reference of a test, and a peer of a benchmark."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers

from engines.gguf_header import read_gguf_header
from engines.manifest import Manifest


def reference_model(manifest: Manifest) -> Any:
    """``LlamaForCausalLM`` with weights read here by hand, without our loader."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    keys: tuple[str, ...] = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    keys += ("vocab_size", "max_position_embeddings", "rms_norm_eps")
    values = {key: manifest.config[key] for key in keys}
    config = transformers.LlamaConfig(
        **values, rope_parameters={"rope_theta": manifest.config["rope_theta"]}, tie_word_embeddings=True
    )
    model = transformers.LlamaForCausalLM(config).eval()
    data = np.fromfile(manifest.source, dtype=np.uint8)
    state = {}
    for name, tensor in read_gguf_header(manifest.source).tensors.items():
        raw = data[tensor.offset : tensor.offset + tensor.nbytes].reshape(*tensor.shape[:-1], -1)
        whole = dequantize(raw, GGMLQuantizationType[tensor.type]).reshape(tensor.shape)
        if "attn_q." in name or "attn_k." in name:
            heads = whole.shape[0] // 64
            whole = whole.reshape(heads, 32, 2, -1).swapaxes(1, 2).reshape(whole.shape)
        state[their_name(name)] = torch.from_numpy(np.array(whole, dtype=np.float32))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return model


def their_name(name: str) -> str:
    for theirs, ours in (
        ("token_embd", "model.embed_tokens"),
        ("output_norm", "model.norm"),
        ("blk", "model.layers"),
        ("attn_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("attn_output", "self_attn.o_proj"),
        ("attn_", "self_attn."),
        ("ffn_", "mlp."),
        (".q.", ".q_proj."),
        (".k.", ".k_proj."),
        (".v.", ".v_proj."),
        (".gate.", ".gate_proj."),
        (".up.", ".up_proj."),
        (".down.", ".down_proj."),
    ):
        name = name.replace(theirs, ours)
    return name
