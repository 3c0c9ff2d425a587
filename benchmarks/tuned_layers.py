"""The linear layers whose kernels are tuned, and timing them on weights that no cache holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.graph_times import graph_microseconds
from engines.kernels import RmsNorm
from engines.kernels.cuda.tuning import MOST_ROWS, SkinnyConfig, SkinnyShape
from engines.kernels.elementwise import rms_norm, silu_mul
from engines.kernels.linear import Handover

ROTATED_BYTES = 512 << 20
"""At least so many bytes of distinct weights are read before one is read again."""
DTYPE = torch.bfloat16
EPS = 1e-6
REPLAYS = 5
HANDED_COLUMNS = 64
"""Of the stream, whose squares the layer before has summed."""


@dataclass(frozen=True, slots=True)
class Layer:
    model: str
    name: str
    shape: SkinnyShape
    count: int
    """Such layers in the model."""
    bias: bool = False
    residual: bool = False
    hands_over: bool = False
    """What the next layer's norm needs of the output."""
    handed: bool = False
    """The layer before has done so for the norm of this one."""
    output_dtype: torch.dtype = DTYPE

    @property
    def handed_parts(self) -> int:
        """Sums of squares that each row comes with."""
        return self.shape.depth // HANDED_COLUMNS if self.handed else 0

    @property
    def weight_bytes(self) -> int:
        return 2 * self.shape.lines * self.shape.depth


def _dense(model: str, hidden: int, intermediate: int, queries: int, qkv: int, layers: int, vocab: int) -> list[Layer]:
    return [
        Layer(model, "first_qkv", SkinnyShape(qkv, hidden, False, True), 1, bias=True),
        Layer(model, "qkv", SkinnyShape(qkv, hidden, False, False), layers - 1, bias=True, handed=True),
        Layer(model, "o", SkinnyShape(hidden, queries, False, False), layers, residual=True, hands_over=True),
        Layer(model, "gate_up", SkinnyShape(2 * intermediate, hidden, True, False), layers, handed=True),
        Layer(model, "down", SkinnyShape(hidden, intermediate, False, False), layers, residual=True, hands_over=True),
        Layer(model, "head", SkinnyShape(vocab, hidden, False, True), 1, output_dtype=torch.float32),
    ]


LAYERS = [
    *_dense("r1-1.5b", 1536, 8960, 1536, 2048, 28, 151936),
    *_dense("r1-7b", 3584, 18944, 3584, 4608, 28, 152064),
    Layer("v2-lite", "q_latents", SkinnyShape(3648, 2048, False, True), 27),
    Layer("v2-lite", "o", SkinnyShape(2048, 2048, False, False), 27, residual=True),
    Layer("v2-lite", "shared_gate_up", SkinnyShape(5632, 2048, True, True), 26),
    Layer("v2-lite", "shared_down", SkinnyShape(2048, 2816, False, False), 26, residual=True),
    Layer("v2-lite", "gate_up", SkinnyShape(21888, 2048, True, False), 1, handed=True),
    Layer("v2-lite", "down", SkinnyShape(2048, 10944, False, False), 1, residual=True, hands_over=True),
    Layer("v2-lite", "head", SkinnyShape(102400, 2048, False, True), 1, output_dtype=torch.float32),
]


@dataclass(slots=True)
class Inputs:
    """Fresh random tensors of a layer, as many weights as the rotation needs."""

    layer: Layer
    weights: list[torch.Tensor]
    x: torch.Tensor
    """(MOST_ROWS, depth); smaller steps take its first rows."""
    norm: RmsNorm
    scaled: torch.Tensor
    """x times the norm's gain: what is handed over, with ``squares``, (MOST_ROWS, parts)."""
    squares: torch.Tensor | None
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    next_norm: RmsNorm | None

    @classmethod
    def draw(cls, layer: Layer, pool: torch.Tensor) -> Inputs:
        """``pool`` holds random numbers; the weights are parts of it."""
        shape, device = layer.shape, pool.device
        size = shape.lines * shape.depth
        copies = max(1, min(pool.numel() // size, -(-ROTATED_BYTES // layer.weight_bytes)))
        width = shape.lines // 2 if shape.gated else shape.lines

        def random(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, device=device, dtype=DTYPE)

        x, gain = random(MOST_ROWS, shape.depth), random(shape.depth)
        parts = layer.handed_parts
        return cls(
            layer,
            [pool[copy * size : (copy + 1) * size].view(shape.lines, shape.depth) for copy in range(copies)],
            x,
            RmsNorm(gain, EPS),
            x * gain,
            x.float().square().view(MOST_ROWS, parts, -1).sum(-1) if parts else None,
            random(shape.lines) if layer.bias else None,
            random(MOST_ROWS, width) if layer.residual else None,
            RmsNorm(random(width), EPS) if layer.hands_over else None,
        )

    def skinny(self, weight: torch.Tensor, config: SkinnyConfig, rows: int) -> torch.Tensor:
        """The layer in one kernel, with its part in handing norms over."""
        from engines.kernels.cuda.skinny import handed_tiles, skinny_linear

        layer, lines, handover = self.layer, self.layer.shape.lines, None
        if self.next_norm is not None and (tiles := handed_tiles(rows, lines, config)):
            scaled, squares = self.x.new_empty(rows, lines), self.x.new_empty(rows, tiles, dtype=torch.float32)
            handover = Handover(self.next_norm, scaled, squares)
        return skinny_linear(
            self.scaled[:rows] if layer.handed else self.x[:rows],
            weight,
            config,
            (self.norm.weight, EPS) if layer.shape.norm or layer.handed else None,
            self.bias,
            layer.shape.gated,
            None if self.residual is None else self.residual[:rows],
            layer.output_dtype,
            squares=None if self.squares is None else self.squares[:rows],
            handover=handover,
        )

    def composed(self, weight: torch.Tensor, rows: int) -> torch.Tensor:
        """The layer out of cuBLAS's product and kernels around it."""
        x = self.x[:rows]
        if self.layer.shape.norm or self.layer.handed:
            x = rms_norm(x, self.norm.weight, EPS)
        turned = weight.t()
        if self.residual is not None:
            return torch.addmm(self.residual[:rows], x, turned)
        output = x.mm(turned) if self.bias is None else torch.addmm(self.bias, x, turned)
        if self.layer.shape.gated:
            output = silu_mul(output)
        return output.to(self.layer.output_dtype)

    def expected(self, rows: int) -> torch.Tensor:
        """The layer with the first weight, in float32."""
        x = self.x[:rows].float()
        if self.layer.shape.norm or self.layer.handed:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * self.norm.weight.float()
        output = x @ self.weights[0].float().t()
        if self.bias is not None:
            output = output + self.bias.float()
        if self.layer.shape.gated:
            gate, up = output.chunk(2, -1)
            output = torch.nn.functional.silu(gate) * up
        return output if self.residual is None else output + self.residual[:rows].float()


def microseconds(run: Callable[[torch.Tensor], object], weights: list[torch.Tensor]) -> float:
    """Of one ``run``, inside a CUDA graph that takes the weights in turn; the median of some replays."""
    calls = [partial(run, weights[index % len(weights)]) for index in range(max(len(weights), 8))]
    return graph_microseconds(calls, REPLAYS, warm=calls[0])
