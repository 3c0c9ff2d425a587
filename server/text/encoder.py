"""Texts into an encoder and embeddings out of its hidden states, as the model's folder describes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from engines.encoder_folder import POOLING_KEYS, Pooling
from engines.fields import Fields
from engines.manifest import read_json
from engines.protocol import EngineLoadError
from engines.tensors import Signature, Tensor, TensorSpec

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
MAX_TOKENS = 512
"""Of a text with its special tokens, where the folder does not say."""

Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class TextEncoder:
    """The folder's ``tokenizer.json``, and how sentence-transformers makes one vector of a text."""

    tokenizer: Tokenizer
    pooling: Pooling
    normalise: bool
    max_tokens: int

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Ids with the special tokens, and the type of each."""
        found = self.tokenizer.encode(text)
        return found.ids, found.type_ids

    def tensors(self, ids: list[int], types: list[int], signature: Signature) -> list[Tensor]:
        """One row for the graph's inputs, in their order."""
        values = {"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": types}
        return [
            Tensor(spec.name, spec.datatype, (1, len(ids)), _bytes(values[spec.name], spec))
            for spec in signature.inputs
        ]

    def embed(self, hidden: Tensor) -> Vector:
        """Of hidden states [1, tokens, width]: pooled, and scaled to length 1 where the folder says so."""
        states = np.frombuffer(hidden.data, np.float16 if hidden.datatype == "FP16" else np.float32)
        states = states.reshape(hidden.shape)[0].astype(np.float32)
        pooled = states[0] if self.pooling == "cls" else states.max(0) if self.pooling == "max" else states.mean(0)
        if self.normalise:
            pooled = pooled / max(float(np.linalg.norm(pooled)), 1e-12)
        return np.asarray(pooled, np.float32)


def _bytes(values: list[int], spec: TensorSpec) -> bytes:
    return np.asarray(values, np.int32 if spec.datatype == "INT32" else np.int64).tobytes()


def hidden_output(signature: Signature) -> str | None:
    """The output that is pooled, of a graph that takes ids and gives a vector for each token; None of any other."""
    takes = all(spec.name in INPUTS and spec.datatype in ("INT32", "INT64") for spec in signature.inputs)
    states = [spec.name for spec in signature.outputs if len(spec.shape) == 3 and spec.datatype in ("FP16", "FP32")]
    return states[0] if takes and signature.batched and states else None


def read_text_encoder(folder: Path) -> TextEncoder | None:
    """None where the folder has no ``tokenizer.json``. Raises EngineLoadError for files that cannot be used."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise EngineLoadError(f"tokenizer.json cannot be read ({error}); fetch the model again") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    pooling, normalise = _read_pooling(folder)
    sentence = folder / "sentence_bert_config.json"
    lengths = Fields(read_json(sentence) if sentence.is_file() else {}, sentence.name)
    return TextEncoder(tokenizer, pooling, normalise, lengths.count("max_seq_length", MAX_TOKENS))


def _read_pooling(folder: Path) -> tuple[Pooling, bool]:
    """Mean and scaled to length 1 where the folder does not say, as most sentence encoders are used."""
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean", True
    fields = Fields(read_json(path), path.name)
    wanted = [mode for key, mode in POOLING_KEYS.items() if fields.flag(key)]
    if len(wanted) != 1:
        raise EngineLoadError(f"1_Pooling/config.json: one of {', '.join(POOLING_KEYS)} must be true")
    modules = folder / "modules.json"
    return wanted[0], modules.is_file() and "Normalize" in modules.read_text(errors="replace")
