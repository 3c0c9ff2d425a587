"""The native CPU library, where it was built and this machine can run it."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

from engines.kernels.native.arguments import PackedCodes
from engines.kernels.native.calls import Native
from engines.kernels.native.library import NativeUnavailable
from engines.kernels.native.tape import Arena, Tape, Watch

__all__ = ["Arena", "Native", "NativeStatus", "PackedCodes", "Tape", "Watch", "native_status", "shared_native"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NativeStatus:
    """Which implementation serves CPU tensors, and why."""

    variant: str | None
    """``avx512``, ``avx2`` or ``base``; None where the library cannot be used."""
    reason: str
    """Empty, or why there is no library."""


@functools.cache
def _shared() -> tuple[Native | None, NativeStatus]:
    try:
        loaded = Native()
    except NativeUnavailable as error:
        logger.warning("CPU kernels run in plain torch, slower: %s", error)
        return None, NativeStatus(None, str(error))
    return loaded, NativeStatus(loaded.variant, "")


def shared_native() -> Native | None:
    """The process's library, loaded at the first call; None where it cannot be used."""
    return _shared()[0]


def native_status() -> NativeStatus:
    """Which native variant serves CPU tensors, or why none does."""
    return _shared()[1]
