"""What goes wrong while a model is compressed."""

from __future__ import annotations

from engines.protocol import EngineLoadError


class CompressionError(EngineLoadError):
    """The text says what is wrong and what to do; the command prints it without a traceback."""
