"""``slimserve ps``: the models of a running server and what they do, once or live."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Self

import httpx
import msgspec
from rich.console import Console
from rich.live import Live
from rich.table import Table

from server.display import columns
from server.errors import CommandFailed

FIRST_LOOK = 0.5
"""Seconds between the two looks that the first rate takes."""
_HEADER = ("model", "state", "device", "dtype", "running", "waiting", "tokens/s", "KV used", "requests")


class _Model(msgspec.Struct, frozen=True):
    """As much of ``GET /stats`` as is shown."""

    name: str
    state: str
    phase: str
    done: int
    total: int
    device: str
    dtype: str
    running: float
    waiting: float
    kv_usage: float
    generated_tokens: float
    endings: dict[str, float]


class _Stats(msgspec.Struct, frozen=True):
    time: float
    version: str
    ready: bool
    models: list[_Model]


class Row(msgspec.Struct, frozen=True):
    """One model. What ``--json`` prints."""

    name: str
    state: str
    """starting, loading, ready, restarting, failed, draining."""
    phase: str
    """Of a download or load, with ``progress`` from 0 to 1, or null where it has no measure."""
    progress: float | None
    device: str
    dtype: str
    running: int
    """Sequences that take part in steps."""
    waiting: int
    tokens_per_second: float
    """Output tokens, since the look before."""
    kv_usage: float
    """KV blocks in use, 0 to 1."""
    requests: int
    """That have ended."""

    @property
    def cells(self) -> tuple[str, ...]:
        state = self.state if not self.phase else f"{self.state}: {self.phase}"
        if self.progress is not None:
            state += f" {self.progress:.0%}"
        return (
            self.name,
            state,
            self.device or "-",
            self.dtype or "-",
            str(self.running),
            str(self.waiting),
            f"{self.tokens_per_second:,.0f}",
            f"{self.kv_usage:.0%}",
            f"{self.requests:,}",
        )


class Looks(msgspec.Struct, frozen=True):
    """Two of them, one after the other."""

    version: str
    ready: bool
    models: list[Row]


class Watcher:
    """Looks at one server. Raises CommandFailed, in words for a person, for all that goes wrong."""

    def __init__(self, url: str, api_key: str | None, transport: httpx.BaseTransport | None = None) -> None:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        try:
            self._http = httpx.Client(base_url=url, headers=headers, timeout=10, transport=transport)
        except httpx.InvalidURL as error:
            raise CommandFailed(f"--url {url}: {error}") from None
        self._url = url
        self._before: _Stats | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def look(self) -> Looks:
        """Rates are those since the look before; 0 in the first."""
        now = self._read()
        before, self._before = self._before, now
        known = {} if before is None else {model.name: model for model in before.models}
        seconds = 0.0 if before is None else now.time - before.time
        return Looks(now.version, now.ready, [_row(model, known.get(model.name), seconds) for model in now.models])

    def _read(self) -> _Stats:
        try:
            response = self._http.get("/stats")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise CommandFailed(f"no server answers at {self._url}: {error}") from None
        if response.status_code in (401, 403):
            raise CommandFailed("the server asks for its API key or admin key: set SLIMSERVE_API_KEY or --api-key")
        try:
            return msgspec.json.decode(response.raise_for_status().content, type=_Stats)
        except (httpx.HTTPStatusError, msgspec.DecodeError):
            raise CommandFailed(f"what answers at {self._url} is no slimserve of this version") from None


def _row(model: _Model, before: _Model | None, seconds: float) -> Row:
    made = 0.0 if before is None else max(0.0, model.generated_tokens - before.generated_tokens)
    return Row(
        name=model.name,
        state=model.state,
        phase=model.phase,
        progress=model.done / model.total if model.total else None,
        device=model.device,
        dtype=model.dtype,
        running=int(model.running),
        waiting=int(model.waiting),
        tokens_per_second=round(made / seconds, 1) if seconds > 0 else 0.0,
        kv_usage=model.kv_usage,
        requests=int(sum(model.endings.values())),
    )


def show_once(
    watcher: Watcher, console: Console, *, as_json: bool, pause: Callable[[float], None] = time.sleep
) -> None:
    """Look twice, and print a plain table or one JSON object."""
    watcher.look()
    pause(FIRST_LOOK)
    looks = watcher.look()
    lines = [msgspec.json.encode(looks).decode()] if as_json else columns([_HEADER, *_cells(looks)])
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def show_live(
    watcher: Watcher, console: Console, interval: float, *, pause: Callable[[float], None] = time.sleep
) -> None:
    """Draw the table again and again, until Ctrl-C."""
    watcher.look()
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        for looks in _every(watcher, interval, pause):
            live.update(_table(looks), refresh=True)


def _every(watcher: Watcher, interval: float, pause: Callable[[float], None]) -> Iterator[Looks]:
    pause(min(FIRST_LOOK, interval))
    while True:
        yield watcher.look()
        pause(interval)


def _cells(looks: Looks) -> list[tuple[str, ...]]:
    return [row.cells for row in looks.models]


def _table(looks: Looks) -> Table:
    colours = {"ready": "green", "failed": "red"}
    table = Table(title=f"slimserve {looks.version}", caption="Ctrl-C leaves", box=None, padding=(0, 1, 0, 0))
    table.title_justify = table.caption_justify = "left"
    for index, name in enumerate(_HEADER):
        numbers = index >= 4
        table.add_column(name, justify="right" if numbers else "left", no_wrap=numbers, overflow="fold", min_width=5)
    for row in looks.models:
        name, state, *others = row.cells
        table.add_row(name, f"[{colours.get(row.state, 'yellow')}]{state}[/]", *others)
    return table
