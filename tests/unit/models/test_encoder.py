"""Encoders of the BERT family: values as transformers has them, and folders that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.encoder_folder import is_encoder_folder, read_encoder_folder
from engines.encoder_tokens import EncoderTokenizer
from engines.models.encoder import Encoder, load_encoder, pool
from engines.protocol import EngineLoadError
from tests.unit.models.encoder_checkpoints import MEAN, change_json, reference_bert, write_encoder

CPU = torch.device("cpu")
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
TEXTS = {
    "input_ids": torch.tensor([[1, 5, 6, 7, 2], [1, 9, 2, 0, 0]]),
    "attention_mask": MASK,
    "token_type_ids": torch.zeros(2, 5, dtype=torch.int64),
}


def load(folder: Path) -> Encoder:
    return load_encoder(read_encoder_folder(folder), CPU, torch.float32)


@pytest.mark.parametrize(
    "changes", [{}, {"hidden_act": "relu"}, {"hidden_act": "gelu_new"}, {"model": "roberta"}], ids=str
)
def test_hidden_states_are_those_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    reference = reference_bert(**changes)
    model = load(write_encoder(tmp_path, reference))
    with torch.inference_mode():
        expected = reference(**TEXTS).last_hidden_state
        found = model.hidden_states(**TEXTS)
    torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()], rtol=1e-5, atol=1e-5)


def test_logits_of_a_head_are_those_of_transformers(tmp_path: Path) -> None:
    reference = reference_bert(labels=3)
    model = load(write_encoder(tmp_path, reference, pooling=None))
    assert model.output_name == "logits"
    pair = {**TEXTS, "token_type_ids": torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 0, 0]])}
    with torch.inference_mode():
        torch.testing.assert_close(model(**pair), reference(**pair).logits, rtol=1e-5, atol=1e-5)


def test_padding_and_neighbours_change_nothing(tmp_path: Path) -> None:
    model = load(write_encoder(tmp_path, reference_bert()))
    with torch.inference_mode():
        together = model(**TEXTS)
        alone = model(**{name: tensor[1:, :3] for name, tensor in TEXTS.items()})
        empty = model(**{**TEXTS, "attention_mask": torch.zeros_like(MASK)})
    torch.testing.assert_close(together[1:], alone, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(empty).all()


def test_pooling_by_hand() -> None:
    hidden = torch.tensor([[[1.0, 4.0], [3.0, 0.0], [9.0, 9.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert pool(hidden, mask, "mean", normalise=False).tolist() == [[2.0, 2.0]]
    assert pool(hidden, mask, "cls", normalise=False).tolist() == [[1.0, 4.0]]
    assert pool(hidden, mask, "max", normalise=False).tolist() == [[3.0, 4.0]]
    torch.testing.assert_close(pool(hidden, mask, "max", normalise=True), torch.tensor([[0.6, 0.8]]))


@pytest.mark.parametrize(
    ("pooling", "normalise", "expected"),
    [
        (MEAN, True, ("mean", True)),
        (MEAN | {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, False, ("cls", False)),
        ({"pooling_mode": "max", "embedding_dimension": 32}, True, ("max", True)),
        (None, False, ("mean", False)),
    ],
)
def test_pooling_is_read_from_the_folder(
    tmp_path: Path, pooling: dict[str, Any] | None, normalise: bool, expected: tuple[str, bool]
) -> None:
    folder = read_encoder_folder(write_encoder(tmp_path, reference_bert(), pooling, normalise))
    assert (folder.pooling, folder.normalise) == expected


def test_texts_are_padded_cut_and_paired(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path, reference_bert())
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 6}')
    tokens = EncoderTokenizer(read_encoder_folder(folder))
    arrays = tokens.encode(["the cat", "the dog sat on a mat", ("cat", "dog")])
    assert arrays["input_ids"].tolist() == [[1, 4, 5, 2, 0, 0], [1, 4, 6, 7, 9, 2], [1, 5, 2, 6, 2, 0]]
    assert arrays["attention_mask"].sum(1).tolist() == [4, 6, 5]
    assert arrays["token_type_ids"].tolist() == [[0] * 6, [0] * 6, [0, 0, 0, 1, 1, 0]]
    assert all(array.dtype == np.int64 for array in arrays.values())
    assert tokens.encode([])["input_ids"].shape == (0, 0)


def test_fingerprints_follow_weights_and_pooling(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path, reference_bert())
    first = read_encoder_folder(folder).fingerprint
    assert read_encoder_folder(folder).fingerprint == first
    change_json(folder / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)
    second = read_encoder_folder(folder).fingerprint
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"][0] += 1
    save_file(tensors, folder / "model.safetensors")
    assert len({first, second, read_encoder_folder(folder).fingerprint}) == 3
    assert is_encoder_folder(folder)
    assert not is_encoder_folder(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("config.json", {"model_type": "t5"}, "is no encoder that is known"),
        ("config.json", {"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM has a head that is not supported"),
        ("config.json", {"hidden_act": "silu"}, "hidden_act must be one of"),
        ("config.json", {"num_attention_heads": 5}, "must be a divisor"),
        ("config.json", {"position_embedding_type": "relative_key"}, "relative positions are not supported"),
        ("config.json", {"is_decoder": True}, "this is a decoder"),
        ("config.json", {"vocab_size": 41}, "has shape"),
        ("config.json", {"num_hidden_layers": 3}, r"encoder\.layer\.2.* is missing"),
        ("config.json", {"num_hidden_layers": 1}, "does not use"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False}, "must be true and nothing else, not none"),
        ("1_Pooling/config.json", {"pooling_mode_weightedmean_tokens": True}, "and nothing else"),
        ("1_Pooling/config.json", {"word_embedding_dimension": 99}, "the model's width, 32"),
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, "pooling_mode must be one of"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, name: str, changes: dict[str, Any], message: str) -> None:
    folder = write_encoder(tmp_path, reference_bert())
    change_json(folder / name, **changes)
    with pytest.raises(EngineLoadError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}], "module Dense is not supported"),
        ([{"type": "models.Pooling", "path": "../elsewhere"}], "leaves the model's folder"),
        ([{"type": "models.Transformer", "path": ""}], "lists no Pooling"),
        ({}, "must hold a list"),
    ],
)
def test_modules_that_are_refused(tmp_path: Path, modules: Any, message: str) -> None:
    folder = write_encoder(tmp_path, reference_bert())
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(EngineLoadError, match=message):
        read_encoder_folder(folder)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path, reference_bert())
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(EngineLoadError, match=r"tokenizer\.json cannot be read"):
        EncoderTokenizer(read_encoder_folder(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(EngineLoadError, match=r"no tokenizer\.json"):
        read_encoder_folder(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(EngineLoadError, match="never opened"):
        read_encoder_folder(folder)
