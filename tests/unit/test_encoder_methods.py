"""The scoring of quantized encoders: what is calibrated on, what is quantized, and what is counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.encoder_methods import METHODS, Embedder, f1, fitted_probe, quantized, read_sentences, scores
from tests.unit.models.encoder_checkpoints import reference_bert, write_encoder

TEXTS = ["the cat sat on the mat", "a dog ran", "the dog sat", "a cat ran on a mat", "mat", "on the cat the dog sat"]


@pytest.fixture
def embedder(tmp_path: Path) -> Embedder:
    return Embedder(write_encoder(tmp_path, reference_bert()))


def test_padding_is_not_calibrated_on(embedder: Embedder) -> None:
    name = "layers.1.up"
    together = embedder.observe(embedder.model, [name], TEXTS)[name]
    alone = [embedder.observe(embedder.model, [name], [text])[name] for text in TEXTS]
    assert together.tokens == sum(len(text.split()) + 2 for text in TEXTS)
    torch.testing.assert_close(together.hessian, sum(one.hessian for one in alone), rtol=1e-4, atol=1e-3)


def test_embeddings_keep_the_order_of_the_sentences(embedder: Embedder) -> None:
    found = embedder.embed(embedder.model, TEXTS)
    for place, text in enumerate(TEXTS):
        torch.testing.assert_close(found[place], embedder.embed(embedder.model, [text])[0])


@pytest.mark.parametrize("method", [method for method in METHODS if method != "fp8-block"])
def test_each_method_is_near_the_full_model_at_fewer_bytes(embedder: Embedder, method: str) -> None:
    full = embedder.embed(embedder.model, TEXTS)
    model, size = quantized(embedder, method, TEXTS)
    cosine = torch.cosine_similarity(embedder.embed(model, TEXTS), full).mean()
    assert (0.98 if "4" in method else 0.998) < cosine < 1
    assert size < (0.45 if "4" in method else 0.6)
    assert torch.equal(embedder.embed(embedder.model, TEXTS), full)


def test_a_probe_learns_what_embeddings_tell_apart() -> None:
    embeddings = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
    labels = (embeddings[:, 0] > 0).float()
    probe = fitted_probe(embeddings, labels)
    found = scores(embeddings, embeddings, probe, labels)
    assert found["accuracy"].value == found["same_answer"].value == 1
    assert found["accuracy_change"].value == 0
    turned = scores(-embeddings, embeddings, probe, labels)
    assert turned["accuracy"].value < 0.1
    assert turned["accuracy_change"].value < -0.9
    assert turned["cosine"].value == pytest.approx(-1)


def test_f1_is_that_of_the_label_1() -> None:
    assert f1(np.array([1.0, 1, 0, 0]), np.array([1.0, 0, 1, 0])).value == 0.5


def test_sentences_are_read_with_their_labels(tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("1 a fine film\n0 dull\n1 more\n")
    read = read_sentences(tmp_path / "some.txt", 2)
    assert read.texts == ["a fine film", "dull"]
    assert read.labels.tolist() == [1, 0]
