from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from compression.measures.agreement import (
    STORED_TOKENS,
    Distributions,
    LiveModel,
    Passage,
    StoredModel,
    compare,
    divergence,
    store,
)
from engines.manifest import read_manifest
from engines.models.model import Model
from tests.unit.compression.tiny_pair import write_pair
from tests.unit.models.checkpoints import CPU, load

VOCAB = 261
PASSAGES = [
    Passage(torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist(), first)
    for length, first in ((40, 1), (33, 20), (2, 1))
]


def quiet(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    own, base = write_pair(tmp_path_factory.mktemp("pair"))
    return load(read_manifest(own)), load(read_manifest(base))


def live(model: Model) -> LiveModel:
    return LiveModel(model, CPU, torch.float32)


def logits(model: Model, tokens: list[int]) -> torch.Tensor:
    """(n, vocab) of all positions, token by token through one call each: independent of batches and blocks."""
    from tests.paged_rows import PagedRows

    rows = PagedRows(model, 1, len(tokens))
    return torch.cat([rows.step({0: [token]})[0] for token in tokens])


def test_scores_are_those_of_the_definition(models: tuple[Model, Model]) -> None:
    own, base = models
    scores = compare(live(own), live(base), PASSAGES, VOCAB, "", quiet)
    for index, passage in enumerate(PASSAGES):
        tokens, following = list(passage.tokens[:-1]), torch.tensor(passage.tokens[passage.first :])
        ours, theirs = (logits(model, tokens)[passage.first - 1 :].log_softmax(-1).double() for model in models)
        assert scores.tokens[index] == len(following)
        assert scores.own_loss[index] == pytest.approx(-float(ours.gather(1, following[:, None]).sum()), rel=1e-4)
        assert scores.base_loss[index] == pytest.approx(-float(theirs.gather(1, following[:, None]).sum()), rel=1e-4)
        expected = float((theirs.exp() * (theirs - ours)).sum())
        assert scores.divergence[index] == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert scores.same_best[index] == int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    assert scores.divergence.min() > 0


def test_a_model_agrees_with_itself(models: tuple[Model, Model]) -> None:
    scores = compare(live(models[0]), live(models[0]), PASSAGES, VOCAB, "", quiet)
    assert np.array_equal(scores.own_loss, scores.base_loss)
    assert np.array_equal(scores.same_best, scores.tokens)
    assert not scores.divergence.any()


def test_a_stored_base_gives_the_same_but_for_the_divergence_which_it_bounds_from_below(
    models: tuple[Model, Model], tmp_path: Path
) -> None:
    own, base = models
    whole = compare(live(own), live(base), PASSAGES, VOCAB, "", quiet)
    store(live(base), PASSAGES, VOCAB, tmp_path, "", quiet)
    stored = compare(live(own), StoredModel(tmp_path, CPU), PASSAGES, VOCAB, "", quiet)
    assert np.allclose(stored.base_loss, whole.base_loss)
    assert np.array_equal(stored.same_best, whole.same_best)
    assert (stored.divergence <= whole.divergence + 1e-5).all()
    assert (stored.divergence > 0.1 * whole.divergence).all()
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    positions = sum(passage.scored for passage in PASSAGES)
    assert size < positions * (8 * STORED_TOKENS + 4) + 9 * 256


def test_divergence_of_two_known_distributions() -> None:
    base, own = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    following = base[:, 0]
    whole = divergence(Distributions(base, None, following), own)
    assert float(whole) == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    first = Distributions(base[:, :1], torch.tensor([[0]]), following)
    assert float(divergence(first, own)) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))


def test_progress_goes_from_nothing_to_all(models: tuple[Model, Model]) -> None:
    seen: list[tuple[str, int, int]] = []
    compare(
        live(models[0]),
        live(models[1]),
        PASSAGES,
        VOCAB,
        "x",
        lambda what, done, total: seen.append((what, done, total)),
    )
    assert seen == [("x", done, 3) for done in range(4)]
