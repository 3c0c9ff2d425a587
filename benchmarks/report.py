"""What every benchmark prints beside its figures: machine, commit, versions; and where its JSON goes."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from server.version import version

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def cpu_model() -> str:
    """Name, family and vector extensions of the processor: a virtual machine often hides the model."""
    fields: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    flags = set(fields.get("flags", "").split())
    notable = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if flag in flags]
    name = fields.get("model name", platform.processor() or platform.machine())
    return f"{name} family {fields.get('cpu family', '?')} ({' '.join(notable)})"


def commit() -> str:
    """Short hash of the checkout, with a + where files differ from it. BENCH_COMMIT names it in a copy without git."""
    if named := os.environ.get("BENCH_COMMIT"):
        return named
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def machine() -> dict[str, object]:
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "slimserve": version(),
        "commit": commit(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def device_name() -> str:
    """The driver's name of the first GPU, or ``cpu``. Asks without a CUDA context in this process."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    except (FileNotFoundError, IndexError, subprocess.CalledProcessError):
        return "cpu"


def print_header(title: str) -> dict[str, object]:
    facts = machine()
    print(f"# {title}")
    for key, value in facts.items():
        print(f"  {key}: {value}", flush=True)
    return facts


def row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """One line of a table: the first cell to the left, all others to the right of their widths."""
    padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
    return "  ".join((cells[0].ljust(widths[0]), *padded[1:]))


def read(name: str, folder: Path | None = None) -> dict[str, Any]:
    """The result on record, or an empty one."""
    path = (folder or RESULTS) / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def folder_out() -> Path:
    """Where results go: ``$OUT`` on a machine that gives back what is there, else ``benchmarks/results``."""
    return Path(os.environ.get("OUT", RESULTS))


def write(name: str, result: Mapping[str, object], folder: Path | None = None) -> Path:
    """Into ``folder`` in place of ``benchmarks/results``, where one is given."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
