"""Which bytes of a graph's intermediate results live from when to when. Plain data: no ONNX, no tensor library."""

from __future__ import annotations

from dataclasses import dataclass

VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"})
"""The output is the input's bytes under another shape."""
UNARY = "Abs Ceil Clip Elu Erf Exp Floor Gelu HardSigmoid HardSwish LeakyRelu Log Neg Reciprocal Relu Round Selu"
CURVES = "Sigmoid Softplus Sqrt Tanh QuickGelu FastGelu BiasGelu"
BINARY = "Add Div Max Min Mul Pow PRelu Sub"
IN_PLACE = frozenset(f"{UNARY} {CURVES} {BINARY}".split())
"""Each element of the output needs, of an input of the same size, only the element at its own place."""
SUMMED = 3
"""Place of an input that a fused convolution adds its result to; a plain one has no such input."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One operation, in the order in which the graph runs."""

    name: str
    op: str
    inputs: tuple[str, ...]
    """Empty where an optional one is left out."""
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """``sizes``: bytes of each step's outputs. What no step makes (inputs, weights) belongs to somebody else."""

    steps: tuple[Step, ...]
    sizes: dict[str, int]
    outputs: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Bytes that one tensor takes, or several that share them: views, and results written over their input."""

    tensors: tuple[str, ...]
    nbytes: int
    first: int
    """Step that writes it first."""
    last: int
    """Last step that reads it; the number of steps where the caller does."""


def storages(graph: Graph) -> list[Storage]:
    """All storages of a graph, in order of ``first``; ones of no bytes are left out."""
    last = last_uses(graph)
    owner: dict[str, int] = {}
    members: list[list[str]] = []
    for at, step in enumerate(graph.steps):
        for index, output in enumerate(step.outputs):
            shared = _shared(graph, step, at, owner, members, last) if index == 0 else None
            if shared is None:
                shared = len(members)
                members.append([])
            owner[output] = shared
            members[shared].append(output)
    first = {output: at for at, step in enumerate(graph.steps) for output in step.outputs}
    found = [
        Storage(
            tensors=tuple(names),
            nbytes=max(graph.sizes[name] for name in names),
            first=min(first[name] for name in names),
            last=max(last[name] for name in names),
        )
        for names in members
    ]
    return [storage for storage in found if storage.nbytes]


def last_uses(graph: Graph) -> dict[str, int]:
    """The last step that reads each tensor; the step that makes it where none does."""
    last: dict[str, int] = {}
    for at, step in enumerate(graph.steps):
        last.update(dict.fromkeys((*step.inputs, *step.outputs), at))
    last.update(dict.fromkeys(graph.outputs, len(graph.steps)))
    return last


def _shared(
    graph: Graph, step: Step, at: int, owner: dict[str, int], members: list[list[str]], last: dict[str, int]
) -> int | None:
    """The storage whose bytes the step's first output takes over; None where it needs its own."""
    output = step.outputs[0]
    if step.op in VIEWS:
        source = owner.get(step.inputs[0])
        return source if source is not None and graph.sizes[output] == graph.sizes[step.inputs[0]] else None
    fused = step.op in ("Conv", "FusedConv")
    if step.op not in IN_PLACE and not fused:
        return None
    for name in dict.fromkeys(step.inputs[SUMMED:] if fused else step.inputs):
        source = owner.get(name)
        if source is None or graph.sizes[name] != graph.sizes[output]:
            continue
        dead = all(last[member] <= at for member in members[source])
        # Another shape of the same bytes would be read after they were overwritten.
        alone = all(owner.get(other) != source for other in step.inputs if other != name)
        if dead and alone:
            return source
    return None
