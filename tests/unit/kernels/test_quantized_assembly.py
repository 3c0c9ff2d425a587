"""The assembly that turns codes into floats, run instruction by instruction: Triton's interpreter knows none of it."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

from engines.kernels.cuda import quantized_codes

EVERY = torch.arange(256, dtype=torch.uint8)
PAIRS = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}


class Machine:
    """Registers of 32 bits of 64 threads at once, as int64."""

    def __init__(self, packed: torch.Tensor, outputs: int) -> None:
        """``packed``: (256,) bytes, four a thread."""
        self.registers = {f"${outputs}": packed.view(torch.int32).long() & 0xFFFFFFFF}
        self.outputs = outputs

    def run(self, assembly: str) -> None:
        for line in assembly.strip("{} \n").split(";"):
            words = re.findall(r"[^\s,]+", line)
            if words and not words[0].startswith(".reg"):
                self.registers[words[1]] = self.step(words[0], [self.value(word) for word in words[2:]])

    def value(self, word: str) -> torch.Tensor:
        if word in self.registers:
            return self.registers[word]
        return torch.full((64,), int(word, 0))

    def step(self, operation: str, values: list[torch.Tensor]) -> torch.Tensor:
        match operation.split("."):
            case ["mov", "b32"]:
                return values[0]
            case ["and", "b32"]:
                return values[0] & values[1]
            case ["xor", "b32"]:
                return values[0] ^ values[1]
            case ["shr", "u32"]:
                return values[0] >> values[1]
            case ["lop3", "b32"]:
                assert int(values[3][0]) == 0xF0 & 0xCC | 0xAA
                return values[0] & values[1] | values[2]
            case ["prmt", "b32"]:
                both = values[0] | values[1] << 32
                picks = [int(values[2][0]) >> 4 * place & 0xF for place in range(4)]
                assert max(picks) < 8
                return sum((both >> 8 * pick & 0xFF) << 8 * place for place, pick in enumerate(picks))  # type: ignore[return-value]
            case ["fma", "rn", pair]:
                first, second, third = (self.floats(value, PAIRS[pair]) for value in values)
                return (first.double() * second.double() + third.double()).to(PAIRS[pair]).view(torch.int32)[
                    :, 0
                ].long() & 0xFFFFFFFF
        raise AssertionError(operation)

    @staticmethod
    def floats(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(64, 2)."""
        return value.to(torch.int32).view(64, 1).view(torch.int16).view(dtype)

    def result(self, first: int, dtype: torch.dtype) -> torch.Tensor:
        """(256,): of two output registers, four values a thread."""
        pairs = [self.floats(self.registers[f"${first + place}"], dtype) for place in range(2)]
        return torch.cat(pairs, dim=1).flatten().double()


@pytest.mark.parametrize(("name", "dtype"), [("BFLOAT16", torch.bfloat16), ("FLOAT16", torch.float16)])
def test_every_byte(name: str, dtype: torch.dtype) -> None:
    def run(kind: str, outputs: int) -> Machine:
        machine = Machine(EVERY.clone(), outputs)
        machine.run(getattr(quantized_codes, f"{kind}_{name}").value)
        return machine

    halves = run("HALVES", 4)
    assert torch.equal(halves.result(0, dtype), (EVERY & 15).double() - 8)
    assert torch.equal(halves.result(2, dtype), (EVERY >> 4).double() - 8)
    assert torch.equal(run("BYTES", 2).result(0, dtype), EVERY.view(torch.int8).double())
    numbers = EVERY & 0x7F != 0x7F
    expected = EVERY.view(torch.float8_e4m3fn).double()[numbers]
    assert torch.equal(run("FLOAT8", 2).result(0, dtype)[numbers], expected)
