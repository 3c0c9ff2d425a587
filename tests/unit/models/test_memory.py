"""What counts as free memory on the CPU."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from engines.models.memory import free_bytes, require_memory
from engines.protocol import EngineLoadError

CPU = torch.device("cpu")
MIB = 1 << 20


def write_cgroup(root: Path, limit: str, used: int, *, version: int) -> Path:
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    folder = root if version == 2 else root / "memory"
    folder.mkdir(exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used}\ninactive_file {2 * MIB}\nactive_file {MIB}\nfile {9 * MIB}\n")
    return root


@pytest.mark.parametrize("version", [1, 2])
def test_the_container_limit_bounds_it_and_file_pages_do_not_count(version: int, tmp_path: Path) -> None:
    write_cgroup(tmp_path, str(64 * MIB), 20 * MIB, version=version)
    assert free_bytes(CPU, tmp_path) == (64 - 20 + 3) * MIB


def test_used_up(tmp_path: Path) -> None:
    assert free_bytes(CPU, write_cgroup(tmp_path, str(64 * MIB), 80 * MIB, version=2)) == 0


def test_without_a_limit_the_machine_bounds_it(tmp_path: Path) -> None:
    write_cgroup(tmp_path, "max", 80 * MIB, version=2)
    assert free_bytes(CPU, tmp_path) > 100 * MIB
    assert free_bytes(CPU, tmp_path / "nothing") <= psutil.virtual_memory().total


def test_the_refusal_says_which_bound_it_is() -> None:
    require_memory("tiny", 10, torch.float32, CPU, limit=10)
    with pytest.raises(
        EngineLoadError, match=r"tiny: the weights need 3\.00 GB as bfloat16.* 2\.00 GB the memory limit"
    ):
        require_memory("tiny", 3_000_000_000, torch.bfloat16, CPU, limit=2_000_000_000)
    with pytest.raises(EngineLoadError, match=r"GB are free"):
        require_memory("tiny", 1 << 60, torch.bfloat16, CPU, limit=None)
