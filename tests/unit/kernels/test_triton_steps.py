"""What stands before the model in a step on a GPU, under Triton's interpreter where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

interpreter = pytest.importorskip("tests.triton_interpreter", reason="needs Triton")
steps = pytest.importorskip("engines.kernels.cuda.steps")
DEVICE = interpreter.DEVICE


def on_device(values: object) -> torch.Tensor:
    return torch.from_numpy(np.array(values, np.int32)).to(DEVICE)


@pytest.mark.parametrize("seed", range(6))
def test_tokens_get_their_places_and_the_rest_is_padding(seed: int) -> None:
    rng = np.random.default_rng(seed)
    bound = int(rng.integers(1, 9))
    rows = int(rng.integers(1, bound + 1))
    slots = rng.permutation(12)[:rows]
    counts = rng.integers(1, 5, rows)
    contexts = counts + rng.integers(0, 40, rows)
    starts = np.concatenate([[0], counts.cumsum()])
    padding = int(rng.integers(0, 6))
    sequences, tables = rng.integers(0, 1000, (12, 64)), rng.integers(0, 99, (12, 9))
    outputs = tuple(torch.full((int(starts[-1]) + padding,), -9, device=DEVICE) for _ in range(3))
    steps.prepare_tokens(
        (
            on_device(np.pad(starts, (0, bound - rows), mode="edge")),
            on_device(np.pad(contexts, (0, bound - rows))),
            on_device(np.pad(slots, (0, bound - rows))),
        ),
        on_device(sequences),
        on_device(tables),
        outputs,
        16,
    )
    expected: list[list[int]] = [[], [], []]
    for slot, count, context in zip(slots, counts, contexts, strict=True):
        for place in range(context - count, context):
            expected[0].append(int(sequences[slot, place]))
            expected[1].append(int(place))
            expected[2].append(int(tables[slot, place // 16]) * 16 + int(place) % 16)
    for output, values, filler in zip(outputs, expected, (0, 0, -1), strict=True):
        assert output.tolist() == values + [filler] * padding


def test_segments_land_where_they_belong_and_nowhere_else() -> None:
    segments = [(12, 3), (100, 2500), (4000, 1)]
    header, words, source = [], [], 3 * len(segments)
    for target, length in segments:
        header += [target, length, source]
        words.append(np.arange(length) + target)
        source += length
    state = torch.zeros(5000, dtype=torch.int32, device=DEVICE)
    steps.scatter(on_device(np.concatenate([header, *words])), state, len(segments), 2500)
    expected = torch.zeros(5000, dtype=torch.int32)
    for target, length in segments:
        expected[target : target + length] = torch.arange(target, target + length)
    assert torch.equal(state.cpu(), expected)
