"""What every weight format keeps to. A further one is one more line in ``FORMATS``."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from engines.kernels import Matrix, dense, matrix_bytes
from engines.models.weights import CountingSource, FileSource, Placement, RandomSource
from engines.protocol import EngineLoadError
from engines.quant.base import LinearPart, QuantMethod, Split
from engines.quant.compressed import CompressedIntegersMethod
from engines.quant.methods import method_of
from engines.quantization import (
    Awq,
    Codebook,
    CompressedFloat8,
    CompressedIntegers,
    Float8,
    GgufBlocks,
    Gptq,
    LayerFormat,
)

CPU = torch.device("cpu")
OUT, WIDTH = 128, 512
PART = LinearPart("model.layers.0.mlp.down_proj", OUT)
FORMATS: dict[str, LayerFormat | None] = {
    "plain": None,
    "int4 groups": CompressedIntegers(packed=True, bits=4, strategy="group", group_size=64),
    "int4 channel": CompressedIntegers(packed=True, bits=4, strategy="channel"),
    "int4 groups, zero points": CompressedIntegers(
        packed=True, bits=4, strategy="group", group_size=32, symmetric=False
    ),
    "int3 channel, zero points": CompressedIntegers(packed=True, bits=3, strategy="channel", symmetric=False),
    "int8 packed": CompressedIntegers(packed=True, bits=8, strategy="group", group_size=128),
    "int4 ordered": CompressedIntegers(packed=True, bits=4, strategy="group", group_size=64, ordered=True),
    "int8 channel, int8 inputs": CompressedIntegers(packed=False, bits=8, strategy="channel", activations="int8"),
    "int8 tensor, fixed inputs": CompressedIntegers(
        packed=False, bits=8, strategy="tensor", symmetric=False, activations="int8", static_input=True
    ),
    "float8 channel": CompressedFloat8(strategy="channel", activations="float8"),
    "float8 tensor": CompressedFloat8(strategy="tensor", activations="float8", static_input=True),
    "float8 blocks": CompressedFloat8(strategy="block", block=(32, 64)),
    "codebook": Codebook(bits=4, group_size=128),
    "codebook of 3 bits, whole rows": Codebook(bits=3),
    "codebook with shared levels": Codebook(bits=4, group_size=64, shared=True),
    "gptq": Gptq(bits=4, group_size=64, zero_less_one=True),
    "gptq 2 of 3 bits": Gptq(bits=3, group_size=None, zero_less_one=False),
    "awq": Awq(group_size=64),
    "fp8": Float8(block=(64, 64)),
    "fp8, one scale": Float8(block=None, static_input=True),
    **{kind: GgufBlocks(blocks=kind) for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")},
}
RANDOM_SIZES = sorted(name for name, config in FORMATS.items() if not isinstance(config, GgufBlocks))
"""Formats of which random weights are made: a GGUF file is always read."""


class _Recording(RandomSource):
    """Random tensors that are written down."""

    def __init__(self) -> None:
        super().__init__(Placement(device=CPU, dtype=torch.float32), seed=5)
        self.tensors: dict[str, torch.Tensor] = {}

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        split: Split,
        dtype: torch.dtype | None = None,
        invented: torch.Tensor | None = None,
    ) -> torch.Tensor:
        tensor = super().take(name, shape, split, dtype, invented)
        self.tensors[name] = tensor.clone()
        return tensor


class _Tensors:
    """A ``TensorReader`` of tensors in memory."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def read(self, name: str, part: tuple[slice, ...]) -> torch.Tensor:
        return self.tensors[name][part]


def stored(tensors: dict[str, torch.Tensor], rank: int = 0, world: int = 1) -> FileSource:
    placement = Placement(device=CPU, dtype=torch.float32, rank=rank, world=world)
    return FileSource(placement, _Tensors(tensors), lambda progress: None, total=1)


def record(method: QuantMethod) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint with one layer, its scales spread."""
    source = _Recording()
    method.create_weights(PART, WIDTH, "none", source)
    for name, tensor in source.tensors.items():
        if "scale" in name:
            tensor.mul_(torch.rand(tensor.shape) + 0.5)
        if name.endswith(".weight_blocks"):
            # Random bytes as float16 scales may be NaN: keep their exponents small.
            tensor.bitwise_and_(0x3B)
    return source.tensors


@pytest.fixture(params=FORMATS)
def method(request: pytest.FixtureRequest) -> QuantMethod:
    return method_of(FORMATS[request.param])


def values(method: QuantMethod, source: FileSource, split: Split = "none") -> torch.Tensor:
    return dense(method.create_weights(PART, WIDTH, split, source), torch.float32)


def test_it_takes_the_tensors_that_it_names(method: QuantMethod) -> None:
    tensors = record(method)
    assert sorted(tensors) == sorted(method.tensor_names(PART))
    source = stored(tensors)
    result = values(method, source)
    source.finish(lambda name: False)
    assert result.shape == (OUT, WIDTH)
    assert result.isfinite().all()
    assert result.std() > 0


@pytest.mark.parametrize("split", ["out", "in"])
def test_two_ranks_hold_the_whole(method: QuantMethod, split: Split) -> None:
    tensors = record(method)
    whole = values(method, stored(tensors))
    if split == "in" and isinstance(method, CompressedIntegersMethod) and method.config.ordered:
        with pytest.raises(EngineLoadError, match="activation order cannot be shared by several devices"):
            values(method, stored(tensors, 0, world=2), split)
        return
    parts = [values(method, stored(tensors, rank, world=2), split) for rank in range(2)]
    assert torch.equal(torch.cat(parts, dim=0 if split == "out" else 1), whole)


def test_a_layer_that_cannot_be_shared_evenly_is_refused(method: QuantMethod) -> None:
    with pytest.raises(EngineLoadError, match="cannot be shared by 3 devices"):
        values(method, stored(record(method), 0, world=3), "out")


def test_bytes_are_counted_as_they_are_stored(method: QuantMethod) -> None:
    counter = CountingSource(Placement(device=CPU, dtype=torch.float32))
    matrix = method.create_weights(PART, WIDTH, "none", counter)
    source = stored(record(method))
    real = method.create_weights(PART, WIDTH, "none", source)
    assert counter.taken_bytes == source.taken_bytes
    assert matrix_bytes(matrix) == matrix_bytes(real)
    assert _shapes(matrix) == _shapes(real)


def _shapes(matrix: Matrix) -> list[tuple[int, ...]]:
    if isinstance(matrix, torch.Tensor):
        return [tuple(matrix.shape)]
    parts = (getattr(matrix, field.name) for field in dataclasses.fields(matrix))
    return [tuple(part.shape) for part in parts if isinstance(part, torch.Tensor)]


def test_each_missing_tensor_is_named(method: QuantMethod) -> None:
    tensors = record(method)
    for name in tensors:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        with pytest.raises(EngineLoadError, match=f"tensor {name} is missing"):
            values(method, stored(rest))


def test_each_wrong_type_and_shape_is_named(method: QuantMethod) -> None:
    tensors = record(method)
    for name, tensor in tensors.items():
        with pytest.raises(EngineLoadError, match=f"tensor {name} is stored as int16"):
            values(method, stored({**tensors, name: torch.zeros(tensor.shape, dtype=torch.int16)}))
        with pytest.raises(EngineLoadError, match=f"tensor {name} has shape"):
            values(method, stored({**tensors, name: torch.zeros(3, *tensor.shape, dtype=tensor.dtype)}))


@pytest.mark.parametrize("name", RANDOM_SIZES)
def test_random_weights_keep_the_size_of_what_goes_through(name: str) -> None:
    source = RandomSource(Placement(device=CPU, dtype=torch.float32), seed=1)
    matrix = method_of(FORMATS[name]).create_weights(PART, WIDTH, "none", source)
    result = dense(matrix, torch.float32)
    assert result.isfinite().all()
    assert result.square().mean().sqrt() * WIDTH**0.5 == pytest.approx(1, abs=0.1)
