"""Memory that a planned buffer takes for a graph's results, against none shared and against ONNX Runtime's own.

Both sides are asked about the same graph: the file's as it is (the runtime's optimizations off), and the one that the
runtime makes of it and really runs. Weights and inputs are left out on both sides, outputs count. The runtime's figures
are its allocator's own, written into its profile after each kernel: bytes requested and not yet freed, over those
before the first kernel. Scratch memory that a kernel frees before it ends is on neither side.

- unshared: every tensor has its own memory, as long as the graph runs
- floor: no plan of these lifetimes is smaller
- pattern: the runtime's default; it shares buffers by a plan without sizes, and from the second run of a shape on
  reserves one block for all of them
- arena: the same without that block (``enable_mem_pattern`` off)
- freed: no plan at all, each tensor is freed after its last read (``enable_mem_reuse`` off too)
- held: what the arena has taken from the system by then, of the default and of "freed"

    python -m benchmarks.memory_plan [--models minilm recognition magika resnet50] [--batch 8]
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from benchmarks.plain_models import magika_model, recognition_model, write_minilm, write_resnet50
from benchmarks.report import print_header, row, write
from engines.planner.lifetimes import Graph, Step
from engines.planner.onnx_graph import Shape, read_onnx_graph
from engines.planner.plan import plan_memory

RUNS = 3
ITEM_BYTES = {"float": 4, "int64": 8, "int32": 4, "bool": 1, "float16": 2, "uint8": 1, "int8": 1, "double": 8}
LEVELS = onnxruntime.GraphOptimizationLevel
MODES = {"freed": (False, False), "arena": (True, False), "pattern": (True, True)}
"""``enable_mem_reuse`` and ``enable_mem_pattern`` of a session."""


@dataclass(frozen=True)
class Profile:
    """Of one session that ran the same inputs several times."""

    peak: int
    """Most bytes requested at once in the last run."""
    held: int
    """What the arena took from the system for it, over what it held before the first run."""
    seconds: float
    """Of the fastest run, profiling included."""
    kernels: list[dict[str, Any]]
    """The last run's, in order."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--batch", type=int, default=8, help="images of resnet50")
    given = parser.parse_args()
    result: dict[str, Any] = {"machine": print_header("memory plans"), "onnxruntime": onnxruntime.__version__}
    widths = (22, 9, 8, 8, 8, 8, 8, 8, 8, 10, 9, 8)
    heads = ("MB", "unshared", "floor", "ours", "freed", "arena", "pattern", "held", "held fr.")
    print(row((*heads, "/unshared", "/default", "/best"), widths))
    with tempfile.TemporaryDirectory() as folder:
        for name in given.models:
            path, shapes = CASES[name](Path(folder))
            if name == "resnet50":
                shapes = {"images": (given.batch, 3, 224, 224)}
            for kind, figures in measure(path, shapes, Path(folder)).items():
                result[f"{name} {kind}"] = {"shapes": shapes, **figures}
                print(row(_cells(f"{name} {kind}", figures), widths), flush=True)
    print(f"wrote {write('memory_plan', result)}")


def measure(path: Path, shapes: dict[str, Shape], folder: Path) -> dict[str, dict[str, float]]:
    """Bytes, for the file's graph and for the optimized one."""
    feeds = make_feeds(path, shapes)
    optimized = folder / f"optimized-{path.name}"
    options = session_options(LEVELS.ORT_ENABLE_ALL)
    options.optimized_model_filepath = str(optimized)
    onnxruntime.InferenceSession(path, options)
    name_nodes(optimized)
    return {
        "as it is": compare(path, feeds, folder, read_onnx_graph(path, shapes)),
        "optimized": compare(optimized, feeds, folder, None),
    }


def compare(path: Path, feeds: dict[str, Any], folder: Path, graph: Graph | None) -> dict[str, float]:
    """Without a graph, the shapes are those that the runtime reports."""
    profiles = {mode: profile(path, feeds, folder, *switches) for mode, switches in MODES.items()}
    plan = plan_memory(graph or executed_graph(path, profiles["arena"]))
    best = min(each.peak for each in profiles.values())
    return {
        "unshared": plan.unshared,
        "floor": plan.floor,
        "ours": plan.peak,
        **{f"runtime_{mode}": each.peak for mode, each in profiles.items()},
        **{f"held_{mode}": each.held for mode, each in profiles.items()},
        **{f"seconds_{mode}": round(each.seconds, 5) for mode, each in profiles.items()},
        "saved_against_unshared": round(1 - plan.peak / plan.unshared, 4),
        "saved_against_default": round(1 - plan.peak / profiles["pattern"].peak, 4),
        "saved_against_best": round(1 - plan.peak / best, 4),
    }


def session_options(level: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = level
    options.log_severity_level = 3
    return options


def profile(path: Path, feeds: dict[str, Any], folder: Path, reuse: bool, pattern: bool) -> Profile:
    """Run the graph as the file has it, and read the allocator's figures."""
    options = session_options(LEVELS.ORT_DISABLE_ALL)
    options.enable_mem_reuse, options.enable_mem_pattern = reuse, pattern
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    session = onnxruntime.InferenceSession(path, options)
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        session.run(None, feeds)
        seconds.append(time.perf_counter() - start)
    kernels = [event for event in json.loads(Path(session.end_profiling()).read_text()) if _is_kernel(event)]
    first, last = kernels[0]["args"], kernels[-(len(kernels) // RUNS) :]
    before = int(first["mem_bytes_requested_in_use"]) - int(first["mem_requested_in_use_delta"])
    held = int(first["mem_arena_held"]) - int(first["mem_arena_held_delta"])
    return Profile(
        peak=max(int(event["args"]["mem_bytes_requested_in_use"]) for event in last) - before,
        seconds=min(seconds),
        held=int(last[-1]["args"]["mem_arena_held"]) - held,
        kernels=last,
    )


def executed_graph(path: Path, seen: Profile) -> Graph:
    """The graph in the order in which it was run, with the sizes that its kernels reported."""
    model = onnx.load(path, load_external_data=False)
    nodes = {node.name: node for node in model.graph.node}
    steps, sizes = [], {}
    for event in seen.kernels:
        node = nodes[event["name"].removesuffix("_kernel_time")]
        outputs = tuple(filter(None, node.output))
        for name, shape in zip(outputs, event["args"]["output_type_shape"], strict=True):
            ((kind, extents),) = shape.items()
            sizes[name] = ITEM_BYTES[kind] * math.prod(extents)
        steps.append(Step(name=node.name, op=node.op_type, inputs=tuple(node.input), outputs=outputs))
    return Graph(steps=tuple(steps), sizes=sizes, outputs=frozenset(each.name for each in model.graph.output))


def name_nodes(path: Path) -> None:
    """Names of their own for all nodes: the profile tells by name which kernel ran."""
    model = onnx.load(path)
    for at, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{at}"
    onnx.save(model, path)


def make_feeds(path: Path, shapes: dict[str, Shape]) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(path, session_options(LEVELS.ORT_DISABLE_ALL))
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}
    return {each.name: np.ones(shapes[each.name], kinds[each.type]) for each in session.get_inputs()}


def _is_kernel(event: dict[str, Any]) -> bool:
    return "mem_bytes_requested_in_use" in event.get("args", {})


def _cells(name: str, figures: dict[str, float]) -> tuple[str, ...]:
    runtime = (*(f"runtime_{mode}" for mode in MODES), "held_pattern", "held_freed")
    shares = ("saved_against_unshared", "saved_against_default", "saved_against_best")
    sizes = (f"{figures[key] / 1e6:.2f}" for key in ("unshared", "floor", "ours", *runtime))
    return (name, *sizes, *(f"{-figures[key]:+.1%}" for key in shares))


def _minilm(folder: Path) -> tuple[Path, dict[str, Shape]]:
    write_minilm(folder / "minilm.onnx")
    names = ("input_ids", "attention_mask", "token_type_ids")
    return folder / "minilm.onnx", dict.fromkeys(names, (64, 128))


def _resnet50(folder: Path) -> tuple[Path, dict[str, Shape]]:
    write_resnet50(folder / "resnet50.onnx")
    return folder / "resnet50.onnx", {}


CASES: dict[str, Callable[[Path], tuple[Path, dict[str, Shape]]]] = {
    "minilm": _minilm,
    "recognition": lambda folder: (recognition_model(), {"x": (1, 3, 48, 320)}),
    "magika": lambda folder: (magika_model(), {"bytes": (1, 2048)}),
    "resnet50": _resnet50,
}


if __name__ == "__main__":
    main()
