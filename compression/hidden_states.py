"""The residual stream of all calibration windows between two layers, in a file: memory holds what the system spares."""

from __future__ import annotations

from pathlib import Path

import torch


class HiddenStates:
    """(windows, tokens, width) float32, mapped from a file; the system writes it back when memory is wanted."""

    def __init__(self, path: Path, windows: int, tokens: int, width: int) -> None:
        """Opens the file, or makes it. Raises OSError if the disk has no room for it."""
        size = windows * tokens * width
        if not path.exists():
            with path.open("wb") as file:
                file.truncate(size * torch.float32.itemsize)
        self.path = path
        self._values = torch.from_file(str(path), shared=True, size=size).view(windows, tokens, width)

    @property
    def windows(self) -> int:
        return self._values.shape[0]

    def read(self, window: int, device: torch.device) -> torch.Tensor:
        """(tokens, width), a copy."""
        return self._values[window].to(device, copy=True)

    def write(self, window: int, hidden: torch.Tensor) -> None:
        """Of (tokens, width)."""
        self._values[window].copy_(hidden)
