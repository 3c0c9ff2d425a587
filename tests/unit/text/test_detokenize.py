from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer

from server.text.detokenize import ByteDetokenizer, IncrementalDetokenizer, WindowDetokenizer, token_table
from server.text.gguf_tokenizer import build_gguf_tokenizer
from tests.unit.text.tokenizer_files import FIRST_BYTE, TEXTS, pair_metadata, random_text, sentencepiece_tokenizer


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return build_gguf_tokenizer(pair_metadata("qwen2"))


def stream(detokenizer: IncrementalDetokenizer, ids: list[int], draw: random.Random) -> list[str]:
    """What each push gives, a random number of tokens at a time, and at last the flush."""
    given = []
    while ids:
        count = draw.randint(1, 3)
        given.append(detokenizer.push(ids[:count]))
        ids = ids[count:]
    return [*given, detokenizer.flush()]


def test_random_ids_give_what_the_tokenizer_decodes(byte_level: Tokenizer) -> None:
    draw = random.Random(0)
    table = token_table(byte_level, byte_level.get_vocab_size() - 1)
    for _ in range(2000):
        ids = [draw.randrange(len(table)) for _ in range(draw.randint(0, 12))]
        expected = byte_level.decode(ids, skip_special_tokens=False)
        assert "".join(stream(ByteDetokenizer(table), ids, draw)) == expected


def test_half_a_character_waits_for_its_other_half(byte_level: Tokenizer) -> None:
    table = token_table(byte_level, byte_level.get_vocab_size())
    draw = random.Random(1)
    for text in [*TEXTS, *(random_text(draw) for _ in range(300))]:
        text = text.replace("\ufffd", "").translate({3: None, 4: None, 5: None})
        ids = byte_level.encode(text, add_special_tokens=False).ids
        given = stream(ByteDetokenizer(table), ids, draw)
        assert "".join(given) == text
        assert "\ufffd" not in "".join(given)


def test_invalid_bytes_become_replacement_characters_as_soon_as_they_are_certain() -> None:
    detokenizer = ByteDetokenizer([b"\xe4", b"\xbd", b"\xa0", b"\xff", b"a"])
    assert [detokenizer.push([id]) for id in (0, 1, 2, 0, 4, 3, 0)] == ["", "", "你", "", "\ufffda", "\ufffd", ""]
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_ids_that_the_tokenizer_lacks_have_no_text(byte_level: Tokenizer) -> None:
    size = byte_level.get_vocab_size() + 3
    assert ByteDetokenizer(token_table(byte_level, size)).push([size - 1]) == ""


def test_other_decoders_give_what_the_tokenizer_decodes() -> None:
    tokenizer = sentencepiece_tokenizer()
    draw = random.Random(2)
    for _ in range(500):
        text = "".join(draw.choices(["a", "b", " ", "é", "你", "👍🏽", "ab"], k=draw.randint(0, 10)))
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        given = stream(WindowDetokenizer(tokenizer, frozenset()), ids, draw)
        assert "".join(given) == tokenizer.decode(ids)
        assert all("\ufffd" not in piece for piece in given)


def test_other_decoders_skip_special_tokens_and_end_with_what_is_left() -> None:
    tokenizer = sentencepiece_tokenizer()
    ids = [1, *tokenizer.encode("a b", add_special_tokens=False).ids, 2, FIRST_BYTE + 0xE4]
    detokenizer = WindowDetokenizer(tokenizer, {0, 1, 2})
    assert [detokenizer.push([id]) for id in ids] == ["", "a", " b", "", ""]
    assert detokenizer.flush() == "\ufffd"
    assert WindowDetokenizer(tokenizer, frozenset()).push(ids[:2]) == "<s> a"


def test_bytes_of_single_tokens() -> None:
    tokenizer = sentencepiece_tokenizer()
    table = token_table(tokenizer, tokenizer.get_vocab_size())
    assert table[FIRST_BYTE + 0xE4] == b"\xe4"
    assert table[-1] == b" ab"
    assert table[2] == b"</s>"
