"""The student's corpus: English documentation out of pinned Debian packages, as files that are the same each time."""

from __future__ import annotations

import hashlib
import json
import lzma
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

from compression.errors import CompressionError
from compression.student.debian_text import documents

TRAIN, VALID, CALIBRATION = "train", "valid", "calibration"
"""Parts; the last two are written as text files too."""
TEXTS, RECORD = "texts", "corpus.json"
SHORTEST_DOCUMENT = 400
"""Characters after repeated paragraphs are gone; shorter ones are stubs and indexes."""
LONG_PARAGRAPH = 40
"""Characters. Shorter paragraphs, such as headings, may repeat."""
MOST_SYMBOLS = 0.4
"""Share of a document's characters that are neither letters nor blanks; above it stand tables of numbers."""
HELD_OUT = 50
"""One document in so many is for validation, and another for calibration."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Package:
    """A pinned Debian package; ``files`` is an expression that the paths of its English documents match."""

    package: str
    version: str
    sha256: str
    files: str


def pinned_packages() -> list[Package]:
    text = resources.files("compression.student").joinpath("corpus.json").read_bytes()
    return [Package(**values) for values in json.loads(text)]


def fetch(packages: list[Package], folder: Path, say: Say) -> list[Path]:
    """Download what is not there yet and check each file's hash. Raises CompressionError."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for package in packages:
        path = _file(package, folder)
        if path is None:
            say(f"downloading {package.package} {package.version}")
            _download(package, folder)
            path = _file(package, folder)
        if path is None or hashlib.sha256(path.read_bytes()).hexdigest() != package.sha256:
            raise CompressionError(
                f"{package.package} {package.version} did not come as pinned; mirrors drop old versions, which "
                "snapshot.debian.org keeps: put the .deb into the folder by hand"
            )
        paths.append(path)
    return paths


def _file(package: Package, folder: Path) -> Path | None:
    # apt writes an epoch's colon as %3a.
    version = package.version.replace(":", "%3a")
    return next(iter(folder.glob(f"{package.package}_{version}_*.deb")), None)


def _download(package: Package, folder: Path) -> None:
    command = ["apt-get", "download", f"{package.package}={package.version}"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise CompressionError("apt-get is missing: the corpus is made on a Debian system") from error
    if done.returncode:
        raise CompressionError(f"{package.package} cannot be downloaded: {done.stderr.strip()[-200:]}")


def build(packages: list[Package], debs: list[Path], folder: Path, say: Say) -> None:
    """Write the texts of each package, the held-out parts and the record. A package whose file is there is done."""
    texts = folder / TEXTS
    texts.mkdir(parents=True, exist_ok=True)
    for package, deb in zip(packages, debs, strict=True):
        path = texts / f"{package.package}.jsonl.xz"
        if path.exists():
            continue
        partial = path.with_suffix(".partial")
        with lzma.open(partial, "wt", encoding="utf-8", preset=6) as file:
            for text in _clean(deb, package):
                file.write(json.dumps(text, ensure_ascii=False) + "\n")
        partial.replace(path)
        say(f"{package.package}: {path.stat().st_size / 1e6:.1f} MB compressed")
    sizes: dict[str, int] = {}
    for part in (TRAIN, VALID, CALIBRATION):
        found = list(texts_of(folder, part))
        sizes[part] = sum(len(text) for text in found)
        if part != TRAIN:
            (folder / f"{part}.txt").write_text("\n\n".join(found) + "\n", encoding="utf-8")
    record = {"packages": [asdict(package) for package in packages], "characters": sizes}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    say(f"characters: {sizes}")


def _clean(deb: Path, package: Package) -> Iterator[str]:
    """Documents that are prose or code, each without the longer paragraphs that a document before it had."""
    seen: set[bytes] = set()
    for _, text in documents(deb, re.compile(package.files)):
        paragraphs = []
        for paragraph in text.split("\n\n"):
            if len(paragraph) >= LONG_PARAGRAPH:
                digest = hashlib.blake2b(paragraph.encode(), digest_size=8).digest()
                if digest in seen:
                    continue
                seen.add(digest)
            paragraphs.append(paragraph)
        kept = "\n\n".join(paragraphs)
        if len(kept) >= SHORTEST_DOCUMENT and _symbols(kept) <= MOST_SYMBOLS:
            yield kept


def _symbols(text: str) -> float:
    return 1 - (sum(map(str.isalpha, text)) + sum(map(str.isspace, text))) / len(text)


def part_of(text: str) -> str:
    """Which part a document belongs to: by the hash of its text, so that no part depends on the others."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % HELD_OUT
    return {0: VALID, 1: CALIBRATION}.get(number, TRAIN)


def texts_of(folder: Path, part: str) -> Iterator[str]:
    """The documents of one part. Raises CompressionError where the corpus was not made."""
    files = sorted((folder / TEXTS).glob("*.jsonl.xz"))
    if not files:
        raise CompressionError(f"there is no text in {folder.name}; make it with: python -m compression.train corpus")
    for path in files:
        with lzma.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                text: str = json.loads(line)
                if part_of(text) == part:
                    yield text
