"""What a weight format is to the models: how a layer's weights are taken from the files.

A model file describes its linear layers (``LinearLayout``) and never names a format. A format is one frozen config,
part of the manifest, and one ``QuantMethod``: it gives each layer as a ``Matrix``, which ``engines.kernels`` packs and
applies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from engines.kernels import Matrix

Split = Literal["none", "out", "in"]
"""The axis over which tensor-parallel ranks share a weight: its rows (out), its columns (in), or none: each has all.
Experts are shared out whole, so an expert's own weights are not split."""


class WeightSource(Protocol):
    """Where weights come from. A name is a tensor's in the checkpoint; each must be taken or skipped by some layer."""

    @property
    def device(self) -> torch.device:
        """Of all tensors that ``take`` returns; ``meta`` where only sizes are counted."""

    @property
    def rank(self) -> int:
        """This process among ``world``."""

    @property
    def world(self) -> int:
        """Tensor-parallel processes."""

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        split: Split,
        dtype: torch.dtype | None = None,
        invented: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """This rank's part of the tensor whose full shape is ``shape``; own memory, contiguous.

        ``dtype`` None gives the model's. Floats of 16 and 32 bits are converted to one another; integers and float8
        must be stored as asked for. A stored scalar counts as of shape (1,). ``invented``, which broadcasts to the
        shape, is what a source of random weights gives instead of noise. Raises EngineLoadError, naming the tensor, if
        it is missing or differs.
        """

    def skip(self, name: str) -> None:
        """Mark a tensor as another rank's."""


@dataclass(frozen=True, slots=True)
class LinearPart:
    """One linear layer of the checkpoint, ``name`` without ``.weight`` or ``.bias``."""

    name: str
    out_features: int


@dataclass(frozen=True, slots=True)
class LinearLayout:
    """A linear layer: parts that share their input are stacked, so that one call computes them all."""

    parts: tuple[LinearPart, ...]
    in_features: int
    split: Split
    bias: bool = False


class QuantMethod(Protocol):
    """One weight format."""

    def tensor_names(self, part: LinearPart) -> tuple[str, ...]:
        """Names of the tensors that hold the part's weight, its bias apart."""

    def create_weights(self, part: LinearPart, in_features: int, split: Split, source: WeightSource) -> Matrix:
        """Take the part's weight from the source: (out, in), or this rank's share of it."""
