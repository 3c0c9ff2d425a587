"""What is refused before ONNX Runtime opens a file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.onnx.checks import check_onnx
from engines.onnx.protobuf import DamagedMessage, fields
from engines.protocol import EngineLoadError
from tests.plain_models import DOUBLE, write_graph

onnx = pytest.importorskip("onnx")


def with_external_weights(folder: Path, location: str) -> Path:
    """A graph whose one weight is said to be in another file."""
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    weight.ClearField("float_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "w"], ["y"])],
        "external",
        [value("x", onnx.TensorProto.FLOAT, ["N", 3])],
        [value("y", onnx.TensorProto.FLOAT, ["N", 3])],
        [weight],
    )
    path = folder / "model.onnx"
    path.write_bytes(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]).SerializeToString()
    )
    return path


def test_a_plain_file_passes(tmp_path: Path) -> None:
    path = write_graph(tmp_path, DOUBLE)
    found = check_onnx(path)
    assert found.operators == {"Add"}
    assert found.weight_bytes == path.stat().st_size


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "a/../../secret.bin", "C:\\secret", "..", ""])
def test_weights_outside_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(12))
    with pytest.raises(EngineLoadError, match="outside its folder"):
        check_onnx(with_external_weights(folder, location))


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(12))
    os.symlink(tmp_path / "secret.bin", folder / "weights.bin")
    with pytest.raises(EngineLoadError, match="outside its folder"):
        check_onnx(with_external_weights(folder, "weights.bin"))


def test_weights_beside_the_file_count(tmp_path: Path) -> None:
    path = with_external_weights(tmp_path, "weights.bin")
    with pytest.raises(EngineLoadError, match="is missing"):
        check_onnx(path)
    (tmp_path / "weights.bin").write_bytes(bytes(12))
    assert check_onnx(path).weight_bytes == path.stat().st_size + 12


def test_external_weights_inside_a_branch_are_found(tmp_path: Path) -> None:
    inner = onnx.load(with_external_weights(tmp_path, "../secret.bin"), load_external_data=False).graph
    del inner.input[:]
    branch = onnx.helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)
    value = onnx.helper.make_tensor_value_info
    outputs = [value("z", onnx.TensorProto.FLOAT, ["N", 3])]
    graph = onnx.helper.make_graph([branch], "g", [value("c", onnx.TensorProto.BOOL, [])], outputs)
    path = tmp_path / "branch.onnx"
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(EngineLoadError, match="outside its folder"):
        check_onnx(path)


def test_a_custom_operator_is_refused_by_name(tmp_path: Path) -> None:
    path = write_graph(tmp_path, DOUBLE)
    model = onnx.load(path)
    model.graph.node[0].domain = "evil.ops"
    onnx.save(model, path)
    with pytest.raises(EngineLoadError, match=r"custom operator Add of the domain 'evil\.ops'"):
        check_onnx(path)


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK\x03\x04 a pickle in a zip", bytes(100), b"\xff" * 64])
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(EngineLoadError, match=r"model\.onnx is"):
        check_onnx(path)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    try:
        found = list(fields(memoryview(content)))
    except DamagedMessage:
        return
    assert all(number > 0 or isinstance(value, int) for number, value in found)


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    whole = write_graph(tmp_path, DOUBLE).read_bytes()
    path = tmp_path / "cut.onnx"
    for size in range(1, len(whole)):
        path.write_bytes(whole[:size])
        try:
            check_onnx(path)
        except EngineLoadError:
            continue
        # What is cut between two fields is a message still; ONNX Runtime decides.
        assert list(fields(memoryview(whole[:size])))
