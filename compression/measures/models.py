"""The two models of a comparison, loaded through the engine's own loader."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from compression.errors import CompressionError
from engines.generation.placement import choose_placement
from engines.generation.threads import available_cores, choose_threads
from engines.generation.whole_prompts import WholePrompts
from engines.kernels import dense
from engines.manifest import Manifest, read_manifest
from engines.models.config import parse_config
from engines.models.loader import build_model, load_model, open_weights
from engines.models.memory import free_bytes
from engines.models.model import Model
from engines.models.weights import FileSource, Placement
from engines.protocol import EngineSpec
from engines.quant.base import LinearPart, QuantMethod, Split, WeightSource
from server.text import ModelText, load_text

_SECOND_MODEL = 1.3
"""Memory that must be free for the second model, in sizes of the first: it is at most as large, and its reading takes
some."""
_FEW, _MANY = 16, 64
"""Tokens of the steps by which threads are chosen."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that is measured: its files."""

    path: Path
    manifest: Manifest
    text: ModelText

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(".gguf")


def open_subject(path: Path) -> Subject:
    """Reads the manifest and the tokenizer; close ``text`` afterwards. Raises EngineLoadError."""
    manifest = read_manifest(path)
    return Subject(path, manifest, load_text(manifest))


def check_comparable(own: Subject, base: Subject, sample: str) -> None:
    """Raises CompressionError unless both models read the same tokens, without which no comparison means anything."""
    same = own.manifest.vocab_size == base.manifest.vocab_size
    if not same or _encode(own, sample) != _encode(base, sample):
        raise CompressionError(
            f"{own.name} and {base.name} have different tokenizers; --against needs the model that this one was made of"
        )


def _encode(subject: Subject, sample: str) -> list[int]:
    return subject.text.encode(sample, max_tokens=len(sample) + 1)


def spec_of(subject: Subject, device: str, dtype: str, length: int) -> EngineSpec:
    return EngineSpec(name=subject.name, source=str(subject.path), device=device, dtype=dtype, max_model_len=length)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: Model
    device: torch.device
    dtype: torch.dtype


def load(subject: Subject, spec: EngineSpec) -> LoadedModel:
    """Raises EngineLoadError."""
    placement = choose_placement(spec, subject.manifest.dtype)
    model = load_model(subject.manifest, spec, placement.device, placement.dtype, lambda progress: None)
    return LoadedModel(model, placement.device, placement.dtype)


class _Dequantized:
    """A QuantMethod that gives another one's weights as plain tensors."""

    def __init__(self, method: QuantMethod, dtype: torch.dtype) -> None:
        self._method = method
        self._dtype = dtype

    def tensor_names(self, part: LinearPart) -> tuple[str, ...]:
        return self._method.tensor_names(part)

    def create_weights(self, part: LinearPart, in_features: int, split: Split, source: WeightSource) -> torch.Tensor:
        return dense(self._method.create_weights(part, in_features, split, source), self._dtype)


def load_reference(subject: Subject, spec: EngineSpec) -> LoadedModel:
    """The model that its weights mean: dequantized where they are quantized, so that no kernel rounds an activation.

    Raises EngineLoadError.
    """
    if subject.manifest.quantization is None:
        return load(subject, spec)
    placement = choose_placement(spec, subject.manifest.dtype)
    device, dtype = placement.device, placement.dtype
    reader, methods = open_weights(subject.manifest)
    source = FileSource(Placement(device=device, dtype=dtype), reader, lambda progress: None, total=1)
    positions = spec.max_model_len or subject.manifest.max_context
    config = parse_config(subject.manifest)
    model = build_model(config, source, positions, methods=lambda layer: _Dequantized(methods(layer), dtype))
    return LoadedModel(model, device, dtype)


def set_threads(loaded: LoadedModel, threads: int | None) -> None:
    """Of operations on the CPU: as asked, else those with which this model is fastest now."""
    if loaded.device.type != "cpu":
        return
    if threads is not None:
        torch.set_num_threads(threads)
        return
    prompts = WholePrompts(loaded.model, loaded.device, loaded.dtype)
    choose_threads(available_cores(), lambda tokens: prompts.hidden([[0] * tokens]), _FEW, _MANY, time.perf_counter)


def room_for_another(loaded: LoadedModel) -> bool:
    """Whether a model of this size fits beside this one."""
    return free_bytes(loaded.device) > _SECOND_MODEL * loaded.model.weight_bytes
