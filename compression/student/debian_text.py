"""Plain English text out of Debian documentation packages."""

from __future__ import annotations

import gzip
import io
import re
import subprocess
import tarfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal

from compression.errors import CompressionError

LARGEST_DOCUMENT = 8 << 20
"""Bytes of one file; larger ones are indexes."""

Markup = Literal["html", "text"]
_SUFFIXES: dict[str, Markup] = {
    ".html": "html",
    ".en": "html",
    ".txt": "text",
    ".pod": "text",
    ".adoc": "text",
    ".rst": "text",
    ".md": "text",
}
_SKIPPED = {"script", "style", "nav", "header", "footer", "head", "form", "svg", "noscript"}
_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"}
_BLOCKS = {
    *("p", "div", "section", "article", "li", "ul", "ol", "dl", "dt", "dd", "table", "tr", "blockquote", "br", "hr"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "pre", "figure", "figcaption", "main", "aside", "body"),
}
_SPACE = re.compile(r"[ \t\r\n\f\v\u00a0]+")
_BLANK_LINES = re.compile(r"\n\s*\n+")


def documents(package: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """Name and text of each file of a ``.deb`` whose path ``wanted`` finds something in, in the package's order.

    Files that are not UTF-8 are passed over. Raises CompressionError if the package cannot be read.
    """
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                markup = markup_of(member.name)
                if markup is None or not member.isfile() or not wanted.search(member.name):
                    continue
                file = archive.extractfile(member)
                assert file is not None
                text = _decode(file.read(LARGEST_DOCUMENT + 1), member.name)
                if text is not None:
                    yield member.name, html_text(text) if markup == "html" else tidy(text)
    if process.returncode:
        raise CompressionError(f"{package.name} cannot be unpacked; download it again")


def markup_of(path: str) -> Markup | None:
    """By the file's name; None for what is no text."""
    return _SUFFIXES.get(Path(path.removesuffix(".gz")).suffix)


def _decode(content: bytes, name: str) -> str | None:
    if name.endswith(".gz") and len(content) <= LARGEST_DOCUMENT:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            content = file.read(LARGEST_DOCUMENT + 1)
    if len(content) > LARGEST_DOCUMENT:
        return None
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return None


def html_text(page: str) -> str:
    """What a reader sees of a page, without navigation."""
    parser = _PageText()
    parser.feed(page)
    parser.close()
    return tidy("".join(parser.pieces))


def tidy(text: str) -> str:
    """Without blank lines in a row and without space at line ends."""
    lines = (line.rstrip() for line in text.splitlines())
    return _BLANK_LINES.sub("\n\n", "\n".join(lines)).strip()


class _PageText(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._skipping: list[str] = []
        self._verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _VOID:
            if tag == "br":
                self.pieces.append("\n")
            return
        if self._skipping or tag in _SKIPPED:
            self._skipping.append(tag)
            return
        self._verbatim += tag == "pre"
        if tag in _BLOCKS:
            self.pieces.append("\n\n" if tag[0] in "hp" else "\n")
        if tag == "li":
            self.pieces.append("- ")
        elif tag in ("td", "th"):
            self.pieces.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if self._skipping:
            # Pages leave elements open; what encloses them closes them.
            if tag in self._skipping:
                while self._skipping.pop() != tag:
                    pass
            return
        self._verbatim = max(0, self._verbatim - (tag == "pre"))
        if tag in _BLOCKS:
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self.pieces.append(data if self._verbatim else _SPACE.sub(" ", data))
