"""Layer by layer: watch a layer's inputs, quantize it, and give the next layer what the quantized one computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from compression.calibrated_layer import CalibratedLayer, LayerWeights, build_calibrated
from compression.folds import Fold, apply_fold, attention_folds, feed_forward_folds
from compression.hidden_states import HiddenStates
from compression.plan import LayerPlan, Plan, is_expert
from compression.quantize.base import LayerInputs, Quantizer
from compression.quantize.methods import make_quantizer
from compression.recipe import Recipe, matching
from compression.scaling import SAMPLES, find_scale
from engines.kernels import Stream, rms_norm
from engines.models.batch import Batch, LayerCache
from engines.models.config import DeepseekConfig, ModelConfig
from engines.models.deepseek import LATENT_EPS

STARVED_TOKENS = 64
"""An expert that saw fewer is rounded by its weights alone."""
BLOCK_SIZE = 16
"""Tokens in a block of the paged cache."""

Part = Literal["attention", "feed_forward"]


@dataclass(frozen=True, slots=True)
class Window:
    """One calibration window as the engine's layers take it."""

    batch: Batch
    cache: LayerCache


def make_window(tokens: torch.Tensor, config: ModelConfig, device: torch.device) -> Window:
    """(T,) token ids -> a batch of one row, with a cache for one layer."""
    blocks = -(-tokens.shape[0] // BLOCK_SIZE)
    shapes: tuple[tuple[int, ...], ...]
    if isinstance(config, DeepseekConfig):
        shapes = ((config.kv_lora_rank + config.rope.dim,),)
    else:
        shapes = ((config.kv_heads, config.head_dim),) * 2
    batch = Batch.of_prompt(tokens.to(device), blocks)
    return Window(batch, tuple(torch.zeros(blocks, BLOCK_SIZE, *shape, device=device) for shape in shapes))


class LayerQuantizer:
    """Quantizes the weights of one decoder layer after another, each fed with what the ones before it compute."""

    def __init__(
        self,
        config: ModelConfig,
        recipe: Recipe,
        plan: Plan,
        cos_sin: torch.Tensor,
        device: torch.device,
        hessian_bytes: int,
        tick: Callable[[float], None] = lambda amount: None,
    ) -> None:
        """``hessian_bytes``: what the Hessians of one pass over the windows may take together; more passes are made
        where they are larger, and one Hessian is always held. ``tick`` is told of each pass of a window through half
        a layer."""
        self._config = config
        self._recipe = recipe
        self._plan = plan.layers
        self._cos_sin = cos_sin
        self._device = device
        self._hessian_bytes = hessian_bytes
        self._tick = tick
        self._corrects = recipe.compensation is not None and recipe.compensation.bias != "none"
        """Biases take off the mean error of their layer (Nagel et al. 2019, arXiv 1906.04721)."""
        self._scalable: set[str] = set()
        if recipe.scaling is not None:
            self._scalable = matching(recipe.scaling.match, plan.layers)

    def quantize(
        self, index: int, weights: LayerWeights, windows: list[Window], stream: HiddenStates, following: HiddenStates
    ) -> list[str]:
        """Quantize decoder layer ``index`` in place, and run the windows through it from ``stream`` to ``following``.

        Returns notes for the card. Raises ValueError, naming the layer, for NaN in weights or inputs.
        """
        notes: list[str] = []
        parts: tuple[tuple[Part, list[Fold]], ...] = (
            ("attention", attention_folds(self._config, index)),
            ("feed_forward", feed_forward_folds(self._config, index)),
        )
        for part, folds in parts:
            notes += self._quantize_part(index, weights, part, folds, windows, stream)
            layer = build_calibrated(self._config, index, weights, self._cos_sin, self._device)
            self._pass(layer, part, windows, stream, following)
            stream = following
        return notes

    def run(
        self,
        index: int,
        weights: LayerWeights,
        windows: list[Window],
        stream: HiddenStates,
        following: HiddenStates,
        config: ModelConfig | None = None,
    ) -> None:
        """Run the windows through decoder layer ``index`` as its weights are, from ``stream`` to ``following``.

        ``config``: the layer's, where it is another one than before it was compressed.
        """
        layer = build_calibrated(config or self._config, index, weights, self._cos_sin, self._device)
        self._pass(layer, "attention", windows, stream, following)
        self._pass(layer, "feed_forward", windows, following, following)

    def without_calibration(self, weights: LayerWeights) -> None:
        """Quantize every layer of ``weights`` that the plan names, by its weights alone."""
        for name in [tensor.removesuffix(".weight") for tensor in weights.tensors]:
            if (layer_plan := self._plan.get(name)) is not None:
                method = "rtn" if layer_plan.method == "gptq" else layer_plan.method
                self._replace(weights, name, make_quantizer(method), None, layer_plan)

    def _quantize_part(
        self,
        index: int,
        weights: LayerWeights,
        part: Part,
        folds: list[Fold],
        windows: list[Window],
        stream: HiddenStates,
    ) -> list[str]:
        readers = [name for fold in folds for name in fold.readers]
        planned = {name: self._plan[name] for name in readers if name in self._plan}
        if not planned:
            return []
        layer = build_calibrated(self._config, index, weights, self._cos_sin, self._device)
        groups = self._sharing(layer, planned)
        scaled = [fold for fold in folds if any(name in self._scalable for name in fold.readers)]
        stages = self._stages(groups, planned)
        if scaled and len(stages) > 1:
            self._observe(layer, weights, part, groups, planned, windows, stream, hessians=False, samples=SAMPLES)
            self._scale(scaled, weights)
            layer = build_calibrated(self._config, index, weights, self._cos_sin, self._device)
        notes: list[str] = []
        for stage in stages:
            samples = SAMPLES if scaled and len(stages) == 1 else 0
            self._observe(layer, weights, part, stage, planned, windows, stream, hessians=True, samples=samples)
            if samples:
                self._scale(scaled, weights)
            for names, _ in stage:
                notes += self._quantize_group([name for name in names if name in planned], weights)
        weights.observers.clear()
        return notes

    def _sharing(self, layer: CalibratedLayer, planned: dict[str, LayerPlan]) -> list[tuple[tuple[str, ...], int]]:
        """Groups of layers with one input of which some are to be quantized. kv_b_proj is no layer of its own to the
        engine, so it is added here."""
        groups = [group for group in layer.sharing if any(name in planned for name in group[0])]
        latent_up = [name for name in planned if name.endswith(".kv_b_proj")]
        if latent_up and isinstance(self._config, DeepseekConfig):
            groups.append((tuple(latent_up), self._config.kv_lora_rank))
        return groups

    def _stages(
        self, groups: list[tuple[tuple[str, ...], int]], planned: dict[str, LayerPlan]
    ) -> list[list[tuple[tuple[str, ...], int]]]:
        """The groups, cut into as many passes as the Hessians' memory asks for."""
        stages: list[list[tuple[tuple[str, ...], int]]] = [[]]
        room = self._hessian_bytes
        for names, width in groups:
            size = 4 * width**2 if _needs_hessian(names, planned) else 0
            if size > room and stages[-1]:
                stages.append([])
                room = self._hessian_bytes
            room -= size
            stages[-1].append((names, width))
        return stages

    def _observe(
        self,
        layer: CalibratedLayer,
        weights: LayerWeights,
        part: Part,
        groups: list[tuple[tuple[str, ...], int]],
        planned: dict[str, LayerPlan],
        windows: list[Window],
        stream: HiddenStates,
        hessians: bool,
        samples: int,
    ) -> None:
        """One pass over the windows that fills ``weights.observers``."""
        weights.observers.clear()
        for names, width in groups:
            inputs = LayerInputs(width, hessians and _needs_hessian(names, planned), samples)
            weights.observers.update(dict.fromkeys(names, inputs))
        self._tap_latents(weights)
        self._pass(layer, part, windows, stream, None)
        weights.taps.clear()

    def _tap_latents(self, weights: LayerWeights) -> None:
        """kv_b_proj reads the normed latents, which kv_a_proj_with_mqa puts out first."""
        if not isinstance(self._config, DeepseekConfig):
            return
        rank = self._config.kv_lora_rank
        for name, inputs in weights.observers.items():
            if not name.endswith(".kv_b_proj"):
                continue
            attention = name.removesuffix(".kv_b_proj")
            gain = weights.tensors[f"{attention}.kv_a_layernorm.weight"]

            def tap(latents: torch.Tensor, inputs: LayerInputs = inputs, gain: torch.Tensor = gain) -> None:
                inputs.observe(rms_norm(latents[:, :rank].contiguous(), gain, LATENT_EPS))

            weights.taps[f"{attention}.kv_a_proj_with_mqa"] = tap

    def _pass(
        self,
        layer: CalibratedLayer,
        part: Part,
        windows: list[Window],
        stream: HiddenStates,
        following: HiddenStates | None,
    ) -> None:
        model_layer = layer.layer
        for place, window in enumerate(windows):
            states = Stream(stream.read(place, self._device))
            if part == "attention":
                states = model_layer.attention(states, model_layer.attention_norm, window.batch, window.cache)
            else:
                states = model_layer.feed_forward(states, model_layer.feed_forward_norm, window.batch)
            if following is not None:
                following.write(place, states.hidden)
            self._tick(1)

    def _scale(self, folds: list[Fold], weights: LayerWeights) -> None:
        assert self._recipe.scaling is not None
        for fold in folds:
            planned = {name: self._plan[name] for name in fold.readers if name in self._scalable}
            scale = find_scale(fold, weights, planned, self._recipe.scaling.rule)
            if scale is not None:
                apply_fold(fold, weights, scale)

    def _quantize_group(self, names: list[str], weights: LayerWeights) -> list[str]:
        """Quantize layers that share their input, and give up what was seen of it. Returns notes."""
        notes = []
        inputs = weights.observers[names[0]]
        for name in names:
            plan = layer_plan = self._plan[name]
            seen: LayerInputs | None = inputs
            if is_expert(name) and inputs.tokens < STARVED_TOKENS:
                layer_plan = LayerPlan(plan.scheme, "rtn" if plan.method == "gptq" else plan.method)
                seen = _loudest(name, weights) if plan.scheme.static_input else None
                notes.append(f"{name} saw {inputs.tokens} tokens in calibration and was rounded by its weights alone")
            self._replace(weights, name, make_quantizer(layer_plan.method), seen, layer_plan)
        inputs.release()
        return notes

    def _replace(
        self, weights: LayerWeights, name: str, quantizer: Quantizer, inputs: LayerInputs | None, plan: LayerPlan
    ) -> None:
        exact = weights.tensors[f"{name}.weight"]
        try:
            weights.replace(name, quantizer.quantize(exact, inputs, plan.scheme))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        bias = weights.tensors.get(f"{name}.bias")
        if self._corrects and bias is not None and inputs is not None and inputs.tokens:
            bias += (exact - weights.tensors[f"{name}.weight"]) @ inputs.mean


def _loudest(name: str, weights: LayerWeights) -> LayerInputs | None:
    """Of the routed experts' layers of this kind, the one with the largest input: its static scale fits the others."""
    kind = name.rpartition(".")[2]
    others = [
        inputs
        for other, inputs in weights.observers.items()
        if is_expert(other) and other.endswith(f".{kind}") and inputs.tokens
    ]
    return max(others, key=lambda inputs: 0.0 if inputs.absmax is None else float(inputs.absmax.amax()), default=None)


def _needs_hessian(names: tuple[str, ...], planned: dict[str, LayerPlan]) -> bool:
    return any(make_quantizer(planned[name].method).needs_hessian for name in names if name in planned)
