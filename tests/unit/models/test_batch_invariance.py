"""In float32 on the CPU a token's result is bit-equal whatever else is in the step and wherever a prompt is cut."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from engines.manifest import read_manifest
from engines.models.batch import LastTokens
from engines.models.loader import Model
from tests.paged_rows import PagedRows
from tests.unit.models.checkpoints import FAMILIES, load, write_config

LENGTH = 21


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    config = {**FAMILIES[request.param], "hidden_size": 72, "intermediate_size": 104, "head_dim": 18, "vocab_size": 203}
    return load(read_manifest(write_config(tmp_path, config), random_weights=True), random_weights=4)


def test_neighbours_and_chunks_change_no_bit(model: Model) -> None:
    draw = random.Random(1)
    prompts = [[draw.randrange(200) for _ in range(LENGTH)] for _ in range(9)]
    alone = PagedRows(model, 1, LENGTH)
    expected = torch.cat([alone.step({0: [token]})[0] for token in prompts[0]])
    whole = PagedRows(model, 1, LENGTH).step({0: prompts[0]})[0]
    assert torch.equal(whole, expected)
    for trial in range(6):
        rows = PagedRows(model, len(prompts), LENGTH)
        parts = []
        while rows.lengths[0] < LENGTH:
            others = draw.sample(range(1, len(prompts)), draw.randint(0, len(prompts) - 1))
            share = {}
            for row in [0, *others]:
                left = LENGTH - rows.lengths[row]
                if left:
                    share[row] = prompts[row][rows.lengths[row] :][: draw.choice([1, 1, 3, 7, left])]
            parts.append(rows.step(share)[0])
        assert torch.equal(torch.cat(parts), expected), f"trial {trial}"


def test_the_last_layer_of_the_wanted_tokens_alone_changes_no_bit_of_them_nor_of_what_follows(model: Model) -> None:
    draw = random.Random(2)
    shares = {row: [draw.randrange(200) for _ in range(count)] for row, count in enumerate((1, 1, 9, 14, 5))}
    later = {row: [draw.randrange(200)] for row in shares}
    whole, spared = (PagedRows(model, len(shares), LENGTH) for _ in range(2))
    expected = model.forward(whole.batch(shares), whole.caches)
    batch, rows = spared.batch(shares), torch.tensor([1, 4, 2])
    tokens = batch.query_starts[rows + 1].long() - 1
    last = LastTokens.of(batch, tokens, batch.context_lengths[rows], batch.block_tables[rows])
    assert torch.equal(model.forward(batch, spared.caches, last), expected[tokens])
    after, after_spared = whole.step(later), spared.step(later)
    assert all(torch.equal(after[row], after_spared[row]) for row in later)
