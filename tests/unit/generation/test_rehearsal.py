"""What is compiled ahead is what a step asks for: no more, no less, and found under the same key."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

# Not imported: the tests of kernels that are interpreted have to say so before.
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.parametrize(
    ("model", "kv_dtype", "weights"),
    [
        ("r1-1.5b", "bfloat16", "bfloat16"),
        ("v2-lite", "bfloat16", "bfloat16"),
        ("r1-1.5b", "fp8", "bfloat16"),
        ("v2-lite", "fp8", "bfloat16"),
        ("r1-1.5b", "bfloat16", "int4"),
        ("v2-lite", "bfloat16", "int8"),
    ],
)
def test_steps_of_any_size_find_their_kernels_compiled(model: str, kv_dtype: str, weights: str) -> None:
    command = [sys.executable, "-m", "tests.unit.generation.rehearsal_checks", model, kv_dtype, weights]
    # Other tests of this process may have turned Triton's interpreter on.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    found = json.loads(done.stdout)
    # The cache's key of each launch is that of the kernel that was compiled in its name.
    assert found["unequal"] == []
    assert found["keys"] == sum(found["stages"].values())
    assert found["specialised"] == []
    assert found["missing"] == []
    assert found["drawn"] > 30
    assert min(found["stages"].values()) > 10
