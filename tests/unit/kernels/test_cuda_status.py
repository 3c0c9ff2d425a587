"""The GPU kernels on a machine without a GPU: nothing of them is loaded, and the status says why."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from engines import kernels


def test_without_a_gpu_the_status_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    status = kernels.triton_status()
    assert status.version is None
    assert status.reason


def test_importing_the_kernels_imports_no_triton_kernel() -> None:
    code = "import sys; import engines.kernels; print('engines.kernels.cuda.attention' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
