from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from engines.generation.memory import kv_bytes, size_kv
from engines.protocol import EngineLoadError


def size(available: int, asked: int | None = None, model_len: int = 1024) -> tuple[int, int]:
    found = size_kv("m", available, block_bytes=1000, block_size=16, max_rows=4, model_len=model_len, asked=asked)
    return found.blocks, found.max_model_len


def test_kv_takes_no_more_than_all_rows_need() -> None:
    assert size(10**9) == (4 * 64, 1024)
    assert size(100_500) == (100, 1024)


def test_a_length_nobody_asked_for_is_cut_to_what_fits_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert size(10_999) == (10, 160)
    assert "160" in caplog.text
    assert "1024" in caplog.text


@pytest.mark.parametrize(("available", "asked"), [(10_999, 1024), (3_999, None), (-5, None), (0, 16)])
def test_too_little_memory_is_refused_with_both_numbers(available: int, asked: int | None) -> None:
    with pytest.raises(EngineLoadError, match=r"1024 tokens .*max-model-len"):
        size(available, asked)


def test_a_limit_pays_for_weights_and_workspace_first() -> None:
    assert kv_bytes(torch.device("cpu"), 100 << 20, weights=60 << 20, workspace=10 << 20) == 30 << 20
    assert kv_bytes(torch.device("cpu"), 100 << 20, weights=95 << 20, workspace=10 << 20) < 0


def test_the_workspace_of_a_step_is_measured() -> None:
    """In a process of its own, as at a load: here, memory that other tests gave back would be taken again."""
    program = (
        "import torch; from engines.generation.memory import measure_workspace;"
        "print(measure_workspace(torch.device('cpu'), lambda: torch.ones(64 << 18)) >> 20)"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert 48 <= int(output) <= 128
