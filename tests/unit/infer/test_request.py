"""What is refused of an infer request, and what a worker gets of one that is right."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from engines.tensors import Signature, TensorSpec, pack, pack_strings, unpack
from server.errors import InvalidRequest
from server.infer.answer import write_answer
from server.infer.request import read_infer

X = TensorSpec(name="x", datatype="FP32", shape=(-1, 2), axes=("N", ""))
IDS = TensorSpec(name="ids", datatype="INT64", shape=(-1, -1), axes=("N", "L"))
MASK = TensorSpec(name="mask", datatype="INT64", shape=(-1, -1), axes=("N", "L"))
Y = TensorSpec(name="y", datatype="FP32", shape=(-1, 2), axes=("N", ""))
Z = TensorSpec(name="z", datatype="FP32", shape=(-1, 2), axes=("N", ""))
ONE = Signature(inputs=(X,), outputs=(Y, Z), batched=True, max_rows=4)
ENCODER = Signature(inputs=(IDS, MASK), outputs=(Y,), batched=True, max_rows=4, padded=("L",))


def body(*inputs: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps({"inputs": inputs, **fields}).encode()


def x(**fields: Any) -> dict[str, Any]:
    return {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2], **fields}


def binary(message: dict[str, Any], tail: bytes) -> tuple[bytes, str]:
    head = json.dumps(message).encode()
    return head + tail, str(len(head))


def bare(**fields: Any) -> dict[str, Any]:
    found = x(**fields)
    del found["data"]
    return found


def test_json_and_binary_give_the_same_bytes() -> None:
    flat = read_infer(body(x(shape=[2, 2], data=[1, 2, 3, 4])), None, ONE)
    nested = read_infer(body(x(shape=[2, 2], data=[[1, 2], [3, 4]])), None, ONE)
    message = {"inputs": [bare(shape=[2, 2], parameters={"binary_data_size": 16})]}
    sent = read_infer(*binary(message, struct.pack("<4f", 1, 2, 3, 4)), ONE)
    assert flat.inputs == nested.inputs == sent.inputs
    assert (sent.rows, sent.bucket, sent.outputs) == (2, 0, {"y": False, "z": False})
    ((tensor,), wanted) = unpack(sent.inputs)
    assert (bytes(tensor.data), tensor.shape, wanted) == (struct.pack("<4f", 1, 2, 3, 4), (2, 2), [])


def test_lengths_choose_the_bucket() -> None:
    def ask(length: int) -> int:
        inputs = [
            {"name": name, "shape": [1, length], "datatype": "INT64", "data": [1] * length} for name in ("mask", "ids")
        ]
        return read_infer(body(*inputs), None, ENCODER).bucket

    assert ask(3) == ask(8) == 8
    assert ask(9) == 16


def test_outputs_are_chosen_one_by_one() -> None:
    asked = read_infer(body(x(), outputs=[{"name": "z", "parameters": {"binary_data": True}}]), None, ONE)
    assert asked.outputs == {"z": True}
    assert unpack(asked.inputs)[1] == ["z"]
    assert read_infer(body(x(), parameters={"binary_data_output": True}), None, ONE).outputs == {"y": True, "z": True}


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([x(name="w")], "input 'w': there is no such input"),
        ([x(), x()], "input 'x': it is given twice"),
        ([], "input 'x': it is missing"),
        ([x(datatype="FP64")], "its datatype is FP32, not FP64"),
        ([x(shape=[1, 3], data=[1, 2, 3])], r"its shape must be like \[-1, 2\]"),
        ([x(shape=[2])], "its shape must be like"),
        ([x(shape=[-1, 2])], "its shape must be like"),
        ([x(shape=[0, 2], data=[])], "input 'x': it is empty"),
        ([x(shape=[5, 2], data=[0] * 10)], "The batch has 5 rows; 1 to 4"),
        ([x(data=[1])], "has 2 elements, and data has 1"),
        ([x(data=[[1], [2, 3]])], "must have one length"),
        ([x(data=[1, None])], "a list of values of the type FP32"),
        ([x(data=[1, "2"])], "a list of values of the type FP32"),
        ([x(data=[True, 2])], "a list of values of the type FP32"),
        ([x(data=[1, 1e300])], "does not fit into FP32"),
        ([x(data=7)], "data must be a list"),
        ([bare()], "neither data nor binary_data_size"),
        ([x(parameters={"binary_data_size": 8})], "both data and binary_data_size"),
        ([bare(parameters={"binary_data_size": 8})], "8, and 0 bytes are left"),
        ([bare(parameters={"shared_memory_region": "r"})], "unsupported parameter of input x: shared_memory_region"),
    ],
)
def test_what_is_wrong_is_named(inputs: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        read_infer(body(*inputs), None, ONE)


@pytest.mark.parametrize("value", [1.5, None, True, "1", 2**63])
def test_ids_are_whole_numbers(value: Any) -> None:
    inputs = [{"name": name, "shape": [1, 1], "datatype": "INT64", "data": [value]} for name in ("ids", "mask")]
    with pytest.raises(InvalidRequest, match="input 'ids'"):
        read_infer(body(*inputs), None, ENCODER)


def test_nan_is_no_json() -> None:
    with pytest.raises(InvalidRequest, match="no infer request"):
        read_infer(body(x()).replace(b"2]}", b"NaN]}"), None, ONE)


@pytest.mark.parametrize(("size", "tail"), [(7, bytes(7)), (9, bytes(9)), (8, bytes(9)), (8, bytes(7)), (-8, bytes(8))])
def test_byte_counts_must_agree(size: int, tail: bytes) -> None:
    with pytest.raises(InvalidRequest, match="bytes"):
        read_infer(*binary({"inputs": [bare(parameters={"binary_data_size": size})]}, tail), ONE)


@pytest.mark.parametrize("length", ["-1", "9999999", "x", "1e3", "\u0661"])
def test_the_header_s_length_must_lie_in_the_body(length: str) -> None:
    with pytest.raises(InvalidRequest, match="Inference-Header-Content-Length"):
        read_infer(body(x()), length, ONE)


def test_inputs_of_one_symbol_have_one_size() -> None:
    def give(ids: list[int], mask: list[int]) -> None:
        shapes = {"ids": ids, "mask": mask}
        inputs = [
            {"name": name, "shape": shape, "datatype": "INT64", "data": [1] * (shape[0] * shape[1])}
            for name, shape in shapes.items()
        ]
        read_infer(body(*inputs), None, ENCODER)

    with pytest.raises(InvalidRequest, match="axis 1 has the size 3"):
        give([1, 2], [1, 3])
    with pytest.raises(InvalidRequest, match="its batch has 2 rows, that of ids 1"):
        give([1, 2], [2, 2])


@pytest.mark.parametrize(
    "fields",
    [
        {"outputs": [{"name": "q"}]},
        {"outputs": [{"name": "y"}, {"name": "y"}]},
        {"outputs": [{"name": "y", "parameters": {"classification": 3}}]},
        {"parameters": {"sequence_id": 1}},
        {"parameters": {"binary_data_output": 1}},
        {"parameters": {"timeout": 0}},
        {"unknown": 1},
    ],
)
def test_other_wishes_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        read_infer(body(x(), **fields), None, ONE)


def test_strings_are_counted() -> None:
    spec = TensorSpec(name="s", datatype="BYTES", shape=(-1,), axes=("N",))
    signature = Signature(inputs=(spec,), outputs=(Y,), batched=True, max_rows=4)
    data = pack_strings([b"ab", b""])
    head = {"name": "s", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
    assert read_infer(*binary({"inputs": [head]}, data), signature).rows == 2
    wrong = b"\xff\xff\xff\x7f" + data[4:]
    with pytest.raises(InvalidRequest, match="past the end"):
        read_infer(*binary({"inputs": [head]}, wrong), signature)


def test_an_answer_is_written_as_it_was_asked_for() -> None:
    from engines.tensors import Tensor

    output = pack([Tensor(name, "FP32", (1, 2), struct.pack("<2f", 1, float("nan"))) for name in ("y", "z")])
    both = write_answer("m", "1", "me", {"z": True, "y": False}, output)
    assert both.json_length is not None
    head = json.loads(both.content[: both.json_length])
    assert (head["model_name"], head["model_version"], head["id"]) == ("m", "1", "me")
    assert head["outputs"] == [
        {"name": "z", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}},
        {"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [1.0, None]},
    ]
    assert both.content[both.json_length :] == struct.pack("<2f", 1, float("nan"))
    assert write_answer("m", "1", "", {"y": False}, output).json_length is None
