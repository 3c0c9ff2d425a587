"""Text of one model: tokenizer, chat template and what streams of its tokens need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from engines.manifest import Manifest
from engines.protocol import EngineLoadError
from server.errors import InvalidRequest
from server.text.detokenize import (
    ByteDetokenizer,
    IncrementalDetokenizer,
    WindowDetokenizer,
    is_byte_level,
    token_table,
)
from server.text.folder_tokenizer import read_folder_text
from server.text.generated_tokenizer import generate_text
from server.text.gguf_tokenizer import read_gguf_text
from server.text.reasoning import CLOSING, OPENING, opens_thinking
from server.text.source import TextSource
from server.text.template import ChatTemplate


class ModelText:
    """Safe to use from several threads. ``encode`` and ``render_chat`` take time: keep them off the event loop."""

    def __init__(self, source: TextSource, manifest: Manifest, now: Callable[[], datetime]) -> None:
        tokenizer = source.tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.vocab_size = manifest.vocab_size
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.generated = source.generated
        """The model has no tokenizer of its own: the texts mean nothing."""
        self.reasoning = OPENING in (source.chat_template or "") or tokenizer.token_to_id(CLOSING) is not None
        """Its output may begin with a think block."""
        self._tokenizer = tokenizer
        self._unknown_id = source.unknown_id
        self._max_context = manifest.max_context
        self._table = token_table(tokenizer, manifest.vocab_size)
        if source.unknown_id is not None and source.unknown_id < manifest.vocab_size:
            self._table[source.unknown_id] = b""  # the weights have more rows than the vocabulary
        # Where think tags are special tokens, they are text all the same: the reasoning splitter looks for them.
        self._silent = self.special_ids - {tokenizer.token_to_id(tag) for tag in (OPENING, CLOSING)}
        self._spoken = [b"" if id in self._silent else piece for id, piece in enumerate(self._table)]
        self._longest_token = max(map(len, self._table), default=1) or 1
        self._byte_level = is_byte_level(tokenizer)
        self._add_bos = source.add_bos
        bos = source.special_tokens.get("bos_token")
        self._bos_id = tokenizer.token_to_id(bos) if bos is not None else manifest.bos_token_id
        self._template = None
        if source.chat_template is not None:
            most_chars = self._longest_token * manifest.max_context
            self._template = ChatTemplate(source.chat_template, source.special_tokens, most_chars, now=now)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, add_special: bool = True, *, max_tokens: int | None = None) -> list[int]:
        """Token ids; ``add_special`` puts BOS in front where the model wants it (a rendered chat has its own).

        Special tokens are recognised in the text, as vLLM and transformers do it: a chat template writes them as text,
        so a message that contains one forges it. Text longer than ``max_tokens`` (default: the model's context) of the
        longest token each cannot fit and is refused before it costs anything.

        Raises InvalidRequest for such a text and for one that is not valid Unicode.
        """
        limit = self._max_context if max_tokens is None else max_tokens
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise InvalidRequest("the text holds a lone surrogate, which is no character") from error
        least = -(-size // self._longest_token)
        if least > limit:
            raise InvalidRequest(f"the prompt has {least} tokens or more, but at most {limit} fit into the context")
        encoding = self._tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special and self._add_bos is not False
        )
        ids: list[int] = encoding[0].ids
        if self._unknown_id is not None and self._unknown_id in ids:
            ids = [id for id in ids if id != self._unknown_id]
        if add_special and self._add_bos and self._bos_id is not None and ids[:1] != [self._bos_id]:
            ids.insert(0, self._bos_id)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of a whole sequence. Raises InvalidRequest for an id outside the vocabulary."""
        for id in ids:
            if not 0 <= id < self.vocab_size:
                raise InvalidRequest(f"token id {id} is outside the vocabulary (0 to {self.vocab_size - 1})")
        if self._byte_level:
            table = self._spoken if skip_special_tokens else self._table
            return b"".join([table[id] for id in ids]).decode("utf-8", errors="replace")
        kept = [id for id in ids if id not in self._silent] if skip_special_tokens else list(ids)
        text: str = self._tokenizer.decode(kept, skip_special_tokens=False)
        return text

    def detokenizer(self, *, skip_special_tokens: bool = True) -> IncrementalDetokenizer:
        """A new one for one stream of ids, all below ``vocab_size``."""
        if self._byte_level:
            return ByteDetokenizer(self._spoken if skip_special_tokens else self._table)
        return WindowDetokenizer(self._tokenizer, self._silent if skip_special_tokens else frozenset())

    def token_bytes(self, id: int) -> bytes:
        """What the token adds to the text, special tokens too; it may be a part of a character."""
        return self._table[id]

    def token_text(self, id: int) -> str:
        """``token_bytes`` as text, with U+FFFD for parts of characters."""
        return self._table[id].decode("utf-8", errors="replace")

    def render_chat(self, messages: Sequence[Mapping[str, Any]], /, **template_kwargs: Any) -> str:
        """The prompt of a chat, to be encoded with ``add_special=False``.

        Each message has a ``role`` and a ``content`` (a string or a list of text parts). ``template_kwargs`` go to the
        template; ``add_generation_prompt`` (default true) is one of them.

        Raises InvalidRequest without a chat template, for wrong messages, for kwargs that would replace what we pass,
        and where the template refuses, fails or takes too long.
        """
        if self._template is None:
            raise InvalidRequest("this model has no chat template; send a plain prompt to /v1/completions instead")
        return self._template.render(messages, template_kwargs)

    def opens_thinking(self, rendered_prompt: str) -> bool:
        """Whether the answer begins inside a think block that the template has opened."""
        return self.reasoning and opens_thinking(rendered_prompt)

    def close(self) -> None:
        """End the processes that render the chat template."""
        if self._template is not None:
            self._template.close()


def load_text(manifest: Manifest, *, now: Callable[[], datetime] = datetime.now) -> ModelText:
    """Tokenizer and chat template from the model's own files; ``now`` is the date that templates may print.

    A model without a tokenizer gets a generated one if it has random weights. Raises EngineLoadError otherwise, and
    for files that cannot be used.
    """
    source = read_gguf_text(manifest.source) if manifest.format == "gguf" else read_folder_text(manifest.source)
    if source is None:
        if manifest.files:
            raise EngineLoadError(
                "the model's folder has no tokenizer.json. Download the model again, with all its files."
            )
        source = generate_text(manifest)
    _check_ids(source, manifest.vocab_size)
    return ModelText(source, manifest, now)


def _check_ids(source: TextSource, vocab_size: int) -> None:
    tokenizer = source.tokenizer
    end = max(tokenizer.get_vocab_size(with_added_tokens=True), *tokenizer.get_added_tokens_decoder(), 0) + 1
    beyond = [id for id in range(vocab_size, end) if id != source.unknown_id and tokenizer.id_to_token(id) is not None]
    if beyond:
        raise EngineLoadError(
            f"the tokenizer has ids up to {beyond[-1]}, but the model's vocabulary has {vocab_size} entries: "
            "tokenizer and weights are of different models"
        )
