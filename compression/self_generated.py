"""Calibration windows that the model writes itself: no text has to be at hand, and none is of the wrong kind.

LLM-QAT (Liu et al. 2023, arXiv 2305.17888) found that what a model samples from its own distribution stands for the
data that it was trained on better than a part of those data does. Sequences begin with the token that documents begin
with, and every token is drawn at temperature 1 from all of the vocabulary. Where a document ends before the window
does, the model goes on with what it puts after the end, as in training.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from compression.errors import CompressionError
from compression.export import save_tensors
from compression.measures.engine_process import ROWS, Request, measure_engine
from compression.progress import PartReport
from compression.recipe import Calibration
from engines.manifest import Manifest
from engines.protocol import EngineSpec

WRITTEN_FILE = "written-{:05}.safetensors"
"""By the number of its first window."""


def kept_windows(
    folder: Path, model: Path, manifest: Manifest, wanted: Calibration, tokens: int, device: str, report: PartReport
) -> torch.Tensor:
    """(wanted.windows, tokens) int64. They are kept in ``folder``, so that a run that was killed goes on with them.

    Raises as ``generated_windows``.
    """
    at_once, parts = windows_at_once(device), []
    for start in range(0, wanted.windows, at_once):
        path = folder / WRITTEN_FILE.format(start)
        if not path.exists():
            numbers = range(start, min(start + at_once, wanted.windows))
            what = f"the model writes windows {start + 1} to {numbers.stop} of {wanted.windows}"

            def part(doing: str, done: int, total: int, what: str = what) -> None:
                report(f"{what}: {doing}", done, total)

            written = generated_windows(model, manifest, wanted.seed, numbers, tokens, device, part)
            save_tensors(path, {"tokens": written}, [])
        parts.append(load_file(path)["tokens"])
    return torch.cat(parts)


def windows_at_once(device: str) -> int:
    """As many as the engine writes side by side."""
    return ROWS[torch.device(device).type][-1]


def generated_windows(
    model: Path, manifest: Manifest, seed: int, numbers: range, tokens: int, device: str, report: PartReport
) -> torch.Tensor:
    """(len(numbers), tokens) int64: the windows of these numbers, each the same for the same seed on the same machine.

    The serving engine draws them, in a process of its own. Raises CompressionError for a model without a token to
    begin with, and EngineLoadError.
    """
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
        max_batch=min(len(numbers), windows_at_once(device)),
    )
    request = Request(
        spec=spec,
        prompts=[[first]] * len(numbers),
        most=tokens - 1,
        temperature=1.0,
        seed=seed,
        first_number=numbers.start,
        speed=False,
    )
    result = measure_engine(request, report)
    return torch.tensor([[first, *answer] for answer in result.answers])
