"""The state of a training run, small enough to be carried from one machine to another.

Weights are kept in bfloat16, whose rounding moves them by less than one step does. The optimizer's moments are not
kept: its averages reach back some twenty steps, and a run that goes on warms up again.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from compression.errors import CompressionError
from compression.student.model import Student
from compression.student.shape import Shape

FOLDER, STATE = "checkpoint", "state.json"
PART_BYTES = 12 << 20
"""Of one file, unless a single tensor is larger."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    step: int
    seconds: float
    """Of all calls together."""


def save_checkpoint(run: Path, model: Student, progress: Progress) -> None:
    """Replace the run's checkpoint; after a kill there is the old or the new one."""
    partial, final, old = run / "checkpoint.partial", run / FOLDER, run / "checkpoint.old"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for place, tensors in enumerate(_parts(model)):
        save_file(tensors, partial / f"weights-{place}.safetensors")
    (partial / STATE).write_text(json.dumps({"progress": asdict(progress), "shape": asdict(model.shape)}))
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _parts(model: Student) -> list[dict[str, torch.Tensor]]:
    parts: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, parameter in model.named_parameters():
        value = parameter.detach().to(torch.bfloat16).cpu().contiguous()
        if size + value.nbytes > PART_BYTES and parts[-1]:
            parts.append({})
            size = 0
        parts[-1][name] = value
        size += value.nbytes
    return parts


def load_checkpoint(run: Path, device: torch.device) -> tuple[Student, Progress] | None:
    """None where the run has none yet. Raises CompressionError for a damaged one."""
    folder = next((run / name for name in (FOLDER, "checkpoint.old") if (run / name / STATE).is_file()), None)
    if folder is None:
        return None
    try:
        state = json.loads((folder / STATE).read_text())
        model, progress = Student(Shape(**state["shape"])), Progress(**state["progress"])
        tensors: dict[str, torch.Tensor] = {}
        for path in sorted(folder.glob("weights-*.safetensors")):
            tensors |= load_file(path)
        model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CompressionError(f"the checkpoint in {run.name} is damaged; remove it to begin again") from error
    return model.to(device), progress
