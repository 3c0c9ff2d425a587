"""Reads tensors of one or more memory-mapped ``.safetensors`` files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engines.protocol import EngineLoadError


class SafetensorsReader:
    """A ``TensorReader``. The files were checked when the manifest was read."""

    def __init__(self, files: tuple[Path, ...]) -> None:
        """Raises EngineLoadError if a file cannot be opened."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Any] = {}
        for path in files:
            try:
                file: Any = safe_open(path, framework="pt", device="cpu")
                for name in file.keys():  # noqa: SIM118  (not a dict: it has no iterator)
                    self._files[name] = file
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())
            except (OSError, SafetensorError) as error:
                raise EngineLoadError(f"{path.name} cannot be read; fetch the model again ({error})") from error

    def read(self, name: str, part: tuple[slice, ...]) -> torch.Tensor:
        file = self._files[name]
        tensor: torch.Tensor = file.get_slice(name)[part] if part else file.get_tensor(name)
        return tensor
