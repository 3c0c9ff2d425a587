"""Runs Triton kernels on CPU tensors through Triton's interpreter. Import before any kernel is defined.

Does nothing where there is a CUDA device: there the same tests run the compiled kernels (``DEVICE``).
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


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
