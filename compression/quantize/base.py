"""What all ways of quantizing share: the scheme wanted, what calibration saw of a layer, and the one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from engines.kernels import Activations, QuantizedMatrix

Kind = Literal["integer", "float8", "codebook"]


@dataclass(frozen=True, slots=True)
class Scheme:
    """The format of one layer's weight and of its input."""

    kind: Kind
    bits: int = 8
    group_size: int | None = None
    """Columns that share a scale or a codebook, and divide the layer's width; None: the whole row does."""
    symmetric: bool = True
    """Of integers: levels around zero; else each group has a zero point of its own."""
    block: tuple[int, int] | None = None
    """Of float8: rows and columns that share a scale; None: a whole row does."""
    activations: Activations = "float"
    static_input: bool = False
    """The input's scale is fixed at calibration instead of for each token as it comes."""
    scale_dtype: torch.dtype = torch.bfloat16
    """What scales are stored as. A quantizer rounds its scales to this before it chooses codes."""

    def groups(self, in_features: int) -> int:
        """Groups in a row of ``in_features`` columns."""
        return in_features // (self.group_size or in_features)


class LayerInputs:
    """What calibration saw at the input of a linear layer. All tensors are float32 on the observed inputs' device."""

    def __init__(self, in_features: int, hessian: bool = False, samples: int = 0) -> None:
        """``hessian``: keep X^T X, in_features ** 2 numbers, allocated with the first input. ``samples``: rows of input
        to keep, spread evenly over all calls of ``observe`` that bring as many rows as the first one did."""
        self.in_features = in_features
        self.tokens = 0
        self.absmax: torch.Tensor | None = None
        """(in,): the largest size of each feature; None before the first token. So the sums."""
        self._sum_abs: torch.Tensor | None = None
        self._sum_square: torch.Tensor | None = None
        self._sum: torch.Tensor | None = None
        self._keeps_hessian = hessian
        self._hessian: torch.Tensor | None = None
        self._wanted_samples = samples
        self._samples: list[torch.Tensor] = []
        self.derived: dict[str, torch.Tensor] = {}
        """What a quantizer made of the inputs, for the next layer that reads them too; forgotten by ``release``."""

    def observe(self, x: torch.Tensor) -> None:
        """Take in (T, in) inputs of any floating type; not-finite ones are a ValueError, as no scale follows."""
        if not x.shape[0]:
            return
        x = x.float()
        absolute = x.abs()
        largest = absolute.amax(dim=0)
        if not bool(largest.isfinite().all()):
            raise ValueError("the layer's input has NaN or infinite values")
        if self.absmax is None or self._sum_abs is None or self._sum_square is None or self._sum is None:
            self.absmax, self._sum_abs, self._sum_square, self._sum = (torch.zeros_like(largest) for _ in range(4))
        torch.maximum(self.absmax, largest, out=self.absmax)
        self._sum_abs += absolute.sum(dim=0)
        self._sum_square += x.square().sum(dim=0)
        self._sum += x.sum(dim=0)
        self.tokens += x.shape[0]
        if self._keeps_hessian:
            if self._hessian is None:
                self._hessian = torch.zeros(self.in_features, self.in_features, device=x.device)
            self._hessian.addmm_(x.t(), x)
        if self._wanted_samples:
            self._keep_samples(x)

    def _keep_samples(self, x: torch.Tensor) -> None:
        """Every n-th row; n doubles, and every other kept row goes, when there are twice as many as wanted."""
        self._samples.append(x[:: max(1, self.tokens // (2 * self._wanted_samples))].clone())
        if sum(part.shape[0] for part in self._samples) > 2 * self._wanted_samples:
            self._samples = [torch.cat(self._samples)[::2].clone()]

    @property
    def mean_abs(self) -> torch.Tensor:
        """(in,): the mean size of each feature. Raises ValueError before the first token; so those below."""
        return self._mean(self._sum_abs)

    @property
    def mean_square(self) -> torch.Tensor:
        """(in,): the diagonal of the Hessian, divided by the tokens; kept without it too."""
        return self._mean(self._sum_square)

    @property
    def mean(self) -> torch.Tensor:
        """(in,)."""
        return self._mean(self._sum)

    def _mean(self, total: torch.Tensor | None) -> torch.Tensor:
        if total is None:
            raise ValueError("no input was observed")
        return total / self.tokens

    @property
    def hessian(self) -> torch.Tensor:
        """(in, in): X^T X, the sum over all tokens, not a mean; it is the object's own memory, so it must be left as it
        is. Raises ValueError where it was not asked for or nothing was observed."""
        if self._hessian is None:
            raise ValueError("no Hessian was kept")
        return self._hessian

    def divide(self, scale: torch.Tensor) -> None:
        """The layer's input is divided by (in,) ``scale`` from now on: what was seen follows, in place."""
        if self.absmax is None or self._sum_abs is None or self._sum_square is None or self._sum is None:
            return
        for statistic in (self.absmax, self._sum_abs, self._sum, self._sum_square, self._sum_square):
            statistic /= scale
        if self._hessian is not None:
            self._hessian /= scale
            self._hessian /= scale.unsqueeze(1)
        for part in self._samples:
            part /= scale

    @property
    def samples(self) -> torch.Tensor:
        """(S, in): inputs as they came; empty where none were asked for."""
        return torch.cat(self._samples) if self._samples else torch.empty(0, self.in_features)

    def release(self) -> None:
        """Give up what is large: the Hessian, the samples and what was derived."""
        self._hessian, self._samples = None, []
        self.derived.clear()


class Quantizer(Protocol):
    """One way to choose codes and scales."""

    @property
    def needs_hessian(self) -> bool:
        """Whether ``quantize`` reads ``LayerInputs.hessian``."""

    def quantize(self, weight: torch.Tensor, inputs: LayerInputs | None, scheme: Scheme) -> QuantizedMatrix:
        """(out, in) float32 -> a matrix of the scheme. ``inputs`` None: the layer was not calibrated, and the choice
        rests on the weight alone. Raises ValueError for a weight with NaN and for a scheme that does not fit it."""
