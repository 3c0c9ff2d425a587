"""A kernel's key in the cache of binaries does not depend on which kernels a process has seen before."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import random, sys
from triton.runtime.jit import JITFunction
from engines.kernels.cuda import decode_kernel, sampling
from engines.kernels.cuda.cache_keys import settle_key
found = {f"{module.__name__}.{name}": value for module in (decode_kernel, sampling)
         for name, value in vars(module).items() if isinstance(value, JITFunction)}
names = sorted(found)
random.Random(int(sys.argv[1])).shuffle(names)
for name in names:
    settle_key(found[name])
print(names, file=sys.stderr)
for name in sorted(found):
    print(name, found[name].cache_key)
"""


def test_keys_are_the_same_in_whatever_order_kernels_are_compiled() -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    answers = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT, str(seed)],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            env=environment,
        )
        for seed in range(3)
    ]
    assert len({answer.stderr for answer in answers}) == 3, "each has an order of its own"
    keys = answers[0].stdout.splitlines()
    assert len(keys) > 10
    assert [answer.stdout.splitlines() for answer in answers] == [keys] * 3
