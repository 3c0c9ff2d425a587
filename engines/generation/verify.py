"""What a first load makes sure of: the files are those that were written, and the model says what it said then."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from engines.engine_folder import EngineRecord, LogitFingerprint, read_engine_record
from engines.generation.whole_prompts import WholePrompts
from engines.hashes import verify_files
from engines.manifest import Manifest
from engines.models.model import Model
from engines.protocol import EngineLoadError, EngineSpec, LoadProgress, ReportProgress

TOLERANCES = {
    "cpu/float32": 0.25,
    "cpu/bfloat16": 0.5,
    "cuda/float32": 0.25,
    "cuda/float16": 0.5,
    "cuda/bfloat16": 0.5,
}
"""Largest difference of a log probability that rounding explains, by device kind and dtype; also where a record names
no tolerance for a device. Kernels may round activations to 8 bits where the definition does not. A wrong scale or a
lost tensor moves log probabilities by several nats."""


def record_to_verify(manifest: Manifest, spec: EngineSpec) -> EngineRecord | None:
    """The engine folder's record, where this load must be checked against it: not one that only follows the death of
    a worker in which the model had loaded, and not random weights. Raises EngineLoadError for a damaged record."""
    if manifest.format == "gguf" or spec.random_weights is not None or spec.measured is not None:
        return None
    return read_engine_record(manifest.source)


def verify_weights(record: EngineRecord, manifest: Manifest, spec: EngineSpec, report: ReportProgress) -> None:
    """Raises EngineLoadError where a file differs from the record, or a weight file is none of its own."""
    strangers = [path.name for path in manifest.files if path.name not in record.hashes]
    if strangers:
        raise EngineLoadError(
            f"{spec.name}: the weight file {strangers[0]} is not one that the model was written with; remove it"
        )
    verify_files(
        manifest.source,
        record.hashes,
        record.chunk_bytes,
        Path(spec.verified) if spec.verified else None,
        lambda done, total: report(LoadProgress(phase="verify", done=done, total=total)),
    )


def verify_fingerprint(
    fingerprint: LogitFingerprint, model: Model, spec: EngineSpec, device: torch.device, dtype: torch.dtype
) -> None:
    """Raises EngineLoadError where the loaded model's next-token log probabilities are not the recorded ones."""
    kind = tolerance_key(device, dtype)
    tolerance = fingerprint.tolerances.get(kind, TOLERANCES.get(kind, max(TOLERANCES.values())))
    if any(token >= model.vocab_size for row in (*fingerprint.prompts, *fingerprint.tokens) for token in row):
        raise EngineLoadError(f"{spec.name}: the fingerprint is of a model with a larger vocabulary")
    found = logprobs_of(WholePrompts(model, device, dtype), fingerprint.prompts, fingerprint.tokens)
    difference = largest_difference(found, fingerprint.logprobs)
    if not difference <= tolerance:
        raise EngineLoadError(
            f"{spec.name}: the loaded model does not compute what it computed when it was made: log probabilities of "
            f"its fingerprint are off by {difference:.3g}, and {tolerance:.3g} is the most that {kind} may differ. "
            "Weights and config do not belong together, or this device computes wrongly; compress the model again"
        )


def tolerance_key(device: torch.device, dtype: torch.dtype) -> str:
    """As in ``LogitFingerprint.tolerances``: ``cpu/float32``."""
    return f"{device.type}/{str(dtype).removeprefix('torch.')}"


def logprobs_of(
    prompts: WholePrompts, sequences: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Log probability of each of ``tokens[i]`` as what follows ``sequences[i]``."""
    logprobs = prompts.last_logprobs(sequences).cpu()
    return [logprobs[index, list(row)].tolist() for index, row in enumerate(tokens)]


def largest_difference(left: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> float:
    """Over all entries; not a number where any is not."""
    rows = zip(left, right, strict=True)
    return float(torch.tensor([a - b for one, two in rows for a, b in zip(one, two, strict=True)]).abs().max())
