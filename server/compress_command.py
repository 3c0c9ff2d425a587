"""``slimserve compress``: make a model smaller. The toolkit and torch are imported when it is called."""

from __future__ import annotations

import time
from dataclasses import astuple
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from server.display import ProgressLines, show
from server.errors import UsageError

CPU_WINDOWS = 64
"""Of the text that the card is measured on, on a CPU; slimserve evaluate takes all, which is some minutes more."""
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
    from compression.compress import Job
    from compression.compress import compress as run
    from compression.device import choose_device, use_threads
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
    try:
        notes = run(job, lambda now: lines.step(*astuple(now)), time.monotonic)
    finally:
        lines.close()
    for note in notes:
        show(console, f"note: {note}")
    if card:
        _write_card(out, path, console, job.device, threads)
    show(console, f"wrote {out}; slimserve serve {out} serves it")


def _write_card(folder: Path, base: Path, console: Console, device: str, threads: int | None) -> None:
    from compression.card import quality_of
    from compression.evaluate import Settings, evaluate
    from server.quality import describe

    settings = Settings(windows=CPU_WINDOWS if device == "cpu" else None, device=device, threads=threads)
    lines = ProgressLines(console)
    try:
        written = evaluate(folder, base, folder, settings, lambda now: lines.step(*astuple(now)), time.monotonic)
    finally:
        lines.close()
    show(console, f"{written.model} against {written.base}: {describe(quality_of(written))}")
    show(console, f"card: {folder / 'card.md'}")
