"""The web page at ``/``: static files with a strict policy of what a browser may do with them.

The files hold nothing of the server's state, so they need no key. The page reads ``/health/ready``, ``/stats`` and the
API itself, and those ask for one where it is set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

PREFIX = "/web/"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""No inline script or style, nothing from elsewhere, no frame around the page, no text that becomes markup."""
SECURITY_HEADERS = {
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    body: bytes
    media_type: str
    etag: str


def _read() -> dict[str, PageFile]:
    """By URL path. All are read at import: the page is some 150 kB, and no path of a request reaches the disk."""
    found: dict[str, PageFile] = {}

    def walk(folder: Traversable, prefix: str) -> None:
        for entry in folder.iterdir():
            if entry.is_dir():
                walk(entry, f"{prefix}{entry.name}/")
            elif (media_type := _TYPES.get("." + entry.name.rpartition(".")[2])) is not None:
                body = entry.read_bytes()
                etag = f'"{hashlib.sha256(body).hexdigest()[:20]}"'
                found["/" if entry.name == "index.html" else prefix + entry.name] = PageFile(body, media_type, etag)

    walk(files(__package__) / "static", PREFIX)
    return found


FILES: Mapping[str, PageFile] = _read()
PATHS = frozenset(FILES)
"""Answered without a key."""


async def _send(request: Request) -> Response:
    file = FILES[request.url.path]
    headers = SECURITY_HEADERS | {"etag": file.etag, "cache-control": "no-cache"}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.body, headers=headers, media_type=file.media_type)


def page_routes() -> list[Route]:
    """One route a file, for GET and HEAD."""
    return [Route(path, _send, methods=["GET"], include_in_schema=False) for path in sorted(PATHS)]
