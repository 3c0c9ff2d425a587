"""A compiled encoder against the same weights in float32 without a compiler, on random tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engines.compiled.engine import Array, CompiledEngine
from engines.compiled.exported import ENCODER_INPUTS
from engines.encoder_folder import read_encoder_folder
from engines.models.encoder import load_encoder

SHAPES = ((1, 1), (1, 17), (3, 64), (8, 33))
"""Texts and tokens; compilers like to treat 1 and multiples of 8 apart."""


@dataclass(frozen=True)
class Agreement:
    largest: float
    """Difference of any output."""
    cosine: float
    """Of the output that points away most from what it should be."""


def compare(engine: CompiledEngine, source: Path) -> Agreement:
    """Runs both on the CPU or the package's own device. Raises EngineLoadError."""
    folder = read_encoder_folder(source)
    model = load_encoder(folder, torch.device("cpu"), torch.float32)
    generator = np.random.default_rng(0)
    largest, cosine = 0.0, 1.0
    for texts, tokens in SHAPES:
        tokens = min(tokens, folder.config.positions)
        mask = (np.arange(tokens) <= generator.integers(0, tokens, (texts, 1))).astype(np.int64)
        ids = generator.integers(0, folder.config.vocab, (texts, tokens)) * mask
        inputs: dict[str, Array] = dict(zip(ENCODER_INPUTS, (ids, mask, np.zeros_like(ids)), strict=True))
        with torch.inference_mode():
            expected = model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        found = torch.from_numpy(engine.run(inputs)[model.output_name])
        largest = max(largest, (found - expected).abs().max().item())
        cosine = min(cosine, torch.cosine_similarity(found, expected).min().item())
    return Agreement(largest, cosine)
