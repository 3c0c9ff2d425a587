"""Facts for a bug report."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import psutil

from server.catalog import cache_home
from server.devices import visible_gpus

_PACKAGES = ("slimserve", "torch", "triton", "tokenizers", "fastapi", "uvicorn", "pyzmq", "msgspec", "numpy")


def describe() -> list[tuple[str, str]]:
    """Names and values; no secret and no request is among them."""
    facts = [
        ("python", platform.python_version()),
        ("system", platform.platform()),
        ("cores", str(len(os.sched_getaffinity(0)))),
        ("memory", f"{psutil.virtual_memory().total / 1e9:.1f} GB"),
        ("GPUs", str(visible_gpus())),
        ("cache", str(cache_home())),
    ]
    return facts + [(package, _version(package)) for package in _PACKAGES]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
