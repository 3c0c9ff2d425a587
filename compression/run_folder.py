"""The folder of an unfinished run, beside the engine folder that it will become: what is done is kept in it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from compression.errors import CompressionError
from compression.hidden_states import HiddenStates

STREAM, TARGET = "hidden", "full"
"""Kinds of the residual stream before each layer: the compressed model's, and for compensation the full one's."""


class RunFolder:
    def __init__(self, out: Path) -> None:
        """``out``: where the engine folder will stand."""
        self.path = out.with_name(f"{out.name}.partial")

    def start_or_go_on(self, recipe: Any, base: str, calibration: bytes) -> None:
        """``recipe`` in builtins, ``base``: the model's fingerprint.

        Raises CompressionError if the folder belongs to a run with others.
        """
        facts = {"recipe": recipe, "base": base, "calibration": hashlib.sha256(calibration).hexdigest()}
        path = self.path / "run.json"
        if path.exists():
            if json.loads(path.read_text()) != facts:
                raise CompressionError(
                    f"{self.path.name} holds an unfinished run with another recipe, model or calibration text; "
                    "finish that one, or remove the folder"
                )
            return
        self.path.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(facts))
        partial.replace(path)

    @property
    def outer(self) -> Path:
        """What stands around the layers, quantized."""
        return self.path / "outer.safetensors"

    @property
    def distilling(self) -> Path:
        """Where distillation was."""
        return self.path / "distilling.safetensors"

    def layer(self, index: int) -> Path:
        """The quantized layer."""
        return self.path / f"layer-{index:05}.safetensors"

    def first_missing(self, layers: int) -> int:
        """The layer to go on with; ``layers`` where all are there."""
        return next((index for index in range(layers) if not self.layer(index).exists()), layers)

    def stream(self, index: int, kind: str, windows: int, tokens: int, width: int) -> HiddenStates:
        """The residual stream of that kind before layer ``index``."""
        return HiddenStates(self._stream_file(index, kind), windows, tokens, width)

    def drop_streams(self, index: int) -> None:
        """Those before layer ``index``."""
        for kind in (STREAM, TARGET):
            self._stream_file(index, kind).unlink(missing_ok=True)

    def _stream_file(self, index: int, kind: str) -> Path:
        return self.path / f"{kind}-{index:05}.bin"
