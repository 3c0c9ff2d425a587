"""``slimserve plan-memory`` and ``compile`` as a user types them."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner

from engines.protocol import EngineLoadError
from server.cli import app
from server.errors import UsageError


def write_chain(path: Path) -> Path:
    """Three transposes of 4,096 bytes a batch row: unshared three buffers, planned two."""
    nodes = [helper.make_node("Transpose", [a], [b], perm=[0, 2, 1]) for a, b in zip("xab", "aby", strict=True)]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, ["n", 32, 32])], [value("y", TensorProto.FLOAT, None)]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def test_plan_memory_prints_peaks_and_what_lives_then(tmp_path: Path) -> None:
    model = write_chain(tmp_path / "chain.onnx")
    answer = CliRunner().invoke(app, ["plan-memory", str(model), "--shape", "x=2,32,32"], catch_exceptions=False)
    lines = [line.split("  ") for line in answer.output.splitlines()]
    sizes = {cells[0]: [cell.strip() for cell in cells[1:] if cell.strip()] for cells in lines}
    assert sizes["every tensor with its own memory"] == ["24.6 kB", "100.0%"]
    assert sizes["most that lives at once"] == ["16.4 kB", "66.7%"]
    assert sizes["one planned buffer, replayed"] == ["16.4 kB", "66.7%"]
    assert "3 nodes, 3 storages; largest at node 1, Transpose:" in answer.output
    assert "8192" in answer.output


def test_plan_memory_without_a_shape_says_which(tmp_path: Path) -> None:
    model = write_chain(tmp_path / "chain.onnx")
    with pytest.raises(EngineLoadError, match=r"give its shape: --shape x=\?,32,32"):
        CliRunner().invoke(app, ["plan-memory", str(model)], catch_exceptions=False)


def test_plan_memory_without_onnx_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "engines.planner.onnx_graph", raising=False)
    with pytest.raises(UsageError, match=r"slimserve\[onnx\]"):
        CliRunner().invoke(app, ["plan-memory", str(tmp_path / "m.onnx")], catch_exceptions=False)


def test_compile_refuses_a_package_and_an_unknown_folder(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(b"PK")
    with pytest.raises(EngineLoadError, match="never opened"):
        CliRunner().invoke(app, ["compile", str(tmp_path / "model.pt2")], catch_exceptions=False)
    with pytest.raises(EngineLoadError, match=r"has no config\.json"):
        CliRunner().invoke(app, ["compile", str(tmp_path)], catch_exceptions=False)
