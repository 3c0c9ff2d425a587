"""What is looked for in an ONNX file before ONNX Runtime opens it: files outside its folder, foreign operators."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from engines.onnx.protobuf import DamagedMessage, fields
from engines.protocol import EngineLoadError

LARGEST_FILE = 2 << 30
"""Bytes: a protobuf message can be no longer. What is larger has its weights in files beside it."""
DEEPEST = 32
"""Graphs inside graphs (If, Loop, Scan)."""
DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
"""Of the operators that ONNX Runtime brings itself."""

# Field numbers of onnx.proto, version 1.
_MODEL_GRAPH, _MODEL_FUNCTIONS = 7, 25
_GRAPH_NODES, _GRAPH_TENSORS, _GRAPH_SPARSE = 1, 5, 15
_NODE_OPERATOR, _NODE_ATTRIBUTES, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS, _ATTRIBUTE_SPARSE = (5, 10), (6, 11), (22, 23)
_TENSOR_EXTERNAL = 13
_FUNCTION_NODES, _FUNCTION_DOMAIN = 7, 10
_ENTRY_KEY, _ENTRY_VALUE = 1, 2


@dataclass(slots=True)
class _Found:
    nodes: int = 0
    external: set[str] = field(default_factory=set)
    operators: set[tuple[str, str]] = field(default_factory=set)
    """(domain, operator)"""
    function_domains: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class CheckedFile:
    """A file that may be opened."""

    path: Path
    weight_bytes: int
    """Of the file and of those beside it that hold its weights."""
    operators: frozenset[str]


def check_onnx(path: Path) -> CheckedFile:
    """Raises EngineLoadError for a file that is damaged, names data outside its folder, or needs foreign operators."""
    found = _read(path)
    foreign = sorted(each for each in found.operators if each[0] not in DOMAINS | found.function_domains)
    if foreign:
        domain, operator = foreign[0]
        raise EngineLoadError(
            f"{path.name} needs the custom operator {operator[:60]} of the domain {domain[:60]!r}; code that is not "
            "part of ONNX Runtime is never loaded, so export the model with standard operators"
        )
    files = [_beside(path, location) for location in sorted(found.external)]
    return CheckedFile(
        path=path,
        weight_bytes=sum(each.stat().st_size for each in (path, *files)),
        operators=frozenset(operator for _, operator in found.operators),
    )


def _read(path: Path) -> _Found:
    found = _Found()
    try:
        size = path.stat().st_size
        if size == 0:
            raise EngineLoadError(f"{path.name} is empty")
        if size > LARGEST_FILE:
            raise EngineLoadError(f"{path.name} is larger than 2 GB, which the format does not allow")
        with path.open("rb") as file:
            _read_model(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), found)
    except OSError as error:
        raise EngineLoadError(f"{path.name} cannot be read: {error.strerror}") from error
    except (DamagedMessage, UnicodeDecodeError) as error:
        raise EngineLoadError(f"{path.name} is no ONNX file, or it is damaged: {error}") from None
    if not found.nodes:
        raise EngineLoadError(f"{path.name} is no ONNX file, or it computes nothing")
    return found


def _messages(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The fields that are bytes: text, or messages themselves."""
    for number, value in fields(message):
        if isinstance(value, memoryview):
            yield number, value


def _read_model(model: memoryview, found: _Found) -> None:
    for number, value in _messages(model):
        if number == _MODEL_GRAPH:
            _read_graph(value, found, 0)
        elif number == _MODEL_FUNCTIONS:
            for inner, part in _messages(value):
                if inner == _FUNCTION_NODES:
                    _read_node(part, found, 0)
                elif inner == _FUNCTION_DOMAIN:
                    found.function_domains.add(_text(part))


def _read_graph(graph: memoryview, found: _Found, depth: int) -> None:
    if depth > DEEPEST:
        raise DamagedMessage(f"graphs are nested deeper than {DEEPEST}")
    for number, value in _messages(graph):
        if number == _GRAPH_NODES:
            found.nodes += 1
            _read_node(value, found, depth)
        elif number == _GRAPH_TENSORS:
            _read_tensor(value, found)
        elif number == _GRAPH_SPARSE:
            _read_sparse(value, found)


def _read_node(node: memoryview, found: _Found, depth: int) -> None:
    domain = operator = ""
    for number, value in _messages(node):
        if number == _NODE_DOMAIN:
            domain = _text(value)
        elif number == _NODE_OPERATOR:
            operator = _text(value)
        elif number == _NODE_ATTRIBUTES:
            _read_attribute(value, found, depth)
    found.operators.add((domain, operator))


def _read_attribute(attribute: memoryview, found: _Found, depth: int) -> None:
    for number, value in _messages(attribute):
        if number in _ATTRIBUTE_TENSORS:
            _read_tensor(value, found)
        elif number in _ATTRIBUTE_GRAPHS:
            _read_graph(value, found, depth + 1)
        elif number in _ATTRIBUTE_SPARSE:
            _read_sparse(value, found)


def _read_sparse(sparse: memoryview, found: _Found) -> None:
    for _, value in _messages(sparse):
        _read_tensor(value, found)


def _read_tensor(tensor: memoryview, found: _Found) -> None:
    for number, value in _messages(tensor):
        if number == _TENSOR_EXTERNAL:
            entry = {inner: _text(part) for inner, part in _messages(value)}
            if entry.get(_ENTRY_KEY) == "location":
                found.external.add(entry.get(_ENTRY_VALUE, ""))


def _text(value: memoryview) -> str:
    return bytes(value).decode()


def _beside(path: Path, location: str) -> Path:
    """The file that holds external weights: in the model's folder, also after all links are followed."""
    shown = location[:100]
    relative = PurePosixPath(location)
    outside = EngineLoadError(
        f"{path.name} keeps weights in {shown!r}, which is outside its folder; put them beside it and export it again"
    )
    if not location or relative.is_absolute() or PureWindowsPath(location).drive or ".." in relative.parts:
        raise outside
    if "\\" in location or "\0" in location:
        raise outside
    folder = path.resolve().parent
    file = (folder / relative).resolve()
    if not file.is_relative_to(folder):
        raise outside
    if not file.is_file():
        raise EngineLoadError(f"{path.name} keeps weights in {shown!r}, which is missing; copy that file too")
    return file
