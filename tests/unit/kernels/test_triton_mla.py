"""Absorbed decodes of latent attention against their definition, through Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest

from tests.latent_cases import LatentCase, Widths

DEVICE = pytest.importorskip("tests.triton_interpreter", reason="needs Triton").DEVICE
mla = pytest.importorskip("engines.kernels.cuda.mla")
TOLERANCE = {False: 2e-2, True: 5e-2}
"""Of an fp8 cache or any other. Triton's interpreter cuts off what does not fit into bfloat16, and so a number goes the
other way into fp8 now and then."""


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("contexts", [[5], [70, 130, 1], [64, 300, 1, 65, 20, 9, 128]])
@pytest.mark.parametrize(
    "widths", [Widths(4, 16, 12, 64, 16, True), Widths(3, 24, 16, 128, 32, False), Widths(20, 16, 16, 64, 16, True)]
)
def test_decodes(contexts: list[int], widths: Widths, fp8: bool) -> None:
    case = LatentCase(contexts, widths, DEVICE, fp8=fp8)
    result = mla.attend_latents(case.queries, case.latents, case.shape, case.cache, case.batch, case.scales)
    assert case.distance(result) < TOLERANCE[fp8]
    assert case.cache_is_written()


def test_more_rows_than_are_expanded_one_by_one() -> None:
    contexts = [70, 130, 1, 64] + [20] * (mla.FEW_TOKENS - 3)
    case = LatentCase(contexts, Widths(3, 24, 16, 64, 32, False), DEVICE, padding=1)
    result = mla.attend_latents(case.queries, case.latents, case.shape, case.cache, case.batch)
    assert case.distance(result) < TOLERANCE[False]
    assert case.cache_is_written()


def test_lines_of_the_block_table_and_padding() -> None:
    case = LatentCase([30, 200, 17, 90, 3], Widths(4, 16, 16, 64, 16, True), DEVICE, padding=3)
    result = mla.attend_latents(case.queries, case.latents, case.shape, case.cache, case.batch)
    assert case.distance(result) < TOLERANCE[False]
    assert case.cache_is_written()


@pytest.mark.parametrize(("counted", "fp8"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize(
    ("contexts", "counts"),
    [
        ([20], [20]),
        ([40, 200, 150, 140, 17], [1, 1, 150, 10, 3]),
        ([9] * 3 + [33] * 33, [1] * 3 + [5] * 33),
    ],
)
def test_prompts(contexts: list[int], counts: list[int], counted: bool, fp8: bool) -> None:
    case = LatentCase(contexts, Widths(3, 16, 32, 64, 16, True), DEVICE, counts=counts, fp8=fp8)
    decodes = counts.count(1)
    blocks = sum(-(-context // 16) for context in contexts[decodes:])
    if not counted:
        blocks = (len(counts) - decodes) * -(-max(contexts) // 16)
    queries = case.queries.clone()
    result = mla.attend_mixed(queries, case.latents, case.shape, case.cache, case.batch, decodes, blocks, case.scales)
    assert case.distance(result) < TOLERANCE[fp8]
    assert case.cache_is_written()
