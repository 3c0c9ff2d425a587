"""Finds the native CPU library and loads it with ctypes."""

from __future__ import annotations

import ctypes
import importlib.util
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p

import torch

VARIANTS = ("avx512vnni", "avx512", "avx2", "base")
"""Instruction sets, best first."""
TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
"""Element types, numbered as in kernels.h."""
SCALE_CODES = {**TYPE_CODES, torch.float16: 2}
"""Types of quantized weights' scales."""


class AttentionCall(ctypes.Structure):
    """``AttentionCall`` of kernels.h."""

    _fields_ = [
        ("queries", c_void_p),
        ("query_token_stride", c_int64),
        ("query_head_stride", c_int64),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_token_stride", c_int64),
        ("key_head_stride", c_int64),
        ("value_token_stride", c_int64),
        ("value_head_stride", c_int64),
        ("out", c_void_p),
        ("positions", c_void_p),
        ("query_starts", c_void_p),
        ("block_tables", c_void_p),
        ("table_stride", c_int64),
        ("block_size", c_int64),
        ("rows", c_int64),
        ("query_heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("value_dim", c_int64),
        ("workspace", c_void_p),
        ("scale", c_float),
        ("decodes", c_int),
        ("query_type", c_int),
        ("cache_type", c_int),
        ("threads", c_int),
    ]


class QuantizedCall(ctypes.Structure):
    """``QuantizedCall`` of kernels.h."""

    _fields_ = [
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("norm_weight", c_void_p),
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("offset", c_void_p),
        ("bias", c_void_p),
        ("residual", c_void_p),
        ("residual_stride", c_int64),
        ("out", c_void_p),
        ("workspace", c_void_p),
        ("workspace_bytes", c_int64),
        ("rows", c_int64),
        ("width", c_int64),
        ("depth", c_int64),
        ("columns", c_int64),
        ("group", c_int64),
        ("block", c_int64),
        ("eps", c_float),
        ("input_scale", c_float),
        ("zero_point", c_int),
        ("halves", c_int),
        ("per_token", c_int),
        ("gated", c_int),
        ("type", c_int),
        ("scale_type", c_int),
        ("out_type", c_int),
        ("threads", c_int),
    ]


_TYPE_AND_THREADS: list[type] = [c_int, c_int]
_SIGNATURES: dict[str, list[type]] = {
    "slim_panel_width": [],
    "slim_linear_workspace": [c_int64, c_int64],
    "slim_pack_panels": [c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int],
    "slim_linear": [c_void_p, c_int64, *[c_void_p] * 4, *[c_int64] * 3, c_int],
    "slim_attention_workspace": [c_int64, c_int64, c_int64, c_int],
    "slim_attention": [c_void_p],
    "slim_norm": [c_void_p, c_int64, c_int64, *[c_void_p] * 2, *[c_int64] * 3, c_float, *_TYPE_AND_THREADS],
    "slim_silu_mul": [c_void_p, c_int64, c_void_p, c_int64, c_int64, *_TYPE_AND_THREADS],
    "slim_rope": [*[c_void_p, *[c_int64] * 3] * 2, c_void_p, c_void_p, c_int64, c_int64, c_int, *_TYPE_AND_THREADS],
    "slim_write_cache": [c_void_p, c_int64, c_int64, c_void_p, c_void_p, *[c_int64] * 3, *[c_int] * 3],
    "slim_embed": [*[c_void_p] * 4, *[c_int64] * 4, *[c_int] * 3],
    "slim_gumbel": [*[c_void_p] * 4, c_int64, c_int64, c_int],
    "slim_argmax": [c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int],
    "slim_quantized_linear": [c_void_p],
}
"""Exported functions and their arguments after the first, the table of kernels."""


class NativeUnavailable(Exception):
    """Why this machine runs the torch reference instead."""


def load_library() -> ctypes.CDLL:
    """The library with every function's types set. Raises NativeUnavailable."""
    spec = importlib.util.find_spec("engines.kernels.native._kernels")
    if spec is None or spec.origin is None:
        raise NativeUnavailable("the library was not built (no C compiler when the package was installed)")
    try:
        library = ctypes.CDLL(spec.origin)
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = [c_void_p, *arguments]
            function.restype = c_int64 if name.endswith(("width", "workspace", "quantized_linear")) else None
        library.slim_kernels.argtypes, library.slim_kernels.restype = [c_char_p], c_void_p
        library.slim_tape_begin.argtypes, library.slim_tape_begin.restype = [c_int], c_void_p
        library.slim_tape_end.argtypes, library.slim_tape_end.restype = [], c_int64
        library.slim_tape_free.argtypes, library.slim_tape_free.restype = [c_void_p], None
        library.slim_tape_run.argtypes, library.slim_tape_run.restype = [c_void_p, c_int], None
    except (OSError, AttributeError) as error:
        raise NativeUnavailable("the library does not load: it was built for another machine or version") from error
    return library
