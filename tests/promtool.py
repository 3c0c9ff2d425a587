"""Prometheus and its promtool, which no Python package brings."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = os.environ.get("PROMETHEUS_FOLDER")
"""Where the two programs are, if not on the path."""


def find(program: str) -> str | None:
    return shutil.which(program, path=FOLDER) if FOLDER else shutil.which(program)


needs_promtool = pytest.mark.skipif(
    find("promtool") is None,
    reason="promtool is not here: apt-get install prometheus, or PROMETHEUS_FOLDER=the folder that holds it",
)


def promtool(*arguments: str, page: bytes = b"") -> subprocess.CompletedProcess[str]:
    """Run it with ``page`` on its standard input."""
    program = find("promtool")
    assert program is not None
    answer = subprocess.run([program, *arguments], input=page, capture_output=True, timeout=60, check=False)
    return subprocess.CompletedProcess(answer.args, answer.returncode, answer.stdout.decode(), answer.stderr.decode())


ROOT = Path(__file__).resolve().parents[1]
