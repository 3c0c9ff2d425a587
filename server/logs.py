"""Logging of the API process."""

from __future__ import annotations

import logging


def configure_logging(level: str) -> None:
    """To stderr. Libraries below us speak from warnings up only, unless the level is debug."""
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if level != "debug":
        for library in ("uvicorn", "httpx", "huggingface_hub", "asyncio"):
            logging.getLogger(library).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))
