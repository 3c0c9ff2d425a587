"""The shapes of a model, read from the manifest's config and checked: what is not supported is refused here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from engines.fields import Fields
from engines.manifest import Manifest, rope_section
from engines.protocol import EngineLoadError

WIDEST = 1 << 20
"""No width in a config reaches this, nor any product of widths 2**63 then: larger ones are damage."""
LARGEST_VOCAB = 1 << 24
MOST_LAYERS = 1024
MOST_EXPERTS = 1024

RopeKind = Literal["default", "linear", "llama3", "yarn", "divisors"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """How positions turn into angles. Only the fields of its kind are read."""

    kind: RopeKind
    dim: int
    """Rotated dimensions of a head."""
    theta: float
    factor: float = 1.0
    trained_positions: int = 0
    """yarn, llama3: ``original_max_position_embeddings``."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    """yarn: multiplies cosines and sines; None derives it."""
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    divisors: tuple[float, ...] = ()
    """divisors: one for each frequency, as GGUF files hold llama3's scaling."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The dense family: Llama, Qwen2 and Qwen3 differ in these values only."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    eps: float
    tied_head: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: RopeConfig


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Routed and shared experts of DeepSeek-V2 and V3."""

    experts: int
    experts_per_token: int
    intermediate: int
    shared_intermediate: int
    dense_layers: int
    """So many first layers have a plain MLP."""
    scoring: Literal["softmax", "sigmoid"]
    groups: int
    """Experts are chosen inside the best ``top_groups`` of these; 1 does not limit them."""
    top_groups: int
    correction_bias: bool
    """A learned bias takes part in the choice, not in the weights; groups then rank by the sum of their best two."""
    normalise: bool
    """Weights of the chosen experts sum to 1 before scaling."""
    scale: float


@dataclass(frozen=True, kw_only=True)
class DeepseekConfig:
    """Latent attention (MLA) and experts."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocab: int
    eps: float
    tied_head: bool
    attention_bias: bool
    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int
    """Width of a head's part that carries no position; ``rope.dim`` is the other part's."""
    value_dim: int
    rope: RopeConfig
    rope_interleaved: bool
    moe: MoeConfig
    mtp_layers: int
    """Layers after the last that predict further tokens; they are not loaded."""


ModelConfig = DecoderConfig | DeepseekConfig


def parse_config(manifest: Manifest) -> ModelConfig:
    """Raises EngineLoadError for a missing or wrong value, and for a feature in use that is not supported."""
    fields = Fields(manifest.config, manifest.source.name if manifest.format == "gguf" else "config.json")
    _refuse_unsupported(fields)
    if manifest.architecture in ("deepseek_v2", "deepseek_v3"):
        return _parse_deepseek(fields, v3=manifest.architecture == "deepseek_v3")
    return _parse_decoder(fields, manifest.architecture)


def _refuse_unsupported(fields: Fields) -> None:
    if fields.text("hidden_act", "silu") != "silu":
        raise fields.fail("hidden_act", "'silu', the only activation that is supported")
    rope = rope_section(fields)
    for place in (fields, rope):
        if place.number("partial_rotary_factor", 1.0) != 1.0:
            raise place.fail("partial_rotary_factor", "1; partial rotation is not supported")
    layer_types = fields.texts("layer_types")
    if any(kind != "full_attention" for kind in layer_types):
        raise EngineLoadError(f"{fields.name}: sliding-window attention is not supported; the model uses it")
    if layer_types or not fields.flag("use_sliding_window") or not fields.has("sliding_window"):
        return
    first = fields.values.get("max_window_layers", 0)
    if isinstance(first, int) and first >= fields.count("num_hidden_layers"):
        return
    raise EngineLoadError(f"{fields.name}: sliding-window attention (use_sliding_window) is not supported")


def _parse_decoder(fields: Fields, architecture: str) -> DecoderConfig:
    hidden, heads = fields.count("hidden_size", most=WIDEST), fields.count("num_attention_heads", most=WIDEST)
    kv_heads = fields.count("num_key_value_heads", heads, most=WIDEST)
    if heads % kv_heads:
        raise fields.fail("num_key_value_heads", f"a divisor of the {heads} attention heads")
    default_head = 128 if architecture == "qwen3" else hidden // heads
    head_dim = fields.count("head_dim", max(default_head, 1), most=WIDEST)
    bias = fields.flag("attention_bias")
    return DecoderConfig(
        layers=fields.count("num_hidden_layers", most=MOST_LAYERS),
        hidden=hidden,
        intermediate=fields.count("intermediate_size", most=WIDEST),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=fields.count("vocab_size", most=LARGEST_VOCAB),
        eps=fields.number("rms_norm_eps", 1e-6),
        tied_head=fields.flag("tie_word_embeddings"),
        qkv_bias=bias or architecture == "qwen2",
        output_bias=bias and architecture != "qwen2",
        mlp_bias=fields.flag("mlp_bias"),
        qk_norm=architecture == "qwen3",
        rope=_parse_rope(fields, head_dim),
    )


def _parse_deepseek(fields: Fields, v3: bool) -> DeepseekConfig:
    return DeepseekConfig(
        layers=fields.count("num_hidden_layers", most=MOST_LAYERS),
        hidden=fields.count("hidden_size", most=WIDEST),
        intermediate=fields.count("intermediate_size", most=WIDEST),
        heads=fields.count("num_attention_heads", most=WIDEST),
        vocab=fields.count("vocab_size", most=LARGEST_VOCAB),
        eps=fields.number("rms_norm_eps", 1e-6),
        tied_head=fields.flag("tie_word_embeddings"),
        attention_bias=fields.flag("attention_bias"),
        q_lora_rank=fields.optional_count("q_lora_rank", most=WIDEST),
        kv_lora_rank=fields.count("kv_lora_rank", most=WIDEST),
        nope_dim=fields.count("qk_nope_head_dim", most=WIDEST),
        value_dim=fields.count("v_head_dim", most=WIDEST),
        rope=_parse_rope(fields, fields.count("qk_rope_head_dim", most=WIDEST)),
        rope_interleaved=fields.flag("rope_interleave", default=True),
        moe=_parse_moe(fields, v3),
        mtp_layers=_whole_number(fields, "num_nextn_predict_layers") if v3 else 0,
    )


def _parse_moe(fields: Fields, v3: bool) -> MoeConfig:
    if fields.count("moe_layer_freq", 1) != 1:
        raise fields.fail("moe_layer_freq", "1; other patterns of expert layers are not supported")
    method = fields.text("topk_method", "noaux_tc" if v3 else "greedy")
    scoring = fields.text("scoring_func", "sigmoid" if v3 else "softmax")
    supported = (("noaux_tc", "sigmoid"),) if v3 else (("greedy", "softmax"), ("group_limited_greedy", "softmax"))
    if (method, scoring) not in supported:
        raise EngineLoadError(f"{fields.name}: routing {method[:40]!r} with {scoring[:40]!r} scores is not supported")
    experts, chosen = fields.count("n_routed_experts", most=MOST_EXPERTS), fields.count("num_experts_per_tok")
    limited = method != "greedy"
    groups = fields.count("n_group") if limited else 1
    top_groups = fields.count("topk_group") if limited else 1
    if experts % groups or top_groups > groups or chosen > experts // groups * top_groups:
        raise EngineLoadError(f"{fields.name}: n_group, topk_group, num_experts_per_tok and n_routed_experts disagree")
    if v3 and experts // groups < 2:
        raise fields.fail("n_group", "small enough for two experts in each group")
    intermediate = fields.count("moe_intermediate_size", most=WIDEST)
    return MoeConfig(
        experts=experts,
        experts_per_token=chosen,
        intermediate=intermediate,
        shared_intermediate=intermediate * fields.count("n_shared_experts", most=WIDEST),
        dense_layers=_whole_number(fields, "first_k_dense_replace"),
        scoring="sigmoid" if v3 else "softmax",
        groups=groups,
        top_groups=top_groups,
        correction_bias=v3,
        normalise=fields.flag("norm_topk_prob", default=v3),
        scale=fields.number("routed_scaling_factor", 1.0),
    )


def _whole_number(fields: Fields, key: str) -> int:
    value: Any = fields.values.get(key) or 0
    if type(value) is not int or value < 0:
        raise fields.fail(key, "a whole number from 0 up")
    return value


def _parse_rope(fields: Fields, dim: int) -> RopeConfig:
    rope = rope_section(fields)
    if dim % 2:
        raise EngineLoadError(f"{fields.name}: rotary positions need an even width, not {dim}")
    kinds: dict[str, RopeKind] = {name: name for name in ("default", "linear", "llama3", "yarn", "divisors")}
    name = rope.text("rope_type", rope.text("type", "default"))
    if name not in kinds:
        raise rope.fail("rope_type", f"one of {', '.join(kinds)}")
    kind = kinds[name]
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    if kind == "default":
        return RopeConfig(kind=kind, dim=dim, theta=theta)
    if kind == "divisors":
        return RopeConfig(kind=kind, dim=dim, theta=theta, divisors=_divisors(rope, dim // 2))
    positions = fields.count("max_position_embeddings")
    trained = rope.count("original_max_position_embeddings", positions)
    low, high = rope.number("low_freq_factor", 1.0), rope.number("high_freq_factor", 4.0)
    if low >= high or theta <= 1:
        raise EngineLoadError(f"{fields.name}: the rope settings contradict each other")
    return RopeConfig(
        kind=kind,
        dim=dim,
        theta=theta,
        factor=rope.number("factor", positions / trained if kind == "yarn" else None),
        trained_positions=trained,
        low_freq_factor=low,
        high_freq_factor=high,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", default=True),
        attention_factor=rope.number("attention_factor") if rope.has("attention_factor") else None,
        mscale=rope.number("mscale") if rope.values.get("mscale") else 0.0,
        mscale_all_dim=rope.number("mscale_all_dim") if rope.values.get("mscale_all_dim") else 0.0,
    )


def _divisors(rope: Fields, count: int) -> tuple[float, ...]:
    values = rope.values.get("divisors")
    if not isinstance(values, list) or len(values) != count or not all(isinstance(value, float) for value in values):
        raise rope.fail("divisors", f"{count} numbers, one for each frequency")
    return tuple(values)
