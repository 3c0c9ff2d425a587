"""Small tokenizers with visible piece borders, as GGUF metadata and files, as folders, and random mixed texts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engines.manifest import Manifest, read_manifest
from server.text.detokenize import BYTE_OF_CHAR

TEXTS = (
    "Hello world! It's we'll THEY'VE 'Sure' don't",
    "The year 1998  and\n42 digits,\t7\n\n  8 spaces   9 ",
    "½ cup, x² + y³, Ⅷ ① ٠١٢ १२३ 〇一二三 ㊀ 𝟘𝟙 12345678",
    "你好，世界！今天是2024年5月1日。 人工智能，カタカナ ひらがな 한국어",
    "def f(x):\n    return x['a'] + 1  # ~/tmp/*.py\r\n\tif a<=b&&c!=d: pass\n",
    "👨‍👩‍👧 👍🏽 🇩🇪 e\u0301 n\u0303o \u093f\u064b Ünïcödé ſK",
    "\x00\x05a\x05b!\x05! \x0b\x0c\x1f\x7f\x85\xa0\u1680\u2009\u2028\u3000x\u200b\ufeff",
    "<|im_start|>user\n<think>1 < 2</think><|im_end|>\n<s> <|im_end |>",
    "~ ~~ x~y ~é $5 + £6 = €11 ^`| «quoted» —dash—\u1b4e\ua7da\U00010d40\U0001fae9",
    "   ",
    "",
)
"""What the stored ids are of: languages, code, numerals, blanks, emoji, marks, controls, special tokens, symbols."""

_CONTROL_TOKENS = ["<unk>", "<s>", "<|im_start|>", "<|im_end|>"]
_MISSING = b"\x03\x04\x05"
"""Bytes that the vocabulary lacks, as SmolLM2's does some."""


def pair_metadata(pre: str) -> dict[str, Any]:
    """Metadata of a GGUF file whose tokens are bytes and pairs of bytes.

    All bytes of ``TEXTS`` pair with all: within a piece everything merges, so each border between pieces shows.
    """
    letters = {byte: chr(char) for char, byte in BYTE_OF_CHAR.items()}
    common = sorted(set("".join(TEXTS).encode()) - set(_MISSING))
    pairs = [(letters[left], letters[right]) for left in common for right in common]
    tokens = [*_CONTROL_TOKENS, "<think>", "</think>"]
    types = [2] + [3] * (len(_CONTROL_TOKENS) - 1) + [4, 4]
    tokens += [letters[byte] for byte in range(256) if byte not in _MISSING]
    tokens += [left + right for left, right in pairs]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types + [1] * (len(tokens) - len(types)),
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in pairs],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.chat_template": CHATML,
    }


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_gguf(path: Path, metadata: dict[str, Any]) -> None:
    """A model of one layer and random weights around the tokenizer, good enough for llama.cpp to load."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(4096)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(32)
    writer.add_tokenizer_model(metadata["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(metadata["tokenizer.ggml.pre"])
    writer.add_token_list(metadata["tokenizer.ggml.tokens"])
    writer.add_token_types(metadata["tokenizer.ggml.token_type"])
    writer.add_token_merges(metadata["tokenizer.ggml.merges"])
    writer.add_bos_token_id(metadata["tokenizer.ggml.bos_token_id"])
    writer.add_eos_token_id(metadata["tokenizer.ggml.eos_token_id"])
    writer.add_chat_template(metadata["tokenizer.chat_template"])
    draw = np.random.default_rng(0)
    names = [f"blk.0.{name}.weight" for name in ("attn_q", "attn_k", "attn_v", "attn_output")]
    names += [f"blk.0.{name}.weight" for name in ("ffn_gate", "ffn_up", "ffn_down")]
    for name in names:
        writer.add_tensor(name, draw.standard_normal((32, 32), dtype=np.float32))
    embedding = (len(metadata["tokenizer.ggml.tokens"]), 32)
    writer.add_tensor("token_embd.weight", draw.standard_normal(embedding, dtype=np.float32))
    for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"):
        writer.add_tensor(name, np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_config(folder: Path, vocab_size: int, **more: Any) -> Manifest:
    """A folder with the config of a tiny model with random weights, no tokenizer."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
    }
    (folder / "config.json").write_text(json.dumps(config | more))
    return read_manifest(folder, random_weights=True)


FIRST_BYTE = 3
"""Id of the byte 0 in ``sentencepiece_tokenizer``."""


def sentencepiece_tokenizer() -> Tokenizer:
    """Blanks as ``▁``, byte fallback, a blank put in front: as Llama 2 has it."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "▁a",
        "▁b",
        "ab",
        "▁ab",
    ]
    vocab = {word: id for id, word in enumerate(words)}
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words[:3]])
    return tokenizer


_POOLS = (
    "abcdefghijklmnopqrstuvwxyz ETAOIN SHRDLU",
    "0123456789",
    "  \n\t\r ",
    "½²Ⅷ①٠١٢٣०१௧一二三〇৴㊀𝟘¼",
    "中文汉字测试语言模型你好世界。，！？",
    "'s't're've'll'd'm'S'RE'LLſ'ſK's",
    '!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~',
    "😀👍🏽👨‍👩‍👧🇩🇪❤️",
    "\u0301\u0300\u20dd\u093f\u064b",
    "\x00\x01\x04\x07\x0b\x0c\x1c\x1f\x7f\x85\xa0\u200b\u2028\u2029\u3000\u202f\ufeff\u1680",
    "éüßñøåæÀÖĀŁžабвгдЖЩλμπΩאבגدهوहिन्दीไทยかなカナ한국어",
    "  def f(x):\n    return x['a'] + 1\n",
    "<|im_start|><|im_end|>system user <think></think> <s></s>",
    "\ue000\U000f0000\u0378\U0001fae8\U0001f8ff\ufffe\ufffd",
)


def random_text(draw: random.Random) -> str:
    """Up to a dozen runs of characters from different worlds, now and then any code points at all."""
    runs = []
    for _ in range(draw.randint(1, 12)):
        pool = draw.choice(_POOLS)
        length = draw.randint(1, 8)
        if draw.random() < 0.3:
            start = draw.randrange(len(pool))
            runs.append(pool[start : start + length])
        else:
            runs.append("".join(draw.choices(pool, k=length)))
    if draw.random() < 0.15:
        codes = (draw.randrange(0x110000) for _ in range(5))
        runs.append("".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000))
    return "".join(runs)
