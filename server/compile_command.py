"""``slimserve compile``: a model to machine code. Torch and the compiler are imported when it is called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from server.display import show, size
from server.errors import UsageError

if TYPE_CHECKING:
    from engines.compiled.engine import CompiledEngine

EXAMPLES = """
[bold]Examples[/bold]

slimserve compile ./all-MiniLM-L6-v2

slimserve compile ./all-MiniLM-L6-v2 --target cuda --dtype fp16

slimserve compile resnet50.onnx --shape images=64,3,224,224

The package is kept in the cache (SLIMSERVE_HOME) and found there by the model's contents; compiling again is quick.
"""


def compile_model(
    model: Annotated[Path, typer.Argument(help="Folder of a BERT-like encoder, or an .onnx file.")],
    target: Annotated[Literal["cpu", "cuda"], typer.Option(help="Compiled for the processor or GPU that is here.")] = (
        "cpu"
    ),
    dtype: Annotated[Literal["fp32", "fp16", "bf16"], typer.Option(help="Of weights and activations.")] = "fp32",
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=64,512", help="Of an ONNX file's inputs: each free axis as long as it may be."),
    ] = None,
) -> None:
    """Compile a model ahead of time, for batches of any size, and compare it with the model itself."""
    from engines.compiled.agreement import compare
    from engines.compiled.engine import CompiledEngine

    console = Console()

    def report(what: str) -> None:
        show(console, f"{model.name}: {what}")

    if model.suffix == ".onnx":
        engine = _compile_onnx(model, shape or [], target, dtype, report)
    else:
        engine = CompiledEngine.load(model, target, dtype, report)
    record = engine.record
    show(
        console,
        f"{record.source}: {record.dtype} on {record.target}, {record.kernels} kernels compiled in {record.seconds} s, "
        f"{size(engine.package_bytes)}; for {_ranges(record.axes)}",
    )
    if model.suffix == ".onnx":
        return
    found = compare(engine, model)
    show(
        console, f"against the model in fp32: largest difference {found.largest:.1e}, lowest cosine {found.cosine:.6f}"
    )


def _compile_onnx(
    model: Path,
    shapes: list[str],
    target: Literal["cpu", "cuda"],
    dtype: Literal["fp32", "fp16", "bf16"],
    report: Callable[[str], None],
) -> CompiledEngine:
    try:
        from engines.planner.onnx_graph import read_shapes
    except ModuleNotFoundError as error:
        raise UsageError(f'an ONNX file needs the package {error.name}: pip install "slimserve[onnx]"') from error
    from engines.compiled.engine import CompiledEngine

    return CompiledEngine.load_onnx(model, read_shapes(shapes), target, dtype, report)


def _ranges(axes: dict[str, tuple[int, int]]) -> str:
    return ", ".join(f"{low} to {high} {axis}" for axis, (low, high) in axes.items())
