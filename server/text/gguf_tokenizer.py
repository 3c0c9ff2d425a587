"""Byte-level BPE tokenizers out of GGUF metadata. Token ids equal llama.cpp's, which defines what such a file means.

The file names its pre-tokenizer (``tokenizer.ggml.pre``) but does not describe it: the table below does. Each entry is
a list of patterns that split the text one after another, every match and every gap being a piece of its own for the
next pattern; then byte-level BPE runs inside each piece.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from engines.gguf_header import read_gguf_header
from engines.protocol import EngineLoadError
from server.text.source import TextSource

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
UNKNOWN_PIECE = "\0unknown"
"""Stands for a byte that the vocabulary lacks; llama.cpp drops it, but it keeps its neighbours from merging."""

_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS_AND_PUNCTUATION = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTION + "|" + _WORDS_AND_PUNCTUATION % r"\p{N}{1,3}"
_QWEN2 = _CONTRACTION + "|" + _WORDS_AND_PUNCTUATION % r"\p{N}"


_SINCE_UNICODE_16 = (
    "897 1B4E-1B4F 1B7F 1C89-1C8A 2427-2429 31E4-31E5 A7CB-A7CD A7DA-A7DC 105C0-105F3 10D40-10D65 10D69-10D85 "
    "10D8E-10D8F 10EC2-10EC4 10EFC 11380-11389 1138B 1138E 11390-113B5 113B7-113C0 113C2 113C5 113C7-113CA "
    "113CC-113D5 113D7-113D8 113E1-113E2 116D0-116E3 11BC0-11BE1 11BF0-11BF9 11F5A 13460-143FA 16100-16139 "
    "16D40-16D79 18CFF 1CC00-1CCF9 1CD00-1CEB3 1E5D0-1E5FA 1E5FF 1F8B2-1F8BB 1F8C0-1F8C1 1FA89 1FA8F 1FABE "
    "1FAC6 1FADC 1FADF 1FAE9 1FBCB-1FBEF"
)
"""In hexadecimal: characters that llama.cpp's tables (Unicode 15.1) give no category, while ``Regex`` knows them."""


class PreTokenizer(NamedTuple):
    patterns: tuple[str, ...]
    ignore_merges: bool = False
    """A piece that is a vocabulary entry as a whole becomes that entry, whatever the merges would give."""
    add_bos: bool = False
    """Unless the file says otherwise."""


_PRE_TOKENIZERS = {
    "default": PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": PreTokenizer((_GPT2,)),
    "smollm": PreTokenizer((r"\p{N}", _GPT2)),
    "llama-bpe": PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    "qwen2": PreTokenizer((_QWEN2,)),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            r"\s?["
            r"\x{41}-\x{5A}\x{61}-\x{7A}\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}"
            r"\x{1C4}-\x{293}\x{295}-\x{2AF}\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}"
            r"\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}\x{531}-\x{556}"
            r"\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}"
            r"\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}"
            r"\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-\x{1F7D}"
            r"\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}"
            r"\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}\x{2107}"
            r"\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}\x{2126}\x{2128}\x{212A}-\x{212D}"
            r"\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}"
            r"\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}"
            r"\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}"
            r"\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}"
            r"\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}"
            r"\x{1E900}-\x{1E943}"
            r"]+",
            r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3001}\x{3002}]+",
            r"(?<!\s)\s+$",  # \s+$ alone takes quadratic time
            r"[\x{800}-\x{9FA5}\x{AC00}-\x{D7FF}&&[^\s]]+",
            r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizer(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[\x{800}-\x{9FA5}\x{AC00}-\x{D7FF}&&[^\s]]+", r"\p{N}")
    ),
    "deepseek-v3": PreTokenizer(
        (
            r"\p{N}{1,3}",
            r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+",
            r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}[\p{S}&&[^~]]]?[\p{L}\p{M}]+"
            r"| ?[\p{P}[\p{S}&&[^~]]]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        )
    ),
}
_ALIASES = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "phi-2": "gpt-2",
    "olmo": "gpt-2",
    "starcoder": "smollm",
}


def read_gguf_text(path: Path) -> TextSource:
    """Tokenizer, special tokens and chat template of a ``.gguf`` file. Raises EngineLoadError if unsupported."""
    metadata = read_gguf_header(path).metadata
    tokenizer = build_gguf_tokenizer(metadata)
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    special_tokens = {name: tokens[id] for name, id in ids.items() if isinstance(id, int) and 0 <= id < len(tokens)}
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", gguf_pre_tokenizer(metadata).add_bos)
    template = metadata.get("tokenizer.chat_template")
    return TextSource(
        tokenizer=tokenizer,
        special_tokens=special_tokens,
        add_bos=bool(add_bos),
        chat_template=template if isinstance(template, str) else None,
        unknown_id=tokenizer.token_to_id(UNKNOWN_PIECE),
    )


def gguf_pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizer:
    """Raises EngineLoadError for a tokenizer model or a pre-tokenizer that is not in the table."""
    model = metadata.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise EngineLoadError(
            f"the GGUF file has a tokenizer of the kind {model!r}; only byte-level BPE ('gpt2') is supported. "
            "Serve the model's Hugging Face folder instead."
        )
    name = metadata.get("tokenizer.ggml.pre", "default")
    pre_tokenizer = _PRE_TOKENIZERS.get(_ALIASES.get(name, name))
    if pre_tokenizer is None:
        raise EngineLoadError(
            f"the GGUF file names the pre-tokenizer {name!r}, which is not supported (supported: "
            f"{', '.join(sorted([*_PRE_TOKENIZERS, *_ALIASES]))}). Serve the model's Hugging Face folder instead."
        )
    return pre_tokenizer


def build_gguf_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """A tokenizer with the file's vocabulary, merges and special tokens; it adds no BOS by itself."""
    pre_tokenizer = gguf_pre_tokenizer(metadata)
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens", [])
    types: list[int] = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if not tokens or len(types) != len(tokens):
        raise EngineLoadError(
            f"the GGUF file has {len(tokens)} tokens and {len(types)} token types. Download it again."
        )
    vocab = {token: id for id, token in enumerate(tokens)}
    vocab[UNKNOWN_PIECE] = len(tokens)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=list(_merges(metadata.get("tokenizer.ggml.merges", []), vocab)),
            unk_token=UNKNOWN_PIECE,
            ignore_merges=pre_tokenizer.ignore_merges,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(_regex(pattern), behavior="isolated") for pattern in pre_tokenizer.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _add_special_tokens(tokenizer, tokens, types)
    return tokenizer


def _regex(pattern: str) -> Regex:
    """The pattern with every category (``\\p{L}``) narrowed to the characters that llama.cpp counts among it."""
    ranges = "".join("-".join(f"\\x{{{bound}}}" for bound in span.split("-")) for span in _SINCE_UNICODE_16.split())
    return Regex(re.sub(r"\\p\{\w\}", lambda category: f"[{category[0]}&&[^{ranges}]]", pattern))


def _merges(lines: Iterable[str], vocab: Mapping[str, int]) -> Iterable[tuple[str, str]]:
    for line in lines:
        left, _, right = line.partition(" ")
        if left in vocab and right in vocab and left + right in vocab:
            yield left, right


def _add_special_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    def added(wanted: tuple[int, ...], special: bool) -> list[AddedToken]:
        return [
            AddedToken(token, special=special, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in wanted and token
        ]

    tokenizer.add_special_tokens(added((_CONTROL, _UNKNOWN), special=True))
    tokenizer.add_tokens(added((_USER_DEFINED,), special=False))
