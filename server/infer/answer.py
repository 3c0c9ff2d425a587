"""From what a worker computed to the body of an infer answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from engines.tensors import unpack
from server.infer.json_tensors import to_json
from server.infer.messages import InferAnswer, OutputHead

_encoder = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True)
class AnswerBody:
    content: bytes
    json_length: int | None
    """Of the JSON, where tensors follow it; None where there is nothing but JSON."""


def write_answer(model: str, version: str, request_id: str, wanted: Mapping[str, bool], output: bytes) -> AnswerBody:
    """``wanted`` names the outputs in the order of the answer, and says which of them are binary."""
    tensors = {tensor.name: tensor for tensor in unpack(output)[0]}
    heads, tail = [], []
    for name, binary in wanted.items():
        tensor = tensors[name]
        shape = list(tensor.shape)
        if binary:
            heads.append(OutputHead(name, tensor.datatype, shape, {"binary_data_size": len(tensor.data)}))
            tail.append(tensor.data)
        else:
            heads.append(OutputHead(name, tensor.datatype, shape, data=to_json(tensor)))
    answer = InferAnswer(model_name=model, model_version=version, id=request_id or msgspec.UNSET, outputs=heads)
    header = _encoder.encode(answer)
    return AnswerBody(b"".join([header, *tail]), len(header) if tail else None)
