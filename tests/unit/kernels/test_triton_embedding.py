"""Rows of an embedding on a GPU, under Triton's interpreter where there is none."""

from __future__ import annotations

import pytest
import torch

interpreter = pytest.importorskip("tests.triton_interpreter", reason="needs Triton")
embedding = pytest.importorskip("engines.kernels.cuda.embedding")
DEVICE = interpreter.DEVICE


@pytest.mark.parametrize(("count", "width"), [(1, 16), (9, 2048), (5, 3001)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_token_gets_its_row(count: int, width: int, dtype: torch.dtype) -> None:
    table = torch.randn(70, width).to(DEVICE, dtype)
    token_ids = torch.randint(70, (count,), device=DEVICE)
    assert torch.equal(embedding.embed(token_ids, table), torch.nn.functional.embedding(token_ids, table))
