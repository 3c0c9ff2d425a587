"""What a weight format is to the models: how its weights are taken from the files, and how they are applied.

A model file describes its linear layers (``LinearLayout``) and never names a format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch

from engines.kernels import Fusion, RmsNorm, RoutedBatch, Router

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

    def take(self, name: str, shape: tuple[int, ...], split: Split, dtype: torch.dtype | None = None) -> torch.Tensor:
        """This rank's part of the tensor whose full shape is ``shape``; own memory, contiguous.

        ``dtype`` None gives the model's. Raises EngineLoadError, naming the tensor, if it is missing or differs.
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


Raw = TypeVar("Raw")
Ready = TypeVar("Ready")
Grouped = TypeVar("Grouped")


class QuantMethod(Protocol[Raw, Ready, Grouped]):
    """One weight format."""

    def create_weights(self, layout: LinearLayout, source: WeightSource) -> Raw:
        """Take the layer's tensors from the source."""

    def finish(self, weights: Raw) -> Ready:
        """Bring them into the layout that ``apply`` reads; the raw ones may then go."""

    def apply(self, weights: Ready, x: torch.Tensor, fusion: Fusion) -> torch.Tensor:
        """(T, in) -> (T, out) in x's dtype, with what ``fusion`` does before and after the product."""

    def finish_experts(
        self, gate_up: list[Raw], down: list[Raw], shared: tuple[Raw, Raw], experts_per_token: int
    ) -> Grouped:
        """As ``finish``, for a mixture of experts: gate and up stacked, and down, of each, and of the shared layer."""

    def apply_experts(
        self, weights: Grouped, hidden: torch.Tensor, norm: RmsNorm, router: Router, batch: RoutedBatch
    ) -> torch.Tensor:
        """(T, hidden) residual stream -> the stream after the expert layer."""
