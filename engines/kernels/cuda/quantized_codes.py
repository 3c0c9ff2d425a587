"""Codes of quantized weights as 16-bit floats, exact, at one to three instructions a weight.

bfloat16 has 7 bits of fraction, so 0x4300 | v is 128 + v for any v below 128; float16 has 10, and 0x6400 | v is
1024 + v. Where there is no such assembly, in Triton's interpreter, the same is computed in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engines.kernels.cuda import quantized_layout

HALVES, LEVELS = tl.constexpr(quantized_layout.HALVES), tl.constexpr(quantized_layout.LEVELS)
BYTES, FLOAT8 = tl.constexpr(quantized_layout.BYTES), tl.constexpr(quantized_layout.FLOAT8)
"""Formats, as kernels compare them."""
ZERO_POINT, OFFSET = tl.constexpr(quantized_layout.ZERO_POINT), tl.constexpr(quantized_layout.OFFSET)

_HALVES = """{{
    .reg .b32 low, high, one, less, top;
    mov.b32 one, {one};
    mov.b32 less, {less};
    mov.b32 top, {top};
    and.b32 low, $4, 0x0F0F0F0F;
    shr.u32 high, $4, 4;
    and.b32 high, high, 0x0F0F0F0F;
    prmt.b32 $0, low, top, 0x4140;
    prmt.b32 $1, low, top, 0x4342;
    prmt.b32 $2, high, top, 0x4140;
    prmt.b32 $3, high, top, 0x4342;
    fma.rn.{type} $0, $0, one, less;
    fma.rn.{type} $1, $1, one, less;
    fma.rn.{type} $2, $2, one, less;
    fma.rn.{type} $3, $3, one, less;
}}"""
HALVES_BFLOAT16 = tl.constexpr(_HALVES.format(type="bf16x2", top="0x43434343", one="0x3F803F80", less="0xC308C308"))
"""1 and -136."""
HALVES_FLOAT16 = tl.constexpr(_HALVES.format(type="f16x2", top="0x64646464", one="0x3C003C00", less="0xE408E408"))
"""1 and -1032."""
# The lower 7 bits, with 128 added to both, less the highest one's 0 or 128.
BYTES_BFLOAT16 = tl.constexpr("""{
    .reg .b32 low, sign, first, second, minus, top;
    mov.b32 minus, 0xBF80BF80;
    mov.b32 top, 0x43434343;
    and.b32 low, $2, 0x7F7F7F7F;
    and.b32 sign, $2, 0x80808080;
    prmt.b32 $0, low, top, 0x4140;
    prmt.b32 $1, low, top, 0x4342;
    prmt.b32 first, sign, top, 0x4140;
    prmt.b32 second, sign, top, 0x4342;
    fma.rn.bf16x2 $0, first, minus, $0;
    fma.rn.bf16x2 $1, second, minus, $1;
}""")
# 128 more, which turns the highest bit, beside 1024, and -1152.
BYTES_FLOAT16 = tl.constexpr("""{
    .reg .b32 raised, one, less, top;
    mov.b32 one, 0x3C003C00;
    mov.b32 less, 0xE480E480;
    mov.b32 top, 0x64646464;
    xor.b32 raised, $2, 0x80808080;
    prmt.b32 $0, raised, top, 0x4140;
    prmt.b32 $1, raised, top, 0x4342;
    fma.rn.f16x2 $0, $0, one, less;
    fma.rn.f16x2 $1, $1, one, less;
}""")
_FLOAT8 = """{{
    .reg .b32 first, second, part, scale, none;
    mov.b32 scale, {scale};
    mov.b32 none, 0x80008000;
    prmt.b32 first, $2, 0, 0x1404;
    prmt.b32 second, $2, 0, 0x3424;
    shr.u32 part, first, {shift};
    and.b32 part, part, {mask};
    lop3.b32 $0, first, 0x80008000, part, 0xEA;
    shr.u32 part, second, {shift};
    and.b32 part, part, {mask};
    lop3.b32 $1, second, 0x80008000, part, 0xEA;
    fma.rn.{type} $0, $0, scale, none;
    fma.rn.{type} $1, $1, scale, none;
}}"""
# Its bits where the wider type has its exponent are the value times 2**-120 or 2**-8, also where it is subnormal.
FLOAT8_BFLOAT16 = tl.constexpr(_FLOAT8.format(type="bf16x2", scale="0x7B807B80", shift=4, mask="0x07F007F0"))
FLOAT8_FLOAT16 = tl.constexpr(_FLOAT8.format(type="f16x2", scale="0x5C005C00", shift=1, mask="0x3F803F80"))


@triton.jit
def halves_of(packed, TYPE: tl.constexpr, ASM: tl.constexpr):
    """Two codes a byte -> each less 8, as numbers of a 16-bit TYPE: of the low halves, and of the high ones."""
    if ASM and (TYPE == tl.bfloat16):  # noqa: SIM300 - TYPE is no constant here
        low, high = tl.inline_asm_elementwise(
            HALVES_BFLOAT16,
            "=&r,=&r,=&r,=&r,r",
            [packed],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    elif ASM:
        low, high = tl.inline_asm_elementwise(
            HALVES_FLOAT16,
            "=&r,=&r,=&r,=&r,r",
            [packed],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        wide = packed.to(tl.int32)
        low = ((wide & 15) - 8).to(tl.float32).to(TYPE)
        high = ((wide >> 4) - 8).to(tl.float32).to(TYPE)
    return low, high


@triton.jit
def bytes_of(packed, TYPE: tl.constexpr, ASM: tl.constexpr):
    """Signed integers as numbers of a 16-bit TYPE."""
    if ASM and (TYPE == tl.bfloat16):  # noqa: SIM300 - TYPE is no constant here
        values = tl.inline_asm_elementwise(
            BYTES_BFLOAT16, "=&r,=&r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    elif ASM:
        values = tl.inline_asm_elementwise(BYTES_FLOAT16, "=&r,=&r,r", [packed], dtype=tl.float16, is_pure=True, pack=4)
    else:
        values = packed.to(tl.int8, bitcast=True).to(tl.float32).to(TYPE)
    return values


@triton.jit
def float8_of(packed, TYPE: tl.constexpr, ASM: tl.constexpr):
    """float8 e4m3 as numbers of a 16-bit TYPE."""
    if ASM and (TYPE == tl.bfloat16):  # noqa: SIM300 - TYPE is no constant here
        values = tl.inline_asm_elementwise(
            FLOAT8_BFLOAT16, "=&r,=&r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    elif ASM:
        values = tl.inline_asm_elementwise(
            FLOAT8_FLOAT16, "=&r,=&r,r", [packed], dtype=tl.float16, is_pure=True, pack=4
        )
    else:
        values = packed.to(tl.float8e4nv, bitcast=True).to(tl.float32).to(TYPE)
    return values


@triton.jit
def values_of(packed, TYPE: tl.constexpr, FORMAT: tl.constexpr, ASM: tl.constexpr):
    """Codes that stand one in an element of memory: bytes, float8, or 16-bit floats as they are."""
    if FORMAT == BYTES:
        values = bytes_of(packed, TYPE, ASM)
    elif FORMAT == FLOAT8:
        values = float8_of(packed, TYPE, ASM)
    else:
        values = packed.to(TYPE)
    return values


@triton.jit
def level_values(packed, levels, books, TYPE: tl.constexpr):
    """Two numbers of levels a byte -> of the low halves, and of the high ones; ``books``, which broadcasts, says which
    16 of ``levels``."""
    wide = packed.to(tl.int32)
    start = levels + books * 16
    return tl.load(start + (wide & 15)).to(TYPE), tl.load(start + (wide >> 4)).to(TYPE)
