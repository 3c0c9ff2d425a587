"""Two small checkpoints with a tokenizer: a base, and the same with a little noise on its weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from engines.engine_folder import ClassCoverage, Coverage, EngineRecord, write_engine_record
from engines.hashes import hash_files
from tests.unit.api.harness import write_model
from tests.unit.models.checkpoints import write_checkpoint

NOISE = 0.02


def write_pair(parent: Path, context: int = 256) -> tuple[Path, Path]:
    """The noisy one and its base."""
    base, own = parent / "base", parent / "own"
    for folder in (base, own):
        write_model(folder)
        config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": context}
        (folder / "config.json").write_text(json.dumps(config))
    tensors = write_checkpoint(base, json.loads((base / "config.json").read_text()))
    generator = torch.Generator().manual_seed(5)
    noisy = {
        name: tensor + NOISE * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if tensor.dim() > 1
        else tensor
        for name, tensor in tensors.items()
    }
    save_file(noisy, own / "model.safetensors")
    return own, base


def write_record(folder: Path, **fields: object) -> EngineRecord:
    """Makes the folder an engine folder."""
    part = ClassCoverage(parameters=10, quantized_parameters=0, bytes=40, quantized_bytes=0)
    record = EngineRecord(
        recipe={"name": "none"},
        base="base",
        created_with="tests",
        coverage=Coverage(classes={"mlp": part}),
        hashes=hash_files([folder / "model.safetensors", folder / "config.json"], chunk_bytes=1 << 16),
        chunk_bytes=1 << 16,
        **fields,  # type: ignore[arg-type]
    )
    write_engine_record(folder, record)
    return record
