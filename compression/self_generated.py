"""Calibration windows that the model writes itself: no text has to be at hand, and none is of the wrong kind.

LLM-QAT (Liu et al. 2023, arXiv 2305.17888) found that what a model samples from its own distribution stands for the
data that it was trained on better than a part of those data does. Sequences begin with the token that documents begin
with, and every token is drawn at temperature 1 from all of the vocabulary. Where a document ends before the window
does, the model goes on with what it puts after the end, as in training.
"""

from __future__ import annotations

from pathlib import Path

import torch

from compression.errors import CompressionError
from compression.measures.engine_process import ROWS, Request, measure_engine
from compression.progress import PartReport
from compression.recipe import Calibration
from engines.manifest import Manifest
from engines.protocol import EngineSpec


def generated_windows(
    model: Path, manifest: Manifest, wanted: Calibration, tokens: int, device: str, report: PartReport
) -> torch.Tensor:
    """(windows, tokens) int64, the same for the same seed on the same machine. The serving engine draws them, in a
    process of its own. Raises CompressionError for a model without a token to begin with, and EngineLoadError."""
    first = manifest.bos_token_id
    if first is None:
        first = next(iter(manifest.eos_token_ids), None)
    if first is None:
        raise CompressionError(
            "the model names no token that documents begin or end with, so it cannot write its own calibration text; "
            "set calibration.source to text, and give --calibration FILE"
        )
    spec = EngineSpec(
        name=manifest.source.name,
        source=str(model),
        device=device,
        max_model_len=tokens,
        max_batch=min(wanted.windows, ROWS[torch.device(device).type][-1]),
    )
    request = Request(
        spec=spec,
        prompts=[[first]] * wanted.windows,
        most=tokens - 1,
        temperature=1.0,
        seed=wanted.seed,
        speed=False,
    )
    result = measure_engine(request, lambda what, done, total: report(f"the model writes: {what}", done, total))
    return torch.tensor([[first, *answer] for answer in result.answers])
