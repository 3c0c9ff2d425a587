"""The parts that all models are built of, and the builder that takes their weights while it makes them."""

from __future__ import annotations

from typing import Protocol

import torch

from engines import kernels
from engines.kernels import (
    PLAIN,
    Fusion,
    Matrix,
    PackedExperts,
    PackedWeight,
    RmsNorm,
    Router,
    Stream,
    matrix_bytes,
)
from engines.models.batch import Batch
from engines.models.config import MoeConfig
from engines.models.weights import CountingSource
from engines.protocol import EngineLoadError
from engines.quant.base import LinearLayout, LinearPart, Split, WeightSource
from engines.quant.methods import Methods
from engines.quantization import HEAD_LAYER


class Linear:
    """One linear layer in some weight format; stacked parts come out side by side."""

    def __init__(self, packed: PackedWeight, bias: torch.Tensor | None) -> None:
        self._packed = packed
        self._bias = bias

    def __call__(self, x: torch.Tensor | Stream, fusion: Fusion = PLAIN) -> torch.Tensor:
        """(T, in) -> (T, out), or (T, out / 2) where ``fusion`` gates."""
        return kernels.linear(x, self._packed, self._bias, fusion)

    def add_to(self, stream: Stream, x: torch.Tensor, next_norm: RmsNorm | None) -> Stream:
        """``stream`` plus the layer of the (T, in) x; ``next_norm`` is what reads the sum next, if a norm does."""
        return kernels.add_linear(x, self._packed, self._bias, stream, next_norm)


class Embedding:
    """A row of the hidden size for each token id, in some weight format."""

    def __init__(self, table: Matrix, dtype: torch.dtype) -> None:
        """``table`` is (vocab, hidden); rows come out in ``dtype``."""
        self.table = table
        self.dtype = dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Vocabulary and hidden size."""
        return self.table.shape[0], self.table.shape[1]

    @property
    def device(self) -> torch.device:
        return self.table.device if isinstance(self.table, torch.Tensor) else self.table.codes.device

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the rows that come out."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Of the table."""
        return matrix_bytes(self.table)

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """(T,) int64 -> (T, hidden)."""
        if isinstance(self.table, torch.Tensor):
            return kernels.embed(token_ids, self.table)
        return kernels.embed_quantized(token_ids, self.table, self.dtype)


class ExpertProducts:
    """Routed and shared experts in some weight format."""

    def __init__(self, packed: PackedExperts) -> None:
        self._packed = packed

    def __call__(self, hidden: torch.Tensor, norm: RmsNorm, router: Router, batch: Batch) -> torch.Tensor:
        """(T, hidden) -> (T, hidden): the residual stream in, whose memory may be taken, and out."""
        return kernels.mixture(hidden, norm, router, self._packed, batch)


class Packing(Protocol):
    """Brings weights into the layout in which they are applied."""

    def linear(self, layout: LinearLayout, matrices: list[Matrix]) -> PackedWeight:
        """One matrix for each part of the layout."""

    def experts(
        self,
        layouts: list[tuple[LinearLayout, LinearLayout]],
        gate_up: list[list[Matrix]],
        down: list[Matrix],
        experts_per_token: int,
    ) -> PackedExperts:
        """Layouts and matrices of each routed expert, and of the shared ones last: gate and up, and down."""


class KernelPacking:
    """The Packing of models that are served: what ``engines.kernels`` reads fastest."""

    def linear(self, layout: LinearLayout, matrices: list[Matrix]) -> PackedWeight:
        return kernels.pack_linear(*matrices)

    def experts(
        self,
        layouts: list[tuple[LinearLayout, LinearLayout]],
        gate_up: list[list[Matrix]],
        down: list[Matrix],
        experts_per_token: int,
    ) -> PackedExperts:
        return kernels.pack_experts(gate_up[:-1], down[:-1], (gate_up[-1], down[-1]), experts_per_token)


class Mlp:
    """``hidden + down(silu(gate(x)) * up(x))`` with x the norm of hidden."""

    takes_handover = True

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up = gate_up
        self.down = down

    def __call__(self, stream: Stream, norm: RmsNorm, batch: Batch, next_norm: RmsNorm | None = None) -> Stream:
        gated = self.gate_up(stream, Fusion(norm=norm, gated=True))
        return self.down.add_to(stream, gated, next_norm)


class ModelBuilder:
    """Makes layers out of a weight source. Of a ``CountingSource`` it only declares them."""

    def __init__(self, source: WeightSource, methods: Methods, packing: Packing | None = None) -> None:
        self.source = source
        self.methods = methods
        self.packing = packing or KernelPacking()
        self.counting = isinstance(source, CountingSource)

    def share(self, count: int, what: str) -> int:
        """This rank's share of ``count`` heads or experts. Raises EngineLoadError if they cannot be shared evenly."""
        if count % self.source.world:
            raise EngineLoadError(f"{count} {what} cannot be shared by {self.source.world} devices evenly")
        return count // self.source.world

    def tensor(
        self, name: str, shape: tuple[int, ...], split: Split = "none", dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """A weight outside any linear layer."""
        return self.source.take(name, shape, split, dtype)

    def norm(self, name: str, width: int, eps: float) -> RmsNorm:
        """An RMS norm over ``width`` features."""
        return RmsNorm(self.tensor(name, (width,)), eps)

    def matrix(self, name: str, out_features: int, in_features: int, split: Split) -> Matrix:
        """A linear layer's weight in its format; ``name`` without ``.weight``."""
        part = LinearPart(name, out_features)
        return self.methods(name).create_weights(part, in_features, split, self.source)

    def linear(self, parts: dict[str, int], in_features: int, split: Split, bias: bool = False) -> Linear:
        """``parts``: output features by name, stacked in this order."""
        layout = _layout(parts, in_features, split, bias)
        matrices, vector = self._matrices(layout), self._bias(layout)
        return Linear(_uncounted(matrices) if self.counting else self.packing.linear(layout, matrices), vector)

    def _matrices(self, layout: LinearLayout) -> list[Matrix]:
        parts = layout.parts
        return [self.matrix(part.name, part.out_features, layout.in_features, layout.split) for part in parts]

    def _bias(self, layout: LinearLayout) -> torch.Tensor | None:
        if not layout.bias:
            return None
        names = [f"{part.name}.bias" for part in layout.parts]
        if layout.split == "in" and self.source.rank > 0:
            # The ranks' outputs are summed, so only one of them adds the bias.
            for name in names:
                self.source.skip(name)
            return None
        split: Split = "out" if layout.split == "out" else "none"
        sizes = [part.out_features for part in layout.parts]
        biases = [self.source.take(name, (size,), split) for name, size in zip(names, sizes, strict=True)]
        return biases[0] if len(biases) == 1 else torch.cat(biases)

    def experts(self, name: str, config: MoeConfig, hidden: int) -> ExpertProducts:
        """Routed and shared experts. Experts of other ranks are skipped."""
        share, width = self.share(config.experts, "experts"), config.intermediate
        first = self.source.rank * share
        layouts = []
        for expert in range(config.experts):
            layout = _expert_layouts(f"{name}.experts.{expert}", hidden, width, ("none", "none"))
            if first <= expert < first + share:
                layouts.append(layout)
            else:
                self._skip(layout)
        shared = config.shared_intermediate
        layouts.append(_expert_layouts(f"{name}.shared_experts", hidden, shared, ("out", "in")))
        gate_up = [self._matrices(wide) for wide, _ in layouts]
        down = [self._matrices(narrow)[0] for _, narrow in layouts]
        if self.counting:
            return ExpertProducts(PackedExperts((), (), None, None))
        return ExpertProducts(self.packing.experts(layouts, gate_up, down, config.experts_per_token))

    def _skip(self, layouts: tuple[LinearLayout, LinearLayout]) -> None:
        for layout in layouts:
            for part in layout.parts:
                for tensor in self.methods(part.name).tensor_names(part):
                    self.source.skip(tensor)

    def mlp(self, name: str, hidden: int, intermediate: int, bias: bool = False) -> Mlp:
        gate_up = {f"{name}.gate_proj": intermediate, f"{name}.up_proj": intermediate}
        return Mlp(
            self.linear(gate_up, hidden, "out", bias),
            self.linear({f"{name}.down_proj": hidden}, intermediate, "in", bias),
        )

    def embedding(self, name: str, vocab: int, hidden: int, dtype: torch.dtype) -> Embedding:
        """``name`` without ``.weight``; every rank has it whole."""
        return Embedding(self.matrix(name, vocab, hidden, "none"), dtype)

    def head(self, embedding: Embedding) -> Linear:
        """The output layer of a model that has the same weight for it as for its embedding."""
        layout = _layout({HEAD_LAYER: embedding.shape[0]}, embedding.shape[1], "none", bias=False)
        matrices = [embedding.table]
        return Linear(_uncounted(matrices) if self.counting else self.packing.linear(layout, matrices), None)


def _uncounted(matrices: list[Matrix]) -> PackedWeight:
    """Stands for a packed weight where only bytes are counted."""
    return kernels.PackedLinear(torch.empty(0, device="meta"), "plain", sum(m.shape[0] for m in matrices), 0)


def _expert_layouts(
    name: str, hidden: int, width: int, splits: tuple[Split, Split]
) -> tuple[LinearLayout, LinearLayout]:
    """Of gate and up, and of down."""
    return (
        _layout({f"{name}.gate_proj": width, f"{name}.up_proj": width}, hidden, splits[0], bias=False),
        _layout({f"{name}.down_proj": hidden}, width, splits[1], bias=False),
    )


def _layout(parts: dict[str, int], in_features: int, split: Split, bias: bool) -> LinearLayout:
    return LinearLayout(tuple(LinearPart(name, size) for name, size in parts.items()), in_features, split, bias)
