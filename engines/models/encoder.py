"""Encoders of the BERT family (Devlin et al. 2018, arXiv 1810.04805), post-norm, absolute positions.

A ``torch.nn.Module``, unlike the decoders, because ``torch.export`` takes one; it is only run, never trained.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from engines.encoder_folder import Activation, EncoderConfig, EncoderFolder, Pooling
from engines.models.safetensors_reader import SafetensorsReader
from engines.models.weights import FileSource, Placement, RandomSource
from engines.protocol import EngineLoadError, LoadProgress, ReportProgress

Source = FileSource | RandomSource
PREFIXES = ("", "bert.", "roberta.")
UNUSED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")
"""Of a model without a head: buffers of old checkpoints, and a pooler that sentence embeddings do not use."""


class Encoder(nn.Module):
    """Token ids to one embedding a text, or to the head's logits where the model has one."""

    def __init__(self, config: EncoderConfig, source: Source, prefix: str, pooling: Pooling, normalise: bool) -> None:
        super().__init__()
        self.config = config
        self.pooling = pooling
        self.normalise = normalise
        self.dtype = source.placement.dtype
        names = _Names(source, prefix)
        hidden = config.hidden
        rows = config.positions + config.position_offset
        self.tokens = names.parameter("embeddings.word_embeddings.weight", config.vocab, hidden)
        self.positions = names.parameter("embeddings.position_embeddings.weight", rows, hidden)
        self.types = names.parameter("embeddings.token_type_embeddings.weight", config.token_types, hidden)
        self.norm = names.norm("embeddings.LayerNorm", config)
        self.layers = nn.ModuleList(_Layer(config, names, f"encoder.layer.{at}") for at in range(config.layers))
        self.pooler = names.linear("pooler.dense", hidden, hidden) if config.labels else None
        self.classifier = _Names(source, "").linear("classifier", hidden, config.labels) if config.labels else None

    @property
    def output_name(self) -> str:
        return "logits" if self.config.labels else "sentence_embedding"

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        """All int64 [texts, tokens], padded on the right; mask 1 marks a token. float32 [texts, hidden or labels]."""
        hidden = self.hidden_states(input_ids, attention_mask, token_type_ids)
        if self.pooler is not None and self.classifier is not None:
            return self.classifier(torch.tanh(self.pooler(hidden[:, 0]))).float()  # type: ignore[no-any-return]
        return pool(hidden, attention_mask, self.pooling, self.normalise)

    def hidden_states(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        """After the last layer, [texts, tokens, hidden] in the model's dtype. Padding's own rows are arbitrary."""
        offset = self.config.position_offset
        positions = self.positions[offset : offset + input_ids.shape[1]]
        embedded = functional.embedding(input_ids, self.tokens) + functional.embedding(token_type_ids, self.types)
        hidden = self.norm(embedded + positions)
        # The lowest number, not minus infinity: a row of padding alone stays finite.
        lowest = torch.finfo(self.dtype).min
        bias = (1 - attention_mask[:, None, None, :]).to(self.dtype) * lowest
        for layer in self.layers:
            hidden = layer(hidden, bias)
        return hidden  # type: ignore[no-any-return]


class _Layer(nn.Module):
    """Attention and a feed-forward part, each followed by the residual sum and its norm."""

    def __init__(self, config: EncoderConfig, names: _Names, at: str) -> None:
        super().__init__()
        hidden = config.hidden
        self.heads = config.heads
        self.activation: Activation = config.activation
        self.query = names.linear(f"{at}.attention.self.query", hidden, hidden)
        self.key = names.linear(f"{at}.attention.self.key", hidden, hidden)
        self.value = names.linear(f"{at}.attention.self.value", hidden, hidden)
        self.output = names.linear(f"{at}.attention.output.dense", hidden, hidden)
        self.attention_norm = names.norm(f"{at}.attention.output.LayerNorm", config)
        self.up = names.linear(f"{at}.intermediate.dense", hidden, config.intermediate)
        self.down = names.linear(f"{at}.output.dense", config.intermediate, hidden)
        self.norm = names.norm(f"{at}.output.LayerNorm", config)

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        texts, tokens, width = hidden.shape
        split = (texts, tokens, self.heads, width // self.heads)
        query, key, value = (part(hidden).view(split).transpose(1, 2) for part in (self.query, self.key, self.value))
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        mixed = mixed.transpose(1, 2).reshape(texts, tokens, width)
        hidden = self.attention_norm(self.output(mixed) + hidden)
        return self.norm(self.down(_activate(self.up(hidden), self.activation)) + hidden)  # type: ignore[no-any-return]


def _activate(values: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation == "relu":
        return functional.relu(values)
    return functional.gelu(values, approximate="none" if activation == "gelu" else "tanh")


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: Pooling, normalise: bool) -> torch.Tensor:
    """[texts, tokens, hidden] to float32 [texts, hidden]; a text without a token gives zeros, or its minimum."""
    hidden = hidden.float()
    weights = mask[:, :, None].to(hidden.dtype)
    if pooling == "cls":
        pooled = hidden[:, 0]
    elif pooling == "max":
        pooled = (hidden + (1 - weights) * torch.finfo(hidden.dtype).min).amax(1)
    else:
        pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    return functional.normalize(pooled, dim=-1) if normalise else pooled


class _Names:
    """Takes a checkpoint's tensors by their names there."""

    def __init__(self, source: Source, prefix: str) -> None:
        self._source = source
        self._prefix = prefix

    def parameter(self, name: str, *shape: int) -> nn.Parameter:
        return nn.Parameter(self._source.take(self._prefix + name, shape, "none"), requires_grad=False)

    def linear(self, name: str, inputs: int, outputs: int) -> nn.Linear:
        layer = nn.Linear(inputs, outputs, device="meta")
        layer.weight = self.parameter(f"{name}.weight", outputs, inputs)
        layer.bias = self.parameter(f"{name}.bias", outputs)
        return layer

    def norm(self, name: str, config: EncoderConfig) -> nn.LayerNorm:
        layer = nn.LayerNorm(config.hidden, config.eps, device="meta")
        layer.weight = self.parameter(f"{name}.weight", config.hidden)
        layer.bias = self.parameter(f"{name}.bias", config.hidden)
        return layer


def load_encoder(
    folder: EncoderFolder, device: torch.device, dtype: torch.dtype, report: ReportProgress | None = None
) -> Encoder:
    """Raises EngineLoadError for weights that do not fit the config, and for any that nothing uses."""
    reader = SafetensorsReader(folder.files)
    name = "embeddings.word_embeddings.weight"
    prefix = next((prefix for prefix in PREFIXES if prefix + name in reader.shapes), None)
    if prefix is None:
        raise EngineLoadError(f"tensor {name} is missing in the model's files; fetch the model again")
    total = sum(path.stat().st_size for path in folder.files)
    tell = report or _silent
    source = FileSource(Placement(device=device, dtype=dtype), reader, tell, total)
    model = Encoder(folder.config, source, prefix, folder.pooling, folder.normalise).eval()
    source.finish(lambda tensor: tensor.removeprefix(prefix) in UNUSED)
    tell(LoadProgress(phase="read", done=total, total=total))
    return model


def _silent(progress: LoadProgress) -> None:
    pass


def random_encoder(config: EncoderConfig, device: torch.device, dtype: torch.dtype, seed: int) -> Encoder:
    """A model of these shapes with random weights, mean pooling and unit length: for speed and memory only."""
    source = RandomSource(Placement(device=device, dtype=dtype), seed)
    return Encoder(config, source, "", "mean", normalise=True).eval()
