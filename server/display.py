"""What the commands show: progress bars on a terminal, one line per phase elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from engines.protocol import Capacity, EngineInfo, LoadProgress
from engines.tensors import Signature

LINES = 10
"""That a long step writes away from terminals."""
_PHASES = {
    "verify": "verifying files",
    "read": "reading weights",
    "compile": "compiling GPU kernels",
    "allocate": "allocating the KV cache",
    "measure": "measuring",
}


def size(count: float) -> str:
    """Bytes for people: 98.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines in which each column is as wide as its widest entry."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def show(console: Console, text: str) -> None:
    """Print as it is. What cannot be shown, because the disk under a redirected output is full, must stop nobody."""
    with suppress(OSError):
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """For people: 45 s, 12 min, 3.0 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class ProgressLines:
    """Shows what several things do now, each under a name; ``end`` takes a name away. Things that count bytes and
    things that count steps are not shown at the same time."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        self._counts_bytes = True
        self._tasks: dict[str, tuple[TaskID, str]] = {}
        self._shown: dict[str, tuple[str, int]] = {}

    def update(self, name: str, what: str, done: int = 0, total: int = 0) -> None:
        """Of bytes; a ``total`` of 0 is not known. Away from terminals a line when ``what`` changes."""
        self._say(name, (what, 0), f"{name}: {what}" + (f" ({size(total)})" if total else ""))
        self._draw(name, f"{name}: {what}", done, total, counts_bytes=True)

    def step(self, what: str, done: float, total: float, seconds_left: float | None) -> None:
        """Of the one thing that a command does. Away from terminals a line when ``what`` changes, and ten on the way
        from nothing to ``total``."""
        left = "" if seconds_left is None else f"{duration(seconds_left)} left"
        tenth = int(LINES * done / total) if total else 0
        self._say("", (what, tenth), what + (f", {left}" if left else ""))
        self._draw("", what, done, total, counts_bytes=False, left=left)

    def _say(self, name: str, state: tuple[str, int], line: str) -> None:
        if self._shown.get(name) != state:
            self._shown[name] = state
            if not self._console.is_terminal:
                show(self._console, line)

    def _draw(
        self, name: str, description: str, done: float, total: float, *, counts_bytes: bool, left: str = ""
    ) -> None:
        if not self._console.is_terminal:
            return
        if self._bars is not None and counts_bytes != self._counts_bytes:
            self.close()
        if self._bars is None:
            of_bytes, of_steps = (DownloadColumn(), TransferSpeedColumn()), (TextColumn("{task.fields[left]}"),)
            columns = (TextColumn("{task.description}"), BarColumn(), *(of_bytes if counts_bytes else of_steps))
            self._bars, self._counts_bytes = Progress(*columns, console=self._console, transient=True), counts_bytes
            self._bars.start()
        task = self._tasks.get(name)
        if task is not None and task[1] != description:
            self._bars.remove_task(task[0])
            task = None
        if task is None:
            task = self._tasks[name] = self._bars.add_task(description, total=total or None, left=left), description
        self._bars.update(task[0], completed=done, total=total or None, left=left)

    def end(self, name: str) -> None:
        self._shown.pop(name, None)
        task = self._tasks.pop(name, None)
        if self._bars is not None and task is not None:
            self._bars.remove_task(task[0])
        if not self._tasks:
            self.close()

    def close(self) -> None:
        """Take all bars off the screen."""
        self._tasks.clear()
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


class ServeDisplay(Protocol):
    """The face of ``slimserve serve``. All calls come from one thread."""

    def pulling(self, name: str, what: str, done: int, total: int) -> None:
        """A download: so many bytes of ``total``; 0 where that is not known."""

    def pulled(self, name: str) -> None:
        """It is here."""

    def changed(self, name: str, phase: str, progress: LoadProgress | None) -> None:
        """A model is on its way, or lost: then the log says why."""

    def loaded(self, name: str, info: EngineInfo, capacity: Capacity) -> None:
        """A model can serve."""

    def ready(self, url: str, models: Sequence[str], plain: Sequence[str] = (), *, key: bool) -> None:
        """All models can serve: language models, and plain ones."""

    def draining(self, open_replies: int, grace: float) -> None:
        """The server was told to stop."""

    def close(self) -> None:
        """Take what moves off the screen."""


class ServeConsole:
    """Implements ``ServeDisplay`` for people."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lines = ProgressLines(console)
        self._announced = False

    def pulling(self, name: str, what: str, done: int, total: int) -> None:
        self._lines.update(name, what, done, total)

    def pulled(self, name: str) -> None:
        self._lines.end(name)

    def changed(self, name: str, phase: str, progress: LoadProgress | None) -> None:
        if phase in ("failed", "restarting"):
            self._lines.end(name)
        elif progress is not None:
            self._lines.update(name, _PHASES[progress.phase], progress.done, progress.total)
        else:
            self._lines.update(name, "starting")

    def loaded(self, name: str, info: EngineInfo, capacity: Capacity) -> None:
        self._lines.end(name)
        if info.signature is not None:
            self._print(f"{name}: " + "; ".join(_plain_facts(info, info.signature)))
            return
        tokens = capacity.blocks * capacity.block_size
        fits = max(1, min(capacity.max_rows, tokens // capacity.max_model_len))
        facts = (
            f"{info.dtype} on {info.device}" + (f", {info.threads} threads" if info.device == "cpu" else ""),
            f"weights {size(info.weight_bytes)}",
            f"KV cache {size(info.kv_bytes)} = {tokens:,} tokens ({info.kv_dtype})",
            f"up to {capacity.max_rows} sequences at once, {fits} of full length ({capacity.max_model_len:,} tokens)",
            f"loaded in {info.load_seconds:.1f} s",
        )
        self._print(f"{name}: " + "; ".join(facts))

    def ready(self, url: str, models: Sequence[str], plain: Sequence[str] = (), *, key: bool) -> None:
        """With examples the first time, in one line after a restart."""
        self._lines.close()
        self._print(f"ready: {url}/v1")
        if self._announced:
            return
        self._announced = True
        self._print(f"page: {url}/  (playground and live dashboard)")
        header = " -H 'Authorization: Bearer KEY'" if key else ""
        if plain:
            self._print(f"its inputs and outputs: curl{header} {url}/v2/models/{plain[0]}")
        if not models:
            return
        self._print(f"""try: curl -N {url}/v1/chat/completions -H 'Content-Type: application/json'{header} \\
  -d '{{"model": "{models[0]}", "stream": true, "messages": [{{"role": "user", "content": "Hello!"}}]}}'""")
        self._print(f"or:  slimserve chat --url {url}")

    def draining(self, open_replies: int, grace: float) -> None:
        self._lines.close()
        if open_replies:
            self._print(f"stopping: {open_replies} open requests have {grace:.0f} s to finish; once more stops at once")

    def close(self) -> None:
        self._lines.close()

    def _print(self, text: str) -> None:
        show(self._console, text)


def _plain_facts(info: EngineInfo, signature: Signature) -> tuple[str, ...]:
    batch = f"batches of up to {signature.max_rows} rows" if signature.batched else "one request a step"
    return (
        f"{info.dtype} on {info.device}, {info.threads} threads",
        f"weights {size(info.weight_bytes)}",
        f"{len(signature.inputs)} inputs, {len(signature.outputs)} outputs, {batch}",
        f"loaded in {info.load_seconds:.1f} s",
    )
