from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from engines.manifest import Manifest
from engines.protocol import EngineLoadError
from server.errors import InvalidRequest
from server.text import ModelText, load_text
from server.text.gguf_tokenizer import build_gguf_tokenizer
from tests.unit.text.tokenizer_files import (
    CHATML,
    pair_metadata,
    random_text,
    sentencepiece_tokenizer,
    write_config,
)


class Folder:
    """One model folder: put files into it, then load it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.loaded: list[ModelText] = []

    def put(self, name: str, value: Any) -> None:
        (self.path / name).write_text(value if isinstance(value, str) else json.dumps(value))

    def put_tokenizer(self, tokenizer: Tokenizer) -> None:
        tokenizer.save(str(self.path / "tokenizer.json"))

    def load(self, vocab_size: int = 22_000, **config: Any) -> ModelText:
        self.loaded.append(load_text(write_config(self.path, vocab_size, **config)))
        return self.loaded[-1]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    made = Folder(tmp_path)
    yield made
    for text in made.loaded:
        text.close()


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return build_gguf_tokenizer(pair_metadata("qwen2"))


def test_a_folder_with_a_byte_level_tokenizer(folder: Folder, byte_level: Tokenizer) -> None:
    folder.put_tokenizer(byte_level)
    folder.put("tokenizer_config.json", {"bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>"})
    text = folder.load()
    ids = text.encode("<s>hé <think>")
    assert text.decode(ids) == "<s>hé <think>"
    assert text.decode(ids, skip_special_tokens=True) == "hé <think>"
    assert text.detokenizer().push(ids) == "hé <think>"
    assert text.detokenizer(skip_special_tokens=False).push(ids) == "<s>hé <think>"
    assert text.token_text(ids[0]) == "<s>"
    assert b"".join(map(text.token_bytes, ids)) == "<s>hé <think>".encode()
    assert text.special_ids == {0, 1, 2, 3}
    assert (text.generated, text.reasoning, text.has_chat_template) == (False, True, False)
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        text.render_chat([{"role": "user", "content": "hi"}])


def test_a_folder_with_a_sentencepiece_tokenizer(folder: Folder) -> None:
    folder.put_tokenizer(sentencepiece_tokenizer())
    text = folder.load(vocab_size=300)
    ids = text.encode("ab é a")
    assert text.decode(ids) == "ab é a"
    detokenizer = text.detokenizer()
    assert "".join(detokenizer.push([id]) for id in ids) + detokenizer.flush() == "ab é a"


@pytest.mark.parametrize(
    ("add_bos", "own_bos", "expected"),
    [(None, False, 0), (None, True, 1), (True, False, 1), (True, True, 1), (False, False, 0), (False, True, 0)],
)
def test_bos_in_front_of_a_prompt(
    folder: Folder, byte_level: Tokenizer, add_bos: bool | None, own_bos: bool, expected: int
) -> None:
    tokenizer = Tokenizer.from_str(byte_level.to_str())
    if own_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.put_tokenizer(tokenizer)
    folder.put("tokenizer_config.json", {"bos_token": "<s>"} | ({} if add_bos is None else {"add_bos_token": add_bos}))
    text = folder.load()
    assert text.encode("ab").count(1) == expected
    assert text.encode("ab", False).count(1) == 0


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": {"chat_template": "one"}}, "one"),
        ({"tokenizer_config.json": {"chat_template": "one"}, "chat_template.jinja": "two"}, "two"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "x", "template": "one"}]}}, "one"),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [{"name": "tool_use", "template": "one"}, {"name": "default", "template": "two"}]
                }
            },
            "two",
        ),
        ({"chat_template.json": {"chat_template": "three"}}, "three"),
    ],
)
def test_where_a_chat_template_is_found(
    folder: Folder, byte_level: Tokenizer, files: dict[str, Any], expected: str
) -> None:
    folder.put_tokenizer(byte_level)
    for name, value in files.items():
        folder.put(name, value)
    assert folder.load().render_chat([]) == expected


def test_a_template_that_opens_the_thought(folder: Folder, byte_level: Tokenizer) -> None:
    folder.put_tokenizer(byte_level)
    folder.put("tokenizer_config.json", {"chat_template": CHATML.replace("assistant\n", "assistant\n<think>\n")})
    text = folder.load()
    assert text.reasoning
    assert text.opens_thinking(text.render_chat([{"role": "user", "content": "hi"}]))
    assert not text.opens_thinking(text.render_chat([{"role": "user", "content": "hi"}], add_generation_prompt=False))


def test_think_tags_are_text_even_as_special_tokens(folder: Folder) -> None:
    tokenizer = sentencepiece_tokenizer()
    tokenizer.add_special_tokens(["<think>", "</think>"])
    folder.put_tokenizer(tokenizer)
    text = folder.load(vocab_size=300)
    ids = text.encode("<s><think>a</think>b</s>", False)
    assert {text.token_text(id) for id in text.special_ids} >= {"<think>", "</think>"}
    assert text.detokenizer().push(ids) == text.decode(ids, skip_special_tokens=True) == "<think>a</think>b"
    assert text.reasoning


def test_text_that_cannot_fit_is_refused_before_it_is_tokenized(folder: Folder, byte_level: Tokenizer) -> None:
    folder.put_tokenizer(byte_level)
    text = folder.load()  # a context of 64 tokens; the longest token is <|im_start|>, 12 bytes
    assert len(text.encode("a" * 64 * 12)) == 32 * 12
    with pytest.raises(InvalidRequest, match="has 65 tokens or more, but at most 64 fit"):
        text.encode("a" * (64 * 12 + 1))
    with pytest.raises(InvalidRequest, match="has 3 tokens or more, but at most 2 fit"):
        text.encode("a" * 25, max_tokens=2)


def test_a_lone_surrogate_is_refused(folder: Folder, byte_level: Tokenizer) -> None:
    folder.put_tokenizer(byte_level)
    with pytest.raises(InvalidRequest, match="lone surrogate"):
        folder.load().encode("a\udc80")


@pytest.mark.parametrize("id", [-1, 22_000])
def test_an_id_outside_the_vocabulary_is_refused(folder: Folder, byte_level: Tokenizer, id: int) -> None:
    folder.put_tokenizer(byte_level)
    with pytest.raises(InvalidRequest, match=f"token id {id} is outside"):
        folder.load().decode([5, id])


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("tokenizer.json", "{", "tokenizer.json cannot be read"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json is not a JSON object"),
    ],
)
def test_broken_files(folder: Folder, byte_level: Tokenizer, name: str, value: str, named: str) -> None:
    folder.put_tokenizer(byte_level)
    folder.put(name, value)
    with pytest.raises(EngineLoadError, match=named):
        folder.load()


def test_a_tokenizer_larger_than_the_model_is_refused(folder: Folder, byte_level: Tokenizer) -> None:
    folder.put_tokenizer(byte_level)
    with pytest.raises(EngineLoadError, match="of different models"):
        folder.load(vocab_size=500)


@pytest.mark.parametrize("vocab_size", [4, 60, 300, 5000, 151_936])
def test_a_generated_tokenizer_fills_the_vocabulary(folder: Folder, vocab_size: int) -> None:
    text = folder.load(vocab_size)
    assert text.generated
    names = [text.token_text(id) for id in range(vocab_size)]
    whole = [name for name in names if name != "\ufffd"]
    assert len(set(whole)) == len(whole)
    assert all(name.isprintable() or name in "\n\t\r" for name in names)
    assert all(names)
    assert text.special_ids == {1, 2, 3}
    again = folder.load(vocab_size)
    assert names == [again.token_text(id) for id in range(vocab_size)]


def test_a_generated_tokenizer_keeps_text(folder: Folder) -> None:
    text = folder.load(1000)
    draw = random.Random(0)
    for _ in range(200):
        sample = "".join(char for char in random_text(draw) if char.isprintable())
        assert text.decode(text.encode(sample, max_tokens=1000)) == sample
    word = text.token_text(900)
    assert text.encode(word + word) == [900, 900]
    prompt = text.render_chat([{"role": "user", "content": "hi"}])
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text.decode(text.encode(prompt, False)) == prompt


def test_weights_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    bare = write_config(tmp_path, 100)
    with_weights = Manifest(**{name: getattr(bare, name) for name in bare.__struct_fields__} | {"files": (tmp_path,)})
    with pytest.raises(EngineLoadError, match=r"no tokenizer\.json"):
        load_text(with_weights)
