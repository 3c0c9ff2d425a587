"""Tunes the scales of all layers together, until the model predicts what the full model does.

The second phase of EfficientQAT (Chen et al. 2024, arXiv 2407.11062), which tunes scales end to end, with the loss of
LLM-QAT (Liu et al. 2023, arXiv 2305.17888): the divergence from the full model's next-token distributions. Codes and
zero points stay. On the way back each layer is computed anew from its input (Chen et al. 2016, arXiv 1604.06174), so
that memory holds the codes of all layers, a byte each, four numbers a scale, the input of each layer for the windows
of one step, and the activations of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compression.base_model import FINAL_NORM, BaseModel
from compression.calibrated_layer import LayerWeights
from compression.compensation.tuned_layer import TunedLayer
from compression.compensation.tuning import draws, falling, split_windows
from compression.hidden_states import HiddenStates
from compression.plan import LayerPlan, layer_index, linear_layers
from compression.recipe import Distillation
from engines.kernels import QuantizedMatrix
from engines.kernels.reference import rms_norm

POSITIONS = 256
"""Whose logits are in memory at once."""
STEP_COST = 4
"""A step on a window costs so many forward passes: there, there again with a graph, and twice as much back."""
AVERAGES = ("exp_avg", "exp_avg_sq")
"""Of Adam."""
KEPT_EVERY = 8
"""Steps after which a killed run goes on."""


@dataclass(frozen=True, slots=True)
class Divergences:
    """Nats a token from the full model, on windows that were not tuned on, where there are enough."""

    before: float
    after: float

    @property
    def won(self) -> bool:
        return self.after < self.before

    def note(self) -> str:
        """For the card."""
        kept = "" if self.won else "; it won nothing and was dropped"
        return f"distillation: divergence {self.before:.4g} before, {self.after:.4g} after{kept}"


class Distiller:
    """Tunes one model that is compressed already."""

    def __init__(
        self,
        full: BaseModel,
        compressed: BaseModel,
        plan: dict[str, LayerPlan],
        settings: Distillation,
        tokens: torch.Tensor,
        target: HiddenStates,
        cos_sin: torch.Tensor,
        tick: Callable[[float], None] = lambda amount: None,
    ) -> None:
        """``tokens`` (windows, T); ``target`` is the full model's residual stream after its last layer. ``tick`` is
        told of work done, in passes of one window through the whole model."""
        self._settings, self._tokens, self._target, self._tick = settings, tokens, target, tick
        self._device = full.device
        # As ``outer_layers`` has it: the last one is the head, tied or not.
        self._full = _Head(full)
        self._own = _Head(compressed)
        self._embedding = compressed.linear(compressed.outer_layers()[0])
        self._layers = [
            TunedLayer(compressed.config, index, weights, "scales", plan, cos_sin)
            for index, weights in enumerate(_all_weights(compressed))
        ]
        self.gains = [gain for layer in self._layers for gain in layer.gains]

    def run(self, state: Path) -> Divergences:
        """``state``: a file in which the run is kept, and from which it goes on."""
        tuned_on, held_out = split_windows(self._tokens.shape[0])
        settings, per_step = self._settings, min(self._settings.windows_per_step, len(tuned_on))
        optimizer = torch.optim.Adam(self.gains, lr=settings.learning_rate)
        done, before = _resume(state, optimizer, self.gains)
        if before is None:
            before = self._divergence(held_out)
        for step, chosen in enumerate(draws(tuned_on, per_step, settings.steps, seed=0)):
            if step < done:
                continue
            optimizer.param_groups[0]["lr"] = settings.learning_rate * falling(step, settings.steps)
            optimizer.zero_grad()
            self._gradients(chosen)
            optimizer.step()
            self._tick(STEP_COST * per_step)
            if (step + 1) % KEPT_EVERY == 0 or step + 1 == settings.steps:
                _keep(state, optimizer, self.gains, step + 1, before)
        return Divergences(before, self._divergence(held_out))

    def scales(self) -> dict[str, torch.Tensor]:
        """By the linear layer's name, as they are now."""
        return {name: _scale(matrix) for layer in self._layers for name, matrix in layer.finished().items()}

    def _divergence(self, windows: Sequence[int]) -> float:
        total = 0.0
        with torch.no_grad():
            for window in windows:
                hidden = self._streams([window])[-1]
                total += self._loss(hidden, [window])
                self._tick(1)
        return total / len(windows)

    def _streams(self, windows: Sequence[int]) -> list[torch.Tensor]:
        """(windows, T, hidden) before each layer, and after the last."""
        streams = [self._embedding[self._tokens[list(windows)].to(self._device)]]
        for layer in self._layers:
            streams.append(layer.layer(streams[-1]))
        return streams

    def _gradients(self, windows: Sequence[int]) -> None:
        with torch.no_grad():
            streams = self._streams(windows)
        last = streams.pop().requires_grad_()
        self._loss(last, windows)
        gradient = last.grad
        for layer in reversed(self._layers):
            before = streams.pop().requires_grad_()
            with torch.enable_grad():
                layer.layer(before).backward(gradient)  # type: ignore[no-untyped-call]
            gradient = before.grad

    def _loss(self, hidden: torch.Tensor, windows: Sequence[int]) -> float:
        """Mean divergence from the full model; its gradient goes to ``hidden`` where that wants one."""
        target = torch.stack([self._target.read(window, self._device) for window in windows])
        count, total = target.shape[0] * target.shape[1], 0.0
        with torch.set_grad_enabled(hidden.requires_grad):
            for start in range(0, count, POSITIONS):
                own, full = (states.flatten(0, 1)[start : start + POSITIONS] for states in (hidden, target))
                with torch.no_grad():
                    wanted = self._full.logprobs(full)
                loss = (wanted.exp() * (wanted - self._own.logprobs(own))).sum() / count
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
        return total


class _Head:
    """What stands behind the last layer."""

    def __init__(self, model: BaseModel) -> None:
        self._norm, self._eps = model.tensor(FINAL_NORM), model.config.eps
        self._weight = model.linear(model.outer_layers()[-1])

    def logprobs(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, hidden) -> (n, vocab)."""
        return (rms_norm(hidden, self._norm, self._eps) @ self._weight.t()).log_softmax(-1)


def _all_weights(model: BaseModel) -> list[LayerWeights]:
    layers, found = linear_layers(model.config), []
    for index in range(model.config.layers):
        own = [layer for layer in layers if layer_index(layer.name) == index]
        weights = LayerWeights(model.other_tensors(index, own))
        for layer in own:
            matrix = model.matrix(layer)
            if isinstance(matrix, torch.Tensor):
                weights.tensors[f"{layer.name}.weight"] = matrix
            else:
                weights.quantized[layer.name] = matrix
        found.append(weights)
    return found


def distilling_passes(settings: Distillation, windows: int) -> float:
    """Passes of a window through the model that distillation costs, with so many calibration windows."""
    tuned_on, held_out = split_windows(windows)
    return STEP_COST * settings.steps * min(settings.windows_per_step, len(tuned_on)) + 2 * len(held_out)


def write_scales(files: Sequence[Path], scales: Mapping[str, torch.Tensor]) -> None:
    """Put the scales of these linear layers in place of those that the files have."""
    for path in files:
        tensors, metadata = {}, None
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            for name in file.keys():  # noqa: SIM118  (no dict)
                tensor, layer = file.get_tensor(name), name.removesuffix(".weight_scale")
                changed = scales[layer].view(tensor.shape).to(tensor.dtype).cpu() if layer in scales else tensor
                tensors[name] = changed.contiguous()
        mode = path.stat().st_mode
        save_file(tensors, path, metadata=metadata)
        path.chmod(mode)


def _keep(state: Path, optimizer: torch.optim.Adam, gains: list[torch.Tensor], steps: int, before: float) -> None:
    tensors = {"facts": torch.tensor([steps, before], dtype=torch.float64)}
    for place, gain in enumerate(gains):
        tensors[f"{place}.gain"] = gain.detach()
        # An expert that no token went to has none.
        averages = optimizer.state.get(gain, {})
        tensors |= {f"{place}.{name}": averages[name] for name in AVERAGES if name in averages}
    partial = state.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(state)


def _resume(state: Path, optimizer: torch.optim.Adam, gains: list[torch.Tensor]) -> tuple[int, float | None]:
    """Steps that were done before, and the divergence before the first."""
    if not state.exists():
        return 0, None
    with safe_open(state, framework="pt", device=str(gains[0].device)) as file:
        steps, before = file.get_tensor("facts").tolist()
        for place, gain in enumerate(gains):
            with torch.no_grad():
                gain.copy_(file.get_tensor(f"{place}.gain"))
            if f"{place}.{AVERAGES[0]}" in file.keys():  # noqa: SIM118  (no dict)
                averages = {name: file.get_tensor(f"{place}.{name}") for name in AVERAGES}
                optimizer.state[gain] = {"step": torch.tensor(float(steps)), **averages}
    return int(steps), float(before)


def _scale(matrix: QuantizedMatrix) -> torch.Tensor:
    assert matrix.scale is not None
    return matrix.scale
