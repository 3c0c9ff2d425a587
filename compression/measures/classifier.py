"""Task accuracy of an encoder: a linear probe on its embeddings, beside the same probe on the base's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch

from compression.card import ClassifierScores
from compression.errors import CompressionError
from compression.measures.intervals import bootstrap, ratio_of_sums, share
from compression.measures.texts import read_text

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Integers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Embed = Callable[[Sequence[str]], Floats]
"""Texts -> (texts, width)."""

WEIGHT_DECAY = 1e-3
"""Of the probe, on standardised features."""


class Labelled(msgspec.Struct, frozen=True):
    texts: list[str]
    labels: list[int]


def read_labelled(path: Path) -> Labelled:
    """Lines of a label (a whole number from 0 up), a blank and a text. Raises CompressionError."""
    texts, labels = [], []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        label, _, text = line.partition(" ")
        if not label.isdecimal() or not text.strip():
            raise CompressionError(f"{path.name}, line {number}: not a label, a blank and a text")
        texts.append(text)
        labels.append(int(label))
    if len(set(labels)) < 2:
        raise CompressionError(f"{path.name} has fewer than two classes")
    return Labelled(texts, labels)


def score_classifier(name: str, own: Embed, base: Embed, train: Labelled, test: Labelled) -> ClassifierScores:
    """Each model gets a probe of its own, fitted on ``train`` and scored on ``test``."""
    truth, classes = np.array(test.labels), 1 + max(*train.labels, *test.labels)
    ours, theirs = (_predictions(embed, train, test, classes) for embed in (own, base))
    right, base_right = ours == truth, theirs == truth
    return ClassifierScores(
        name=name,
        examples=len(truth),
        accuracy=share(int(right.sum()), len(truth)),
        base_accuracy=share(int(base_right.sum()), len(truth)),
        accuracy_difference=ratio_of_sums(right.astype(float) - base_right, np.ones(len(truth))),
        f1=bootstrap(len(truth), lambda picked: macro_f1(ours[picked], truth[picked], classes)),
        base_f1=bootstrap(len(truth), lambda picked: macro_f1(theirs[picked], truth[picked], classes)),
    )


def _predictions(embed: Embed, train: Labelled, test: Labelled, classes: int) -> Integers:
    return LogisticProbe(embed(train.texts), np.array(train.labels), classes).predict(embed(test.texts))


class LogisticProbe:
    """Multinomial logistic regression with L2 decay, fitted to its optimum by L-BFGS."""

    def __init__(self, features: Floats, labels: Integers, classes: int) -> None:
        """(n, width) features, (n,) labels below ``classes``."""
        x, y = torch.from_numpy(features).double(), torch.from_numpy(labels)
        self._mean, self._scale = x.mean(0), x.std(0).clamp_min(1e-9)
        x = (x - self._mean) / self._scale
        self._weight = torch.zeros((classes, x.shape[1]), dtype=torch.float64, requires_grad=True)
        self._bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([self._weight, self._bias], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            logits = x @ self._weight.t() + self._bias
            value = torch.nn.functional.cross_entropy(logits, y) + WEIGHT_DECAY * self._weight.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(loss)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def predict(self, features: Floats) -> Integers:
        """(n,) classes."""
        x = (torch.from_numpy(features).double() - self._mean) / self._scale
        classes: Integers = (x @ self._weight.t() + self._bias).argmax(-1).numpy()
        return classes


def macro_f1(predicted: Integers, truth: Integers, classes: int) -> float:
    """Mean of the classes' F1; a class that is neither there nor predicted does not count."""
    pairs = np.bincount(truth * classes + predicted, minlength=classes * classes).reshape(classes, classes)
    hits, both = np.diag(pairs), pairs.sum(0) + pairs.sum(1)
    present = both > 0
    return float((2 * hits[present] / both[present]).mean())
