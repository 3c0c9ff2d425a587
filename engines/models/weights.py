"""Weight sources: files, random numbers, or nothing at all where only the bytes are counted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from engines.models.staging import Uploader
from engines.protocol import EngineLoadError, LoadProgress, ReportProgress
from engines.quant.base import Split
from engines.quant.invented import FLOAT8_STD

PROGRESS_STEPS = 100
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_FLOAT8 = 448.0
EMBEDDING_STD = 0.02
"""Of random embeddings and biases; random matrices keep the size of what goes through them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where tensors go and which part of them."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1


class TensorReader(Protocol):
    """The files of one model."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of all tensors, by their names in a Hugging Face checkpoint."""

    def read(self, name: str, part: tuple[slice, ...]) -> torch.Tensor:
        """That part of the tensor, on the CPU as it is stored; it may share the file's memory."""


class _Source:
    """What all sources share: the placement and the count of bytes."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.device = placement.device
        self.rank = placement.rank
        self.world = placement.world
        self.taken_bytes = 0

    def counted(self, tensor: torch.Tensor) -> torch.Tensor:
        self.taken_bytes += tensor.nbytes
        return tensor

    def part(self, name: str, shape: tuple[int, ...], split: Split) -> tuple[slice, ...]:
        """This rank's slice of each axis. Raises EngineLoadError if the split axis cannot be shared evenly."""
        axes = [slice(0, extent) for extent in shape]
        if split != "none" and self.world > 1:
            axis = 0 if split == "out" else len(shape) - 1
            share, rest = divmod(shape[axis], self.world)
            if rest:
                raise EngineLoadError(f"tensor {name} of shape {shape} cannot be shared by {self.world} devices evenly")
            axes[axis] = slice(self.rank * share, (self.rank + 1) * share)
        return tuple(axes)


class ShapeSource(_Source):
    """Tensors that have no bytes, on the ``meta`` device: of them a model is made to see what its steps launch.

    ``shapes`` are those of all that was taken, whole, by name: what a checkpoint of the model holds.
    """

    def __init__(self, placement: Placement) -> None:
        super().__init__(placement)
        self.device = torch.device("meta")
        self.shapes: dict[str, tuple[int, ...]] = {}

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        split: Split,
        dtype: torch.dtype | None = None,
        invented: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.shapes[name] = shape
        extents = [axis.stop - axis.start for axis in self.part(name, shape, split)]
        return self.counted(torch.empty(extents, dtype=dtype or self.placement.dtype, device=self.device))

    def skip(self, name: str) -> None:
        """Nothing to do: there are no files."""


class CountingSource(ShapeSource):
    """The same for counting bytes only: layers are declared and never run."""


class RandomSource(_Source):
    """Each tensor from its own seed, made on the device. The same on one kind of device, whatever the rank."""

    def __init__(self, placement: Placement, seed: int) -> None:
        super().__init__(placement)
        self.seed = seed

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        split: Split,
        dtype: torch.dtype | None = None,
        invented: torch.Tensor | None = None,
    ) -> torch.Tensor:
        whole = self._whole(name, shape, dtype or self.placement.dtype, invented)
        part = whole[self.part(name, shape, split)]
        return self.counted(whole if part.shape == whole.shape else part.clone())

    def _whole(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, invented: torch.Tensor | None
    ) -> torch.Tensor:
        whole = torch.empty(shape, dtype=dtype, device=self.device)
        if invented is not None:
            return whole.copy_(invented)
        if len(shape) == 1 and name.endswith("norm.weight"):
            return whole.fill_(1)
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator(self.device).manual_seed(int.from_bytes(digest[:8], "little"))
        if dtype is torch.float8_e4m3fn:
            noise = torch.empty(shape, dtype=torch.float16, device=self.device)
            noise.normal_(0, FLOAT8_STD, generator=generator)
            return whole.copy_(noise.clamp_(-LARGEST_FLOAT8, LARGEST_FLOAT8))
        if not dtype.is_floating_point:
            whole.view(torch.uint8).random_(0, 256, generator=generator)
            return whole
        keeps_size = len(shape) > 1 and not name.endswith("embed_tokens.weight")
        return whole.normal_(0, shape[-1] ** -0.5 if keeps_size else EMBEDDING_STD, generator=generator)

    def skip(self, name: str) -> None:
        """Nothing to do: there are no files."""


class FileSource(_Source):
    """Strict: ``finish`` fails unless every tensor of the files was taken or skipped."""

    def __init__(self, placement: Placement, reader: TensorReader, report: ReportProgress, total: int) -> None:
        """``total``: bytes that all takes together will give, for the progress reports."""
        super().__init__(placement)
        self.reader = reader
        self.report = report
        self.total = total
        self.reported = 0
        self.used: set[str] = set()
        self._uploader = Uploader(self.device) if self.device.type == "cuda" else None

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        split: Split,
        dtype: torch.dtype | None = None,
        invented: torch.Tensor | None = None,
    ) -> torch.Tensor:
        stored = self.reader.shapes.get(name)
        if stored is None:
            raise EngineLoadError(f"tensor {name} is missing in the model's files; fetch the model again")
        if stored != shape and (stored, shape) != ((), (1,)):
            raise EngineLoadError(f"tensor {name} has shape {stored} where the config asks for {shape}")
        self.used.add(name)
        part = self.reader.read(name, self.part(name, stored, split))
        if stored != shape:
            part = part.view(shape)
        _require_type(name, part.dtype, dtype or self.placement.dtype)
        if self._uploader is not None:
            tensor = self._uploader.upload(part).to(dtype or self.placement.dtype)
        else:
            tensor = part.to(self.device, dtype or self.placement.dtype, copy=True).contiguous()
        self.counted(tensor)
        if self.taken_bytes - self.reported > self.total // PROGRESS_STEPS:
            self.reported = self.taken_bytes
            self.report(LoadProgress(phase="read", done=min(self.taken_bytes, self.total), total=self.total))
        return tensor

    def skip(self, name: str) -> None:
        self.used.add(name)

    def finish(self, ignorable: Callable[[str], bool]) -> None:
        """Raises EngineLoadError, naming up to three, if tensors were not used and are not ``ignorable``."""
        rest = sorted(name for name in self.reader.shapes.keys() - self.used if not ignorable(name))
        if rest:
            more = f" and {len(rest) - 3} more" if len(rest) > 3 else ""
            raise EngineLoadError(
                f"the model's files hold tensors that its architecture does not use: {', '.join(rest[:3])}{more}; "
                "config and weights do not belong together, or the architecture is a variant that is not supported"
            )


def _require_type(name: str, stored: torch.dtype, wanted: torch.dtype) -> None:
    """Floats are converted to one another; codes must be what they are read as."""
    if stored is wanted or (stored in FLOATS and wanted in FLOATS):
        return
    expected = "a float of 16 or 32 bits" if wanted in FLOATS else str(wanted).removeprefix("torch.")
    raise EngineLoadError(
        f"tensor {name} is stored as {str(stored).removeprefix('torch.')} where the config asks for {expected}; "
        "config and weights do not belong together"
    )
