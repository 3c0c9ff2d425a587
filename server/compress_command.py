"""``slimserve compress``: make a model smaller. The toolkit and torch are imported when it is called."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from server.display import ProgressLines, show
from server.errors import UsageError
from server.evaluate_command import PartLines

if TYPE_CHECKING:
    from compression.progress import Progress as Step

EXAMPLES = """
[bold]Examples[/bold]

slimserve compress smollm2-135m --recipe int8-dynamic --out smollm2-int8

slimserve compress ./DeepSeek-V2-Lite --recipe deepseek-mixed --calibration notes/ --out v2-lite-mixed

A run that was stopped goes on where it was when the same command is given again. slimserve serve DIR serves the result.
"""


def compress(
    model: Annotated[str, typer.Argument(help="A name (slimserve list), hf:org/name, a folder or a .gguf file.")],
    recipe: Annotated[str, typer.Option(help="A preset, or a YAML file; --recipe help lists the presets.")],
    out: Annotated[Path | None, typer.Option(help="The engine folder to write; it must not exist.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text that calibrated recipes read: a .txt, .md or .jsonl file, or a folder.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N. auto takes the GPU.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: all cores.")] = None,
    card: Annotated[
        bool, typer.Option(help="Compare the result with its base at the end, as slimserve evaluate does.")
    ] = True,
    hessian_memory: Annotated[
        str, typer.Option(metavar="SIZE", help="For the Hessians of one layer; less takes more passes.")
    ] = "4GiB",
) -> None:
    """Quantize a model into an engine folder."""
    from compression.recipe import load_recipe, preset_names

    if recipe == "help":
        for name in preset_names():
            typer.echo(f"{name:16} {load_recipe(name).description}")
        return
    if out is None:
        raise UsageError("compress needs --out DIR, the engine folder to write")
    from compression.compress import Job, choose_device, use_threads
    from compression.compress import compress as run
    from server.catalog import resolve
    from server.settings import parse_memory

    memory = parse_memory(hessian_memory)
    if not isinstance(memory, int):
        raise UsageError(f"--hessian-memory {hessian_memory!r} is no size such as 4GiB")
    wanted, console = load_recipe(recipe), Console()
    lines = ProgressLines(console)
    try:
        path = resolve(model, lambda what, done, total: lines.update(model, what, done, total))
    finally:
        lines.close()
    use_threads(threads)
    job = Job(
        model=path,
        name=Path(model).name,
        recipe=wanted,
        out=out,
        calibration=calibration,
        device=choose_device(device),
        hessian_bytes=memory,
    )
    bars = StepBars(console)
    try:
        notes = run(job, bars.update, time.monotonic)
    finally:
        bars.close()
    for note in notes:
        show(console, f"note: {note}")
    if card:
        _write_card(out, path, console, job.device, threads)
    show(console, f"wrote {out}; slimserve serve {out} serves it")


class StepBars:
    """What goes on: a bar with the time left on a terminal, a line for each step elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._what = ""
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
        self._bars = Progress(*columns, console=console, transient=True)
        self._task = self._bars.add_task("reading the model", total=None, left="")

    def update(self, step: Step) -> None:
        left = "" if step.seconds_left is None else f"{_duration(step.seconds_left)} left"
        changed, self._what = step.what != self._what, step.what
        if self._console.is_terminal:
            self._bars.start()
            self._bars.update(self._task, description=step.what, completed=step.done, total=step.total, left=left)
        elif changed:
            show(self._console, step.what + (f", {left}" if left else ""))

    def close(self) -> None:
        if self._console.is_terminal:
            self._bars.stop()


def _write_card(folder: Path, base: Path, console: Console, device: str, threads: int | None) -> None:
    from compression.card import quality_of
    from compression.evaluate import Settings, evaluate
    from server.quality import describe

    lines = PartLines(console)
    try:
        written = evaluate(folder, base, folder, Settings(device=device, threads=threads), lines.update)
    finally:
        lines.close()
    show(console, f"{written.model} against {written.base}: {describe(quality_of(written))}")
    show(console, f"card: {folder / 'card.md'}")


def _duration(seconds: float) -> str:
    """For people: 45 s, 12 min, 3 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
