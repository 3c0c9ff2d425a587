"""The version of this installation."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    """Of the installed distribution."""
    try:
        return metadata.version("slimserve")
    except metadata.PackageNotFoundError:
        return "0+source"
