"""What is composed around a plain product where no kernel does it all."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from engines import kernels
from engines.kernels import Fusion, PackedLinear, RmsNorm
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


@pytest.mark.parametrize("reuse", [False, True])
def test_a_residual_is_overwritten_only_where_that_is_allowed(reuse: bool) -> None:
    """In the layout of a GPU, which plain torch computes here as well."""
    case = LinearCase.draw(5, 48, 64, torch.float32, torch.device("cpu"), residual=True)
    assert case.residual is not None
    packed, before = PackedLinear(case.weight.t(), "turned", 48, 64), case.residual.clone()
    expected = case.expected()
    result = kernels.linear(case.x, packed, fusion=Fusion(residual=case.residual, reuse=reuse))
    assert float((result.double() - expected).norm() / expected.norm()) < 1e-5
    assert torch.equal(case.residual, before) is not reuse
    assert (result is case.residual) is reuse


@pytest.mark.parametrize("layout", ["plain", "turned"])
def test_a_result_goes_where_it_is_wanted(layout: Literal["plain", "turned"]) -> None:
    case = LinearCase.draw(5, 48, 64, torch.bfloat16, torch.device("cpu"), residual=True)
    packed = PackedLinear(case.weight if layout == "plain" else case.weight.t(), layout, 48, 64)
    wanted = torch.full((7, 48), torch.nan)
    fusion = Fusion(residual=case.residual, dtype=torch.float32, into=wanted[:5])
    result = kernels.linear(case.x, packed, fusion=fusion)
    assert result.data_ptr() == wanted.data_ptr()
    assert case.distance(wanted[:5]) < 1e-2
    assert wanted[5:].isnan().all()
