"""A tokenizer for a model that has none (random weights): it fills the vocabulary, and every id has a printable text.

The first ids are the bytes that printable UTF-8 text is made of, so prompts survive a round trip; the rest are invented
words, each with a blank in front. The same size and ids always give the same vocabulary.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engines.manifest import Manifest
from server.text.detokenize import BYTE_OF_CHAR
from server.text.source import TextSource

UNKNOWN_PIECE = "\0unknown"
_CONSONANTS = "bdfghjklmnprstvz"
_VOWELS = "aeiou"
_SYLLABLES = [consonant + vowel for consonant in _CONSONANTS for vowel in _VOWELS]
_ASCII = " etaoinshrdlucmfwypvbgkjqxzETAOINSHRDLUCMFWYPVBGKJQXZ0123456789\n.,'\"!?:;-()[]{}<>|/\\=+*&%$#@^_`~\t\r"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def generate_text(manifest: Manifest) -> TextSource:
    """Never fails: a vocabulary too small for all bytes cannot express some characters, which encoding then drops."""
    special = {id: f"<|end-{index}|>" for index, id in enumerate(manifest.eos_token_ids)}
    if manifest.bos_token_id is not None:
        special.setdefault(manifest.bos_token_id, "<|begin|>")
    special = {id: text for id, text in special.items() if id < manifest.vocab_size}
    vocab = {text: id for id, text in special.items()}
    free = (id for id in range(manifest.vocab_size) if id not in special)
    pieces = _pieces(manifest.vocab_size - len(special))
    vocab |= {piece: id for id, piece in zip(free, pieces, strict=True)}
    vocab[UNKNOWN_PIECE] = manifest.vocab_size
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN_PIECE, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special.values()])
    return TextSource(
        tokenizer=tokenizer,
        add_bos=False,
        chat_template=CHAT_TEMPLATE,
        unknown_id=manifest.vocab_size,
        generated=True,
    )


def _pieces(count: int) -> list[str]:
    """``count`` different entries in the byte-level alphabet."""
    letter = {byte: chr(char) for char, byte in BYTE_OF_CHAR.items()}
    text_bytes = [*_ASCII.encode(), *range(0x80, 0xC0), *range(0xC2, 0xF5)]
    pieces = [letter[byte] for byte in text_bytes[:count]]
    return pieces + [letter[0x20] + _word(index) for index in range(count - len(pieces))]


def _word(index: int) -> str:
    """Two syllables, or more for the larger indices; different for each index."""
    index += len(_SYLLABLES)
    word = ""
    while index >= 0:
        index, syllable = divmod(index, len(_SYLLABLES))
        word = _SYLLABLES[syllable] + word
        index -= 1
    return word
