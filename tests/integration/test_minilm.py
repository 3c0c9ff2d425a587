"""all-MiniLM-L6-v2 with its real weights: embeddings as transformers and ONNX Runtime compute them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.plain_models import minilm_folder
from engines.compiled.exported import write_onnx
from engines.encoder_folder import read_encoder_folder
from engines.encoder_tokens import EncoderTokenizer
from engines.models.encoder import Encoder, load_encoder
from tests.packages import PackageMissing

TEXTS = [
    "a gripping , funny film .",
    "it is too long , and nobody laughs .",
    "The quick brown fox jumps over the lazy dog. " * 8,
    "x",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return minilm_folder()
    except PackageMissing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def model(folder: Path) -> Encoder:
    torch.set_num_threads(1)
    return load_encoder(read_encoder_folder(folder), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def tokens(folder: Path) -> dict[str, torch.Tensor]:
    arrays = EncoderTokenizer(read_encoder_folder(folder)).encode(TEXTS)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def test_tokens_are_those_of_transformers(folder: Path, tokens: dict[str, torch.Tensor]) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    for name, tensor in tokens.items():
        assert torch.equal(tensor, reference[name])


def test_embeddings_are_those_of_transformers(folder: Path, model: Encoder, tokens: dict[str, torch.Tensor]) -> None:
    from transformers import AutoModel

    weights = tokens["attention_mask"][:, :, None].float()
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
        found = model(**tokens)
    expected = torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found[0] @ found[1]) > (found[0] @ found[2])


def test_the_onnx_file_gives_the_same(model: Encoder, tokens: dict[str, torch.Tensor], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    write_onnx(model, tmp_path / "minilm.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(tmp_path / "minilm.onnx", options)
    assert [(each.name, each.shape) for each in session.get_inputs()] == [
        (name, ["texts", "tokens"]) for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    for count in (4, 1):
        part = {name: tensor[:count] for name, tensor in tokens.items()}
        (found,) = session.run(["sentence_embedding"], {name: tensor.numpy() for name, tensor in part.items()})
        with torch.inference_mode():
            np.testing.assert_allclose(found, model(**part).numpy(), rtol=0, atol=1e-5)
