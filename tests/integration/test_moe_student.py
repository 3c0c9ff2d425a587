"""The mixture-of-experts model that comes with slimserve, served by its name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from benchmarks.servers import Server, free_port, running, slimserve
from compression.measures.models import LoadedModel, load_reference, open_subject, spec_of
from compression.measures.routing import chosen_experts
from engines.generation.whole_prompts import WholePrompts
from server.sources import SHIPPED

NAME = "moe-student"
FOLDER = SHIPPED[NAME].path
TEXT = (
    "The working directory is the directory in which the command was started. If the file does not exist, an error "
    "message is printed and the function returns a value that is not zero. See the documentation of the option for "
    "more details. The default is to use the current branch of the repository."
)

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"its weights are not there: {SHIPPED[NAME].made_by}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    command = slimserve("serve", NAME, "--port", str(port), "--device", "cpu", "--max-batch", "4")
    with running("slimserve", command, port, "/health/ready", log=tmp_path_factory.mktemp("student") / "log") as found:
        yield found


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    subject = open_subject(FOLDER)
    subject.text.close()
    return load_reference(subject, spec_of(subject, "cpu", "float32", 256))


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode(TEXT).ids
    return ids


def test_it_is_served_by_its_name_and_writes_on(server: Server) -> None:
    body = {"model": NAME, "prompt": TEXT, "max_tokens": 12, "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    assert len(answer["choices"][0]["text"].strip()) > 5
    chat = {"model": NAME, "messages": [{"role": "user", "content": TEXT}], "max_tokens": 12, "temperature": 0}
    written = httpx.post(f"{server.url}/v1/chat/completions", json=chat, timeout=60).json()
    assert written["choices"][0]["message"]["content"] == answer["choices"][0]["text"]


def test_it_has_learnt_the_language_of_documentation(loaded: LoadedModel, tokens: list[int]) -> None:
    hidden = WholePrompts(loaded.model, loaded.device, loaded.dtype).hidden([tokens])
    logprobs = loaded.model.logits(hidden).log_softmax(-1)
    following = torch.tensor(tokens[1:])
    assert -float(logprobs[:-1].gather(1, following.unsqueeze(1)).mean()) < 3.5


def test_every_expert_is_chosen(loaded: LoadedModel) -> None:
    """Of each layer, over a text that is not in the corpus: the project's own documentation."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    pages = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
    sequences = [tokenizer.encode(page.read_text()).ids[:256] for page in pages]
    choices = np.concatenate(chosen_experts(loaded, sequences), axis=1)
    for layer in choices:
        assert set(np.unique(layer).tolist()) == set(range(16))
