"""Tunes what a decoder layer was rounded to until it computes what the full model's layer does.

Block by block, as OmniQuant (Shao et al. 2023, arXiv 2308.13137) tunes clipping and EfficientQAT (Chen et al. 2024,
arXiv 2407.11062, its first phase) scales and weights: the input is what the compressed layers before give, the target
what the full model has after this layer, so that errors of earlier layers are made good as well. Gradients pass
through rounding as if it were not there. Memory holds one layer, its parameters with Adam's averages, and the
activations of the windows of one step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from compression.calibrated_layer import LayerWeights
from compression.compensation.biases import add_bias
from compression.compensation.tuned_layer import TunedLayer
from compression.hidden_states import HiddenStates
from compression.plan import LayerPlan
from compression.recipe import Compensation
from engines.models.config import ModelConfig

HELD_OUT = 8
"""Every so-manieth window is not tuned on: errors are reported on those."""
SCALE_RATE = 0.1
"""Learning rate of scales, in parts of themselves, over that of codes."""
LEAST_SQUARE = 1e-6
"""Of a token's stream, so that a stream of zeros divides nothing by zero."""
STEP_COST = 3
"""A step on a window costs so many forward passes."""


@dataclass(frozen=True, slots=True)
class BlockErrors:
    """Mean squared difference of the layer's output from the full model's, over the mean square of the token's stream;
    on windows that were not tuned on, where there are enough."""

    rounded: float
    tuned: float
    corrected: float | None = None
    """With the bias."""

    def note(self, index: int) -> str:
        """For the card."""
        parts = f"{self.rounded:.3g} after rounding, {self.tuned:.3g} after tuning"
        if self.corrected is not None:
            parts += f", {self.corrected:.3g} with its bias"
        kept = "" if self.tuned < self.rounded else "; tuning won nothing and was dropped"
        if self.corrected is not None and self.corrected >= min(self.rounded, self.tuned):
            kept += "; the bias won nothing and is zero"
        return f"layer {index}: relative error of its output {parts}{kept}"


class BlockTuner:
    """Compensates one decoder layer after the other."""

    def __init__(
        self,
        config: ModelConfig,
        settings: Compensation,
        plan: dict[str, LayerPlan],
        cos_sin: torch.Tensor,
        device: torch.device,
        tick: Callable[[float], None] = lambda amount: None,
    ) -> None:
        """``tick`` is told of work done, in passes of one window; ``tuning_passes`` says how many there are."""
        self._config = config
        self._settings = settings
        self._plan = plan
        self._cos_sin = cos_sin
        self._device = device
        self._tick = tick

    @property
    def needs_exact(self) -> bool:
        """Whether the layer's weights must keep what they were before rounding."""
        return self._settings.method == "rounding"

    def compensate(self, index: int, weights: LayerWeights, stream: HiddenStates, target: HiddenStates) -> BlockErrors:
        """Tune decoder layer ``index`` in place.

        ``stream`` is what goes into it, ``target`` what the full model has after it. Parameters that do not lower the
        error of the windows that were held out stay as they were.
        """
        block = TunedLayer(self._config, index, weights, self._settings.method, self._plan, self._cos_sin)
        tuned_on, held_out = split_windows(stream.windows)
        rounded = self._error(block, held_out, stream, target)
        with torch.enable_grad():
            self._descend(index, block, tuned_on, stream, target)
        tuned = self._error(block, held_out, stream, target)
        if tuned < rounded:
            block.keep()
        if self._settings.bias != "new":
            return BlockErrors(rounded, tuned)
        block = TunedLayer(self._config, index, weights, None, self._plan, self._cos_sin)
        difference = self._mean_difference(block, stream, target)
        add_bias(weights, index, difference)
        corrected = self._error(block, held_out, stream, target)
        if corrected >= min(rounded, tuned):
            add_bias(weights, index, -difference)
        return BlockErrors(rounded, tuned, corrected)

    def _descend(
        self, index: int, block: TunedLayer, windows: Sequence[int], stream: HiddenStates, target: HiddenStates
    ) -> None:
        settings, count = self._settings, _per_step(self._settings, stream.windows)
        optimizer = torch.optim.Adam(
            [
                {"params": block.gains, "lr": SCALE_RATE * settings.learning_rate},
                {"params": block.codes, "lr": settings.learning_rate},
            ]
        )
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: falling(step, settings.steps))
        for chosen in draws(windows, count, settings.steps, seed=index):
            inputs, wanted = (self._read(states, chosen) for states in (stream, target))
            optimizer.zero_grad()
            relative_error(block.layer(inputs), wanted).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            rates.step()
            self._tick(STEP_COST * count)

    def _error(self, block: TunedLayer, windows: Sequence[int], stream: HiddenStates, target: HiddenStates) -> float:
        total = 0.0
        for window in windows:
            output = block.layer(self._read(stream, [window]))
            total += float(relative_error(output, self._read(target, [window])))
            self._tick(1)
        return total / len(windows)

    def _mean_difference(self, block: TunedLayer, stream: HiddenStates, target: HiddenStates) -> torch.Tensor:
        """(hidden,): what the layer's output lacks on average, over all windows."""
        total = torch.zeros(self._config.hidden, device=self._device)
        for window in range(stream.windows):
            difference = self._read(target, [window]) - block.layer(self._read(stream, [window]))
            total += difference.mean(dim=(0, 1))
            self._tick(1)
        return total / stream.windows

    def _read(self, states: HiddenStates, windows: Sequence[int]) -> torch.Tensor:
        """(windows, tokens, hidden)."""
        return torch.stack([states.read(window, self._device) for window in windows])


def split_windows(count: int) -> tuple[list[int], list[int]]:
    """Windows to tune on, and windows to measure on: the same ones where there are too few for both."""
    windows = list(range(count))
    held_out = windows[HELD_OUT - 1 :: HELD_OUT]
    return ([window for window in windows if window not in held_out], held_out) if held_out else (windows, windows)


def draws(windows: Sequence[int], count: int, steps: int, seed: int) -> Iterator[list[int]]:
    """``count`` windows for each step; all have their turn before one comes again."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < count:
            order += torch.randperm(len(windows), generator=generator).tolist()
        yield [windows[place] for place in order[:count]]
        order = order[count:]


def falling(step: int, steps: int) -> float:
    """Factor of the learning rate: from 1 to 0 along a cosine."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def tuning_passes(settings: Compensation, windows: int) -> float:
    """Passes of a window that compensating one layer costs, with so many calibration windows."""
    measured = len(split_windows(windows)[1])
    corrected = windows + measured if settings.bias == "new" else 0
    return STEP_COST * settings.steps * _per_step(settings, windows) + 2 * measured + corrected


def _per_step(settings: Compensation, windows: int) -> int:
    return min(settings.windows_per_step, len(split_windows(windows)[0]))


def relative_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """() mean over tokens of the squared error over the mean square of the token's target, all (B, T, hidden): the
    next layer norms each token, so that tokens with a large stream must not count more."""
    square = target.square().mean(dim=-1, keepdim=True).clamp(min=LEAST_SQUARE)
    return ((output - target).square() / square).mean()
