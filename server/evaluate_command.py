"""The command ``slimserve evaluate``. Torch comes with the package that does the work, so that is imported late."""

from __future__ import annotations

import time
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from server.display import ProgressLines, show
from server.errors import UsageError

ALL = "all"
EXAMPLES = """
[bold]Examples[/bold]

slimserve evaluate ./small --against smollm2-135m

slimserve evaluate ./small --against ./base --windows 64 --text wiki.txt --questions gsm8k.jsonl
"""


def evaluate(
    model: Annotated[str, typer.Argument(help="What slimserve compress wrote, any model folder or .gguf file.")],
    against: Annotated[str, typer.Option(help="The model that it was made of: a name, a folder or a .gguf file.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the card. Default: the engine folder itself, else NAME-card here.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text for perplexity. Default: WikiText-2, if here.")] = None,
    windows: Annotated[
        str, typer.Option(metavar="N|all", help="Windows of the text, evenly spread; fewer take less time.")
    ] = ALL,
    questions: Annotated[
        Path | None, typer.Option(help="Questions as GSM8K has them, .jsonl. Default: GSM8K, if here.")
    ] = None,
    question_count: Annotated[int, typer.Option(min=0, max=2000, help="Answers to generate; 0: none.")] = 48,
    speed: Annotated[bool, typer.Option(help="Measure the speed in the engine too.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of activations: auto, float32, bfloat16 or float16.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: measured.")] = None,
) -> None:
    """Compare a model with its base: quality with confidence intervals, speed, size. Writes card.md and card.json."""
    from compression.card import quality_of
    from compression.evaluate import Settings
    from compression.evaluate import evaluate as run
    from engines.engine_folder import FILE_NAME
    from server.catalog import resolve
    from server.quality import describe

    console = Console()
    lines = ProgressLines(console)
    try:
        own, base = (resolve(name, partial(lines.update, name)) for name in (model, against))
    finally:
        lines.close()
    folder = out or (own if (own / FILE_NAME).is_file() else Path(f"{own.name.removesuffix('.gguf')}-card"))
    settings = Settings(
        text=text,
        questions=questions,
        windows=_windows(windows),
        question_count=question_count,
        speed=speed,
        device=device,
        dtype=dtype,
        threads=threads,
    )
    try:
        card = run(own, base, folder, settings, lambda now: lines.step(*astuple(now)), time.monotonic)
    finally:
        lines.close()
    show(console, f"{card.model} against {card.base}: {describe(quality_of(card))}")
    show(console, f"card: {folder / 'card.md'}")


def _windows(value: str) -> int | None:
    """None takes all."""
    if value == ALL:
        return None
    if not value.isdecimal() or not int(value):
        raise UsageError("--windows: a number from 1 up, or all")
    return int(value)
