"""What is composed around a plain product where no kernel does it all."""

from __future__ import annotations

import pytest
import torch

from engines import kernels
from engines.kernels import Fusion, RmsNorm
from tests.linear_cases import EPS, LinearCase


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_fusions(dtype: torch.dtype, norm: bool, gated: bool) -> None:
    case = LinearCase.draw(5, 48, 64, dtype, torch.device("cpu"), norm=norm, bias=True, gated=gated, residual=True)
    fusion = Fusion(None if case.gain is None else RmsNorm(case.gain, EPS), gated, case.residual, torch.float32)
    result = kernels.linear(case.x.contiguous(), kernels.pack_linear(case.weight), case.bias, fusion)
    assert result.dtype is torch.float32
    assert case.distance(result) < (1e-2 if dtype is torch.bfloat16 else 1e-5)
