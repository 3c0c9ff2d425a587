"""The layers of ``quantized_speed``: a model's matrices in a quantized format, as many copies as rotation needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.graph_times import graph_microseconds
from benchmarks.tuned_layers import DTYPE, LAYERS, ROTATED_BYTES, Layer
from engines.kernels import Float8Matrix, Fusion, IntegerMatrix, QuantizedMatrix, backends
from engines.kernels.cuda.launch import Launcher, Specialisation
from engines.kernels.cuda.quantized_layout import DeviceCodes, device_codes
from engines.kernels.cuda.quantized_tuning import QuantizedConfig, QuantizedShape
from engines.kernels.quantized import round_activations
from engines.kernels.quantized_gpu import GpuQuantized

FORMATS = ("int4", "int8", "w8a8", "fp8")
"""4 bits in groups of 128; 8 bits, one scale a line; the same with inputs rounded to int8; float8 of both."""
GROUP = 128
NO_NAN = 0xF7
"""Of random bytes, bits that leave a number whatever the format."""
MOST_CHECKED = 256
"""Rows whose result is compared with the definition."""


def layers(model: str) -> list[Layer]:
    """Without the norm before them; those that differ in nothing else counted together."""
    found: dict[object, Layer] = {}
    for layer in LAYERS:
        plain = replace(layer, shape=replace(layer.shape, norm=False))
        key = (plain.shape, plain.bias, plain.residual, plain.output_dtype)
        if layer.model == model:
            found[key] = replace(plain, count=plain.count + (found[key].count if key in found else 0))
    return list(found.values())


def draw_matrix(format: str, lines: int, depth: int, device: torch.device) -> QuantizedMatrix:
    """Random codes; the values are about as large as those of a trained weight. On the meta device: its shapes."""
    if device.type == "meta":
        raw = torch.empty(lines, depth, dtype=torch.uint8, device=device)
    else:
        raw = torch.randint(0, 256, (lines, depth), dtype=torch.uint8, device=device)
    if format == "fp8":
        scale = torch.full((lines, 1), depth**-0.5 / 100, device=device)
        return Float8Matrix((raw & NO_NAN).view(torch.float8_e4m3fn), scale, (1, depth), "float8")
    bits, groups = (4, depth // GROUP) if format == "int4" else (8, 1)
    scale = torch.full((lines, groups), 1.0, device=device).div_(depth**0.5 * (1 << bits - 2)).half().float()
    return IntegerMatrix(raw & ((1 << bits) - 1), bits, scale, activations="int8" if format == "w8a8" else "float")


@dataclass(slots=True)
class QuantizedLayer:
    """One matrix in one format, with its inputs."""

    layer: Layer
    format: str
    matrix: QuantizedMatrix
    """Of the first copy."""
    copies: list[DeviceCodes]
    x: torch.Tensor
    bias: torch.Tensor | None
    residual: torch.Tensor | None

    @classmethod
    def draw(cls, layer: Layer, format: str, most_rows: int, device: torch.device) -> QuantizedLayer:
        shape = layer.shape
        matrix = draw_matrix(format, shape.lines, shape.depth, device)
        first = device_codes(matrix)
        assert first is not None
        copies = [first]
        for _ in range(1, max(-(-ROTATED_BYTES // first.weight_bytes), 2)):
            noise = torch.randint(0, 256, first.codes.shape, dtype=torch.uint8, device=device) & NO_NAN
            copies.append(replace(first, codes=noise, scale=None if first.scale is None else first.scale.clone()))
        width = shape.lines // 2 if shape.gated else shape.lines

        def random(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, device=device, dtype=DTYPE)

        return cls(
            layer,
            format,
            matrix,
            copies,
            random(most_rows, shape.depth),
            random(shape.lines) if layer.bias else None,
            random(most_rows, width) if layer.residual else None,
        )

    @property
    def shape(self) -> QuantizedShape:
        return QuantizedShape.of(self.copies[0], self.layer.shape.gated)

    @property
    def weight_bytes(self) -> int:
        return self.copies[0].weight_bytes

    def kernel(self, codes: DeviceCodes, rows: int, config: QuantizedConfig) -> torch.Tensor:
        """The layer by our kernel for few rows, its input's rounding included."""
        return run_kernel(codes, self.x[:rows], self.layer, self.bias, self._residual(rows), config)

    def composed(self, codes: DeviceCodes, rows: int) -> torch.Tensor:
        """The layer as for many rows: by torch's product of codes, or with the weight dequantized."""
        from engines.kernels import compose_output

        fusion = Fusion(None, self.layer.shape.gated, self._residual(rows), self.layer.output_dtype)
        return compose_output(GpuQuantized(codes).product(self.x[:rows], self.bias), fusion)

    def expected(self, rows: int) -> torch.Tensor:
        """With the first copy, by definition, in float32."""
        output = round_activations(self.x[:rows].float(), self.matrix) @ self.matrix.dequantize().t()
        if self.bias is not None:
            output += self.bias.float()
        if self.layer.shape.gated:
            gate, up = output.chunk(2, -1)
            output = torch.nn.functional.silu(gate) * up
        residual = self._residual(rows)
        return output if residual is None else output + residual.float()

    def time(self, run: Callable[[DeviceCodes], object], rows: int) -> float:
        """Microseconds of one ``run``, in a graph that takes all copies in turn."""
        copies = self.copies if rows <= MOST_CHECKED else self.copies[:2]
        calls = [partial(run, copies[number % len(copies)]) for number in range(max(len(copies), 4))]
        return graph_microseconds(calls, 3 if rows > MOST_CHECKED else 5, warm=calls[0])

    def _residual(self, rows: int) -> torch.Tensor | None:
        return None if self.residual is None else self.residual[:rows]


def run_kernel(
    codes: DeviceCodes,
    x: torch.Tensor,
    layer: Layer,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    config: QuantizedConfig,
) -> torch.Tensor:
    triton = backends.shared_triton()
    assert triton is not None
    row_scale = None
    if codes.activations != "float":
        x, row_scale = triton.round_rows(x, codes.activations == "float8", None, codes.padded_depth, x.dtype)
    gated, dtype = layer.shape.gated, layer.output_dtype
    return triton.quantized_linear(x, codes, config, row_scale, bias, gated, residual, dtype)


def specialisations(layer: Layer, format: str, rows: int, config: QuantizedConfig) -> list[Specialisation]:
    """What ``run_kernel`` launches, found on the meta device by a process that has called ``rehearse_on``."""
    meta = torch.device("meta")
    shape, found = layer.shape, list[Specialisation]()
    codes = device_codes(draw_matrix(format, shape.lines, shape.depth, meta))
    assert codes is not None
    width = shape.lines // 2 if shape.gated else shape.lines
    x = torch.empty(rows, shape.depth, dtype=DTYPE, device=meta)
    bias = torch.empty(shape.lines, dtype=DTYPE, device=meta) if layer.bias else None
    residual = torch.empty(rows, width, dtype=DTYPE, device=meta) if layer.residual else None
    Launcher.recorder = lambda launched: found.append(launched.representative())
    try:
        run_kernel(codes, x, layer, bias, residual, config)
    finally:
        Launcher.recorder = None
    return found
