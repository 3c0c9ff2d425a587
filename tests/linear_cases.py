"""Random linear layers with all that can be fused into them, and their definition in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engines.kernels import RmsNorm
from engines.kernels.cuda.tuning import SkinnyConfig
from engines.kernels.linear import Handover

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

    def run(
        self,
        config: SkinnyConfig,
        dtype: torch.dtype | None = None,
        parts: int = 0,
        handover: Handover | None = None,
    ) -> torch.Tensor:
        """Through the skinny kernel; with ``parts``, the norm comes handed over in so many."""
        from engines.kernels.cuda.skinny import skinny_linear

        x, squares = self.x, None
        if self.gain is not None and parts:
            squares = torch.stack([part.float().square().sum(1) for part in x.tensor_split(parts, 1)], 1)
            x = (x.float() * self.gain.float()).to(x.dtype)
        norm = None if self.gain is None else (self.gain, EPS)
        return skinny_linear(
            x,
            self.weight,
            config,
            norm,
            self.bias,
            self.gated,
            self.residual,
            dtype,
            squares=squares,
            handover=handover,
        )

    def empty_handover(self, config: SkinnyConfig) -> Handover:
        """What the layer that reads this one's result gets, not yet filled, with a random gain."""
        rows, lines = self.x.shape[0], self.weight.shape[0]
        width = lines // 2 if self.gated else lines
        return Handover(
            RmsNorm(torch.randn(width).to(self.x.device, self.x.dtype), EPS),
            torch.full((rows, width), torch.nan, dtype=self.x.dtype, device=self.x.device),
            torch.full((rows, -(-lines // config.block_n)), torch.nan, device=self.x.device),
        )

    @staticmethod
    def check_handover(hidden: torch.Tensor, handover: Handover) -> None:
        """That it is what the norm needs of ``hidden``."""
        wide = hidden.float()
        scaled = (wide * handover.norm.weight.float()).to(hidden.dtype)
        # Triton's interpreter cuts where the GPU rounds.
        torch.testing.assert_close(handover.scaled, scaled, rtol=0.0 if hidden.is_cuda else 2**-7, atol=0.0)
        torch.testing.assert_close(handover.squares.sum(1), wide.square().sum(1), rtol=1e-5, atol=0.0)

    def distance(self, result: torch.Tensor) -> float:
        """Of the result from its definition, relative; NaN where an element was not written."""
        expected = self.expected()
        assert result.shape == expected.shape
        return float((result.double() - expected).norm() / expected.norm())
