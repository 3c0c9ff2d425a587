"""Texts to the arrays that an encoder takes. Imports no torch, so the API process can do it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from engines.encoder_folder import EncoderFolder
from engines.protocol import EngineLoadError

Arrays = dict[str, NDArray[np.int64]]


class EncoderTokenizer:
    """The folder's ``tokenizer.json``, with the model's own length limit."""

    def __init__(self, folder: EncoderFolder) -> None:
        """Raises EngineLoadError if the file is damaged or knows ids that the model has no row for."""
        try:
            self._tokenizer = Tokenizer.from_file(str(folder.tokenizer))
        except Exception as error:  # the library raises nothing narrower
            raise EngineLoadError(f"tokenizer.json cannot be read ({error}); fetch the model again") from error
        if self._tokenizer.get_vocab_size() > folder.config.vocab:
            raise EngineLoadError("tokenizer.json has more tokens than config.json; they do not belong together")
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(folder.max_tokens)
        self._pad = folder.pad_token_id
        self._token_types = folder.config.token_types

    def encode(self, texts: Sequence[str | tuple[str, str]]) -> Arrays:
        """``input_ids``, ``attention_mask`` and ``token_type_ids``, int64 [texts, longest of them].

        A pair of texts becomes one row, as rerankers read query and passage.
        """
        rows = self._tokenizer.encode_batch(list(texts))
        shape = (len(rows), max((len(row.ids) for row in rows), default=0))
        ids = np.full(shape, self._pad, np.int64)
        mask, types = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for index, row in enumerate(rows):
            length = len(row.ids)
            ids[index, :length] = row.ids
            mask[index, :length] = 1
            if self._token_types > 1:
                types[index, :length] = row.type_ids
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
