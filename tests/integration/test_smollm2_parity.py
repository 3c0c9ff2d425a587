"""SmolLM2 in float32: our greedy output equals that of ``transformers`` on the same prompts and dequantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines.gguf_header import read_gguf_header
from engines.manifest import Manifest, read_manifest
from engines.models.loader import load_model
from engines.protocol import EngineSpec
from server.text.model_text import load_text
from tests.paged_rows import PagedRows

transformers = pytest.importorskip("transformers", reason="transformers is the reference; install .[dev]")

OUTPUT = 64
QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain photosynthesis in two sentences.",
    "List five prime numbers above 100.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Pride and Prejudice?",
    "Give me a recipe for pancakes.",
    "What is 17 times 23?",
    "Describe the colour blue to someone who cannot see.",
    "How do I reverse a list in Python?",
    "Why is the sky dark at night?",
    "Name three rivers in Africa.",
    "Name the planets of the solar system.",
    "What does HTTP stand for?",
    "Summarise the plot of Hamlet.",
)
TEXTS = (
    "The quick brown fox jumps over the lazy dog. Then",
    "def fibonacci(n):\n    ",
    "1, 2, 4, 8, 16,",
    "Once upon a time, in a village by the mountains, there lived",
    "In 1969, the Apollo 11 mission",
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def prompts(smollm2_manifest: Manifest) -> list[list[int]]:
    text = load_text(smollm2_manifest)
    chats = [text.render_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    return [text.encode(chat, add_special=False) for chat in chats] + [
        text.encode(plain, add_special=True) for plain in TEXTS
    ]


@pytest.fixture(scope="module")
def smollm2_manifest(smollm2_path: Path) -> Manifest:
    return read_manifest(smollm2_path)


def test_greedy_output_is_the_same(smollm2_manifest: Manifest, prompts: list[list[int]]) -> None:
    assert len(prompts) == 20
    ours, margins = our_greedy(smollm2_manifest, prompts)
    theirs = their_greedy(smollm2_manifest, prompts)
    for number, (left, right) in enumerate(zip(ours, theirs, strict=True)):
        assert left == right, f"prompt {number}, best logit ahead by at least {margins[number]}"


def our_greedy(manifest: Manifest, prompts: list[list[int]]) -> tuple[list[list[int]], list[float]]:
    """Tokens by prompt, all rows in each step, and by how much the best logit was ahead where it was closest."""
    spec = EngineSpec(name="smollm2", max_model_len=512)
    model = load_model(manifest, spec, torch.device("cpu"), torch.float32, lambda progress: None)
    rows = PagedRows(model, len(prompts), max(map(len, prompts)) + OUTPUT, block_size=16)
    outputs: list[list[int]] = [[] for _ in prompts]
    margins = [torch.inf] * len(prompts)
    step = dict(enumerate(prompts))
    for _ in range(OUTPUT):
        for row, logits in rows.step(step).items():
            best, second = logits[-1].topk(2).values.tolist()
            margins[row] = min(margins[row], best - second)
            outputs[row].append(int(logits[-1].argmax()))
        step = {row: output[-1:] for row, output in enumerate(outputs)}
    return outputs, margins


def their_greedy(manifest: Manifest, prompts: list[list[int]]) -> list[list[int]]:
    """As one batch, padded on the left; end tokens do not end it."""
    reference = reference_model(manifest)
    reference.generation_config.eos_token_id = None
    longest = max(map(len, prompts))
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    with torch.inference_mode():
        generated = reference.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=OUTPUT,
            pad_token_id=0,
        )
    rows: list[list[int]] = generated[:, longest:].tolist()
    return rows


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
