"""Runs Triton kernels on CPU tensors through Triton's interpreter. Import before any kernel is defined.

Does nothing where there is a CUDA device: there the same tests run the compiled kernels (``DEVICE``).
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def fp8_conversion(otherwise: Any) -> Any:
    """From and to e4m3 as a GPU does it: Triton 3.6 rounds into the exponent and lets what is too large turn over."""
    import triton.language as tl

    torch_types = {
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float32: torch.float32,
    }
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

    def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if tl.float8e4nv not in (source, target):
            return otherwise(values, source, target, rounding)
        raw = torch.from_numpy(np.ascontiguousarray(values).view(f"i{values.itemsize}"))
        wide = raw.view(torch_types[source]).float()
        if target == tl.float8e4nv:
            wide = wide.clamp(-448, 448)
        narrow = wide.to(torch_types[target])
        return narrow.view(bits[narrow.itemsize]).numpy()

    return convert


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = operand.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, left: Any, right: Any, *rest: Any) -> Any:
        # Triton 3.6 multiplies the bits of bfloat16 operands as integers.
        return dot(self, widened(left), widened(right), *rest)

    builder.create_dot = create_dot
    interpreter._convert_float = fp8_conversion(interpreter._convert_float)
    load, store = builder.create_masked_load, builder.create_masked_store

    def truth(mask: Any) -> Any:
        # A conjunction with a scalar has integers for truth values, which Triton 3.9 does not take for a mask.
        return interpreter.TensorHandle(mask.data.astype(bool), tl.int1)

    builder.create_masked_load = lambda self, places, mask, *rest, **named: load(
        self, places, truth(mask), *rest, **named
    )
    builder.create_masked_store = lambda self, places, value, mask, *rest, **named: store(
        self, places, value, truth(mask), *rest, **named
    )
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        # Triton 3.6 makes bounds of loops of arrays with one element, which NumPy 2.4 no longer turns into numbers.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor


if DEVICE.type == "cpu":
    _interpret()
