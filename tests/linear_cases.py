"""Random linear layers with all that can be fused into them, and their definition in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engines.kernels.cuda.tuning import SkinnyConfig

EPS = 1e-6


@dataclass(frozen=True, slots=True)
class LinearCase:
    x: torch.Tensor
    """(T, in), NaN behind the end of each row."""
    weight: torch.Tensor
    gain: torch.Tensor | None
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    gated: bool

    @classmethod
    def draw(
        cls,
        rows: int,
        lines: int,
        depth: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        norm: bool = False,
        bias: bool = False,
        gated: bool = False,
        residual: bool = False,
    ) -> LinearCase:
        def random(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes).to(device, dtype)

        wide = torch.full((rows, depth + 16), float("nan"), dtype=dtype, device=device)
        wide[:, :depth] = random(rows, depth)
        width = lines // 2 if gated else lines
        added = torch.full((rows, width + 8), float("nan"), dtype=dtype, device=device)
        added[:, :width] = random(rows, width)
        return cls(
            wide[:, :depth],
            (torch.randn(lines, depth) / depth**0.5).to(device, dtype),
            random(depth) if norm else None,
            random(lines) if bias else None,
            added[:, :width] if residual else None,
            gated,
        )

    def expected(self) -> torch.Tensor:
        x = self.x.double()
        if self.gain is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * self.gain.double()
        output = x @ self.weight.double().t()
        if self.bias is not None:
            output = output + self.bias.double()
        if self.gated:
            gate, up = output.chunk(2, -1)
            output = torch.nn.functional.silu(gate) * up
        return output if self.residual is None else output + self.residual.double()

    def run(self, config: SkinnyConfig, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Through the skinny kernel."""
        from engines.kernels.cuda.skinny import skinny_linear

        norm = None if self.gain is None else (self.gain, EPS)
        return skinny_linear(self.x, self.weight, config, norm, self.bias, self.gated, self.residual, dtype)

    def distance(self, result: torch.Tensor) -> float:
        """Of the result from its definition, relative; NaN where an element was not written."""
        expected = self.expected()
        assert result.shape == expected.shape
        return float((result.double() - expected).norm() / expected.norm())
