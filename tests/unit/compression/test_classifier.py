from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from compression.errors import CompressionError
from compression.measures.classifier import (
    Floats,
    Labelled,
    LogisticProbe,
    macro_f1,
    read_labelled,
    score_classifier,
)


def blobs(count: int, seed: int) -> tuple[Floats, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    randomness = np.random.default_rng(seed)
    labels = randomness.integers(3, size=count)
    centres = np.array([[2, 0, 0, 1000], [0, 2, 0, 1000], [0, 0, 2, 1000]])
    return (centres[labels] + randomness.normal(size=(count, 4))).astype(np.float32), labels


def test_the_probe_finds_classes_that_can_be_told_apart() -> None:
    probe = LogisticProbe(*blobs(600, 1), 3)
    features, labels = blobs(600, 2)
    assert 0.8 < (probe.predict(features) == labels).mean() < 0.95


def test_macro_f1_by_hand() -> None:
    truth, predicted = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    assert macro_f1(predicted, truth, 2) == pytest.approx((0.8 + 2 / 3) / 2)
    assert macro_f1(predicted, truth, 5) == pytest.approx((0.8 + 2 / 3) / 2), "absent classes do not count"


def test_a_worse_encoder_scores_worse_beside_its_base() -> None:
    (features, labels), (others, truth) = blobs(300, 3), blobs(300, 4)
    train = Labelled([f"a{index}" for index in range(300)], labels.tolist())
    test = Labelled([f"b{index}" for index in range(300)], truth.tolist())

    def embed(texts: Sequence[str]) -> Floats:
        return features if texts[0].startswith("a") else others

    def worse(texts: Sequence[str]) -> Floats:
        noise = np.random.default_rng(9).normal(size=(len(texts), 4)).astype(np.float32)
        return embed(texts) + 2 * noise

    same = score_classifier("blobs", embed, embed, train, test)
    assert same.accuracy == same.base_accuracy
    assert (same.accuracy_difference.low, same.accuracy_difference.high) == (0, 0)
    scores = score_classifier("blobs", worse, embed, train, test)
    assert scores.accuracy_difference.high < 0
    assert scores.f1.high < scores.base_f1.value
    assert scores.examples == 300


def test_labelled_lines(tmp_path: Path) -> None:
    path = tmp_path / "labelled.txt"
    path.write_text("1 a stirring film\n0 one long string\n")
    assert read_labelled(path) == Labelled(["a stirring film", "one long string"], [1, 0])
    for content, message in (("1 a\nx b\n", "line 2"), ("1 a\n1 b\n", "two classes"), ("1 \n", "line 1")):
        path.write_text(content)
        with pytest.raises(CompressionError, match=message):
            read_labelled(path)
