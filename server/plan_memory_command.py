"""``slimserve plan-memory``: what an ONNX graph's results take. The planner and onnx are imported when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from server.display import columns, show, size
from server.errors import UsageError

if TYPE_CHECKING:
    from engines.planner.plan import MemoryPlan

EXAMPLES = """
[bold]Examples[/bold]

slimserve plan-memory model.onnx --shape images=8,3,224,224

slimserve plan-memory minilm.onnx --shape input_ids=64,128 --shape attention_mask=64,128 --shape token_type_ids=64,128
"""
LARGEST = 8


def plan_memory(
    model: Annotated[Path, typer.Argument(help="An .onnx file; weights outside it are not opened.")],
    shape: Annotated[
        list[str] | None, typer.Option(metavar="NAME=1,3,224,224", help="Of each input that has free axes.")
    ] = None,
) -> None:
    """Plan one buffer for all results of a graph: its size, and what lives when it is largest."""
    try:
        from engines.planner.onnx_graph import read_onnx_graph, read_shapes
    except ModuleNotFoundError as error:
        raise UsageError(f'plan-memory needs the package {error.name}: pip install "slimserve[onnx]"') from error
    from engines.planner.plan import live_bytes
    from engines.planner.plan import plan_memory as plan_graph

    graph = read_onnx_graph(model, read_shapes(shape or []))
    plan = plan_graph(graph)
    console = Console()
    for line in columns(
        [
            ("results of the graph, weights and inputs apart", "bytes", "of unshared"),
            *(
                (what, size(nbytes), f"{nbytes / max(1, plan.unshared):.1%}")
                for what, nbytes in (
                    ("every tensor with its own memory", plan.unshared),
                    ("most that lives at once", plan.floor),
                    ("one planned buffer, replayed", plan.peak),
                )
            ),
        ]
    ):
        show(console, line)
    at = live_bytes(plan.storages).index(plan.floor)
    name = graph.steps[at].op if at < len(graph.steps) else "the end"
    show(console, f"{len(graph.steps)} nodes, {len(plan.storages)} storages; largest at node {at}, {name}:")
    for line in columns(_alive(plan, at)):
        show(console, line)


def _alive(plan: MemoryPlan, at: int) -> list[tuple[str, str, str]]:
    found = [
        (storage.nbytes, offset, storage)
        for storage, offset in zip(plan.storages, plan.offsets, strict=True)
        if storage.first <= at <= storage.last
    ]
    found.sort(key=lambda entry: -entry[0])
    return [
        ("tensors", "bytes", "at offset"),
        *((_named(storage.tensors), size(nbytes), str(offset)) for nbytes, offset, storage in found[:LARGEST]),
    ]


def _named(tensors: tuple[str, ...]) -> str:
    more = f" and {len(tensors) - 1} over it" if len(tensors) > 1 else ""
    return f"{tensors[0][:60]}{more}"
