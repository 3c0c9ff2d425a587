"""What the tokenizer's files give, whichever kind they are."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenizers import Tokenizer

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
"""Variables of a chat template."""


@dataclass(frozen=True, slots=True)
class TextSource:
    tokenizer: Tokenizer
    special_tokens: dict[str, str] = field(default_factory=dict)
    """For the chat template: ``bos_token`` and so on, to their texts."""
    add_bos: bool | None = None
    """Whether a plain prompt gets BOS in front; None leaves it to the tokenizer's own post-processor."""
    chat_template: str | None = None
    unknown_id: int | None = None
    """Stands for what the vocabulary cannot express; dropped from every encoding."""
    generated: bool = False
