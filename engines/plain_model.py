"""What a plain model's source is: an ``.onnx`` file, or a folder with ``model.onnx`` in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engines.protocol import EngineLoadError

FILE_NAME = "model.onnx"
SUFFIX = ".onnx"


@dataclass(frozen=True, slots=True)
class PlainModelFiles:
    file: Path
    """The graph."""


def is_plain_model(source: Path) -> bool:
    """It is to be served as an ONNX model; a folder that holds a checkpoint too is served from that."""
    if source.is_dir():
        return (source / FILE_NAME).is_file() and not any(source.glob("*.safetensors"))
    return source.suffix == SUFFIX


def read_plain_model(source: Path) -> PlainModelFiles:
    """Raises EngineLoadError where there is nothing to serve."""
    file = source / FILE_NAME if source.is_dir() else source
    if not file.is_file():
        raise EngineLoadError(f"{source.name}: there is no {FILE_NAME} or {SUFFIX} file there")
    return PlainModelFiles(file)
