"""From a recipe and a model's layers to what is done to each layer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from compression.errors import CompressionError
from compression.quantize.base import Scheme
from compression.recipe import LayerRule, Method, Recipe, matching
from engines.kernels import Matrix
from engines.models import decoder, deepseek
from engines.models.config import DeepseekConfig, ModelConfig
from engines.models.layers import ModelBuilder
from engines.models.rope import cos_sin_table
from engines.models.weights import Placement, ShapeSource
from engines.quant.base import LinearPart, QuantMethod, Split, WeightSource
from engines.quant.dense import DenseMethod

GROUP_SIZES = (128, 64, 32, 16, 8)
"""What a group size falls back to: the sizes that kernels know, then smaller ones."""


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """One linear layer of the checkpoint."""

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What becomes of one linear layer."""

    scheme: Scheme
    method: Method


@dataclass(slots=True)
class Plan:
    """Layers that it does not name stay as they are."""

    layers: dict[str, LayerPlan]
    notes: list[str] = field(default_factory=list)
    """For the card: what was done otherwise than the recipe says, and why."""


class _Recorder:
    """A QuantMethod that writes down which layers there are."""

    def __init__(self, layers: list[LinearLayer]) -> None:
        self._layers = layers

    def tensor_names(self, part: LinearPart) -> tuple[str, ...]:
        return DenseMethod().tensor_names(part)

    def create_weights(self, part: LinearPart, in_features: int, split: Split, source: WeightSource) -> Matrix:
        self._layers.append(LinearLayer(part.name, part.out_features, in_features))
        return DenseMethod().create_weights(part, in_features, split, source)


def linear_layers(config: ModelConfig) -> list[LinearLayer]:
    """All linear layers between embedding and head, in the order in which the model has them."""
    layers: list[LinearLayer] = []
    recorder: QuantMethod = _Recorder(layers)
    source = ShapeSource(Placement(device=torch.device("meta"), dtype=torch.bfloat16))
    builder = ModelBuilder(source, lambda name: recorder)
    cos_sin = cos_sin_table(config.rope, 1, source.device)
    for index in range(config.layers):
        if isinstance(config, DeepseekConfig):
            deepseek.build_layer(config, builder, cos_sin, index)
        else:
            decoder.build_layer(config, builder, cos_sin, index)
    return layers


def make_plan(recipe: Recipe, layers: list[LinearLayer], outer: list[LinearLayer], scale_dtype: torch.dtype) -> Plan:
    """``outer``: embedding and head, which only a pattern that is their name matches.

    Raises CompressionError for a pattern that matches nothing.
    """
    plan, by_name = Plan({}), {layer.name: layer for layer in (*layers, *outer)}
    decided: set[str] = set()
    for rule in recipe.layers:
        by_pattern = [pattern for pattern in rule.match if pattern not in by_name]
        matched = matching(by_pattern, [layer.name for layer in layers]) | (by_name.keys() & rule.match)
        for name in [name for name in by_name if name in matched - decided]:
            layer_plan = plan_layer(rule, by_name[name], scale_dtype, plan.notes)
            if layer_plan is not None:
                plan.layers[name] = layer_plan
        decided |= matched
    if not plan.layers:
        raise CompressionError(f"the recipe {recipe.name} leaves every layer as it is")
    plan.notes = _summed_up(plan.notes)
    return plan


def plan_layer(rule: LayerRule, layer: LinearLayer, scale_dtype: torch.dtype, notes: list[str]) -> LayerPlan | None:
    """One rule on one layer; None where it stays as it is. What does not fit is changed and written into ``notes``."""
    if rule.kind == "none":
        return None
    scheme = Scheme(
        kind=rule.kind,
        bits=rule.bits,
        group_size=rule.group_size,
        symmetric=rule.symmetric,
        block=rule.block,
        activations=rule.activations,
        static_input=rule.static_input,
        scale_dtype=scale_dtype,
    )
    wanted, width = rule.group_size, layer.in_features
    if wanted is None or width % wanted == 0:
        return LayerPlan(scheme, rule.method)
    fitting = next((size for size in GROUP_SIZES if size < wanted and width % size == 0), None)
    kind = layer.name.rpartition(".")[2]
    if fitting is None:
        notes.append(f"{kind} stays in 16 bits: no group size up to {wanted} divides its width of {width}")
        return None
    notes.append(f"{kind} has groups of {fitting}: {wanted} does not divide its width of {width}")
    return LayerPlan(replace(scheme, group_size=fitting), rule.method)


def _summed_up(notes: list[str]) -> list[str]:
    """Each note once, with how many layers it is about."""
    return [f"{note} ({notes.count(note)} layers)" for note in dict.fromkeys(notes)]


def is_expert(name: str) -> bool:
    """Whether a layer belongs to one routed expert."""
    return ".mlp.experts." in name


def layer_index(name: str) -> int:
    """Of the decoder layer that a tensor or linear layer belongs to."""
    return int(name.split(".")[2])


def has_experts(config: ModelConfig, index: int) -> bool:
    """Whether decoder layer ``index`` routes tokens to experts."""
    return isinstance(config, DeepseekConfig) and index >= config.moe.dense_layers
