"""Which way imports point. The rules are the architecture page's; a breach or a cycle fails here."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("server", "engines", "compression")

ALLOWED: dict[str, tuple[str, ...]] = {
    "engines": ("engines",),
    "engines.tensors": (),
    "engines.protocol": ("engines.tensors",),
    "engines.kernels": ("engines.kernels", "engines.protocol"),
    "engines.quant": (
        "engines.quant",
        "engines.kernels",
        "engines.protocol",
        "engines.gguf_",
        "engines.manifest",
        "engines.quantization",
    ),
    "compression": ("compression", "engines", "server.text", "server.scheduler"),
    "server": ("server", "engines"),
    "server.compress_command": ("server", "engines", "compression"),
    "server.evaluate_command": ("server", "engines", "compression"),
    "server.errors": (),
    "server.scheduler": ("server.scheduler", "server.worker.wire", "engines.protocol"),
    "server.worker.wire": ("engines.protocol",),
    "server.requests": ("server.errors", "engines.protocol"),
    "server.infer": ("server.infer", "server.errors", "engines.tensors"),
    "server.text": ("server.text", "server.errors", "engines."),
    "server.lane": ("server.scheduler.deadlines", "server.requests", "server.worker.wire"),
    "server.admission": ("server.lane", "server.errors", "server.requests", "server.worker.wire", "engines.protocol"),
    "server.metric_table": (),
    "server.tenants": ("server.errors", "server.worker.wire"),
    "server.quotas": ("server.errors", "server.tenants"),
    "server.metric_families": ("server.metric_table",),
    "server.slo": ("server.errors", "server.requests", "engines.protocol"),
    "server.metrics": (
        "server.metric_families",
        "server.slo",
        "server.requests",
        "server.worker.wire",
        "server.worker.watch",
        "engines.protocol",
    ),
}
"""Of the project's own modules each may import only those; the longest matching entry counts."""

FORBIDDEN: dict[str, tuple[str, ...]] = {
    "engines.models": ("engines.generation",),
    "engines.quant": ("engines.models", "engines.generation"),
    "engines.kernels": ("engines.quant", "engines.models", "engines.generation"),
    "server": ("engines.generation", "engines.models", "engines.quant", "engines.kernels", "torch", "transformers"),
    "server.api": ("server.worker", "server.scheduler", "server.app", "server.cli", "server.settings"),
    "server.worker": ("server.api", "server.app", "server.cli", "server.settings", "server.catalog"),
}
"""These may not be imported, in a function or at the top; every matching entry counts."""


def module_files() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = module_files()


def imports(path: Path, module: str) -> Iterator[str]:
    """Full names of everything that a file imports, wherever the import stands, type checking apart."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in FILES else base


GRAPH = {module: set(imports(path, module)) for module, path in FILES.items()}


def below(name: str, prefix: str) -> bool:
    """``engines.gguf_`` stands for every module that begins so, ``engines.`` for all below."""
    return name == prefix or name.startswith(prefix if prefix.endswith((".", "_")) else f"{prefix}.")


def test_every_module_is_read() -> None:
    assert len(FILES) > 40
    assert "server.worker.main" in GRAPH
    assert "server.scheduler.core" in GRAPH["server.worker.loop"]


@pytest.mark.parametrize("module", sorted(FILES))
def test_module_imports_only_what_its_layer_may(module: str) -> None:
    own = [name for name in GRAPH[module] if name.split(".")[0] in PACKAGES]
    rule = max((prefix for prefix in ALLOWED if below(module, prefix)), key=len)
    wrong = [name for name in own if not any(below(name, allowed) for allowed in ALLOWED[rule])]
    for prefix, forbidden in FORBIDDEN.items():
        if below(module, prefix):
            wrong += [name for name in GRAPH[module] if any(below(name, each) for each in forbidden)]
    assert not wrong, f"{module} imports {', '.join(sorted(wrong))}"


def test_there_is_no_import_cycle() -> None:
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in sorted(GRAPH[module] & FILES.keys()):
                if name != module:
                    visit(name, [*path, module])
            done.add(module)

    for module in sorted(FILES):
        visit(module, [])


def test_importing_all_of_server_leaves_heavy_libraries_unloaded() -> None:
    modules = [module for module in FILES if below(module, "server")]
    script = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print([name for name in ('torch', 'transformers', 'onnxruntime', 'tensorrt', 'pycuda', 'ray') "
        "if name in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.stdout.strip() == "[]", answer.stderr
