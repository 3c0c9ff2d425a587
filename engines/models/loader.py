"""From a manifest to a model on a device: every parameter filled and every tensor used, or an error that names it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import torch

from engines.manifest import Manifest
from engines.models import decoder, deepseek
from engines.models.config import DeepseekConfig, ModelConfig, parse_config
from engines.models.gguf_reader import GgufReader
from engines.models.kv_scales import stored_scales
from engines.models.layers import ModelBuilder
from engines.models.memory import require_memory
from engines.models.model import Model
from engines.models.rope import cos_sin_table, table_bytes
from engines.models.safetensors_reader import SafetensorsReader
from engines.models.weights import CountingSource, FileSource, Placement, RandomSource, ShapeSource, TensorReader
from engines.protocol import EngineLoadError, EngineSpec, LoadProgress, ReportProgress
from engines.quant.methods import Methods, methods_of, unquantized
from engines.quantization import EMBEDDING_LAYER, HEAD_LAYER

__all__ = ["Model", "load_model", "open_weights"]

HEAD = f"{HEAD_LAYER}.weight"


def load_model(
    manifest: Manifest,
    spec: EngineSpec,
    device: torch.device,
    dtype: torch.dtype,
    report: ReportProgress,
    rank: int = 0,
    world: int = 1,
) -> Model:
    """Load the weights, or this rank's part of them: heads, MLP widths and experts are shared out.

    With ``spec.random_weights`` no file is read. Raises EngineLoadError for a config that is not supported, weights
    that do not fit it, and a model larger than the memory, which is refused before anything is allocated.
    """
    config = parse_config(manifest)
    placement = Placement(device=device, dtype=dtype, rank=rank, world=world)
    positions = min(manifest.max_context, spec.max_model_len or manifest.max_context)
    keeps = keeps_blocks(manifest, spec)
    counter, methods = CountingSource(placement), methods_of(manifest.quantization if keeps else None)
    needed = build_model(config, counter, positions, methods=methods).weight_bytes
    require_memory(spec.name, needed, dtype, device, spec.memory_limit)
    if spec.random_weights is not None:
        random = RandomSource(placement, spec.random_weights)
        return build_model(config, random, positions, spec.uniform_routing, methods)
    if spec.uniform_routing:
        raise EngineLoadError(f"{spec.name}: uniform routing is for measurements with random weights only")
    source = FileSource(placement, _open(manifest, keeps), report, counter.taken_bytes)
    model = build_model(config, source, positions, methods=methods)
    if config.tied_head and HEAD in source.reader.shapes:
        _check_tied(source, model)
    kv_heads = None if isinstance(config, DeepseekConfig) else config.kv_heads
    model = dataclasses.replace(model, kv_scales=stored_scales(source, model.kv_layout, kv_heads))
    source.finish(_ignorable(config))
    report(LoadProgress(phase="read", done=counter.taken_bytes, total=counter.taken_bytes))
    return model


def keeps_blocks(manifest: Manifest, spec: EngineSpec) -> bool:
    """Whether quantized weights stay so. Those of a ``.gguf`` file are dequantized unless the spec says otherwise."""
    return manifest.format != "gguf" or spec.keep_quantized


def open_weights(manifest: Manifest) -> tuple[TensorReader, Methods]:
    """The model's files, and how a layer's weight is made of their tensors. Raises EngineLoadError."""
    return _open(manifest, keep_blocks=True), methods_of(manifest.quantization)


def _open(manifest: Manifest, keep_blocks: bool) -> TensorReader:
    if manifest.format == "gguf":
        return GgufReader(manifest.files[0], manifest.config["head_dim"], keep_blocks)
    return SafetensorsReader(manifest.files)


def build_model(
    config: ModelConfig,
    source: ShapeSource | RandomSource | FileSource,
    positions: int,
    uniform_routing: bool = False,
    methods: Methods = unquantized,
) -> Model:
    """Make the model of one weight source; ``positions`` is the longest sequence in tokens.

    With ``uniform_routing`` experts, if there are any, are drawn at random.
    """
    builder = ModelBuilder(source, methods)
    embedding = builder.embedding(EMBEDDING_LAYER, config.vocab, config.hidden, source.placement.dtype)
    # Its codes are kept one byte each, so that rows can be taken.
    widened = embedding.nbytes - source.taken_bytes
    cos_sin = cos_sin_table(config.rope, 1 if builder.counting else positions, source.device)
    if isinstance(config, DeepseekConfig):
        layers = deepseek.build_layers(config, builder, cos_sin, uniform_routing)
        layout = deepseek.kv_layout(config)
    else:
        layers, layout = decoder.build_layers(config, builder, cos_sin), decoder.kv_layout(config, builder)
    if config.tied_head:
        head = builder.head(embedding)
    else:
        head = builder.linear({HEAD_LAYER: config.vocab}, config.hidden, "none")
    # On the CPU a tied head is a second, packed copy.
    copied = embedding.nbytes if config.tied_head and source.placement.device.type == "cpu" else 0
    return Model(
        embedding=embedding,
        layers=layers,
        final_norm=builder.norm("model.norm.weight", config.hidden, config.eps),
        head=head,
        kv_layout=layout,
        vocab_size=config.vocab,
        max_context=positions,
        weight_bytes=source.taken_bytes + widened + copied + table_bytes(config.rope, positions),
    )


def _check_tied(source: FileSource, model: Model) -> None:
    """Some checkpoints store the tied head a second time; it must then be the same."""
    table = model.embedding.table
    head = source.take(HEAD, model.embedding.shape, "none")
    if not isinstance(table, torch.Tensor) or not torch.equal(head, table):
        raise EngineLoadError(
            f"tensor {HEAD} differs from {EMBEDDING_LAYER}.weight, but the config ties them; "
            "set tie_word_embeddings to false"
        )


def _ignorable(config: ModelConfig) -> Callable[[str], bool]:
    """Tensors that a file may hold without being used: old checkpoints store rope frequencies, which follow from the
    config, and DeepSeek-V3 appends layers for multi-token prediction (MTP), which plain decoding never runs."""
    patterns = [r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"]
    if isinstance(config, DeepseekConfig):
        extra = range(config.layers, config.layers + config.mtp_layers)
        patterns += [rf"model\.layers\.{index}\..+" for index in extra]
    compiled = re.compile("|".join(patterns))
    return lambda name: compiled.fullmatch(name) is not None
