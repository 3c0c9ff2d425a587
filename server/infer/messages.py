"""Bodies of the Open Inference Protocol (KServe v2), with the binary tensor extension.

https://github.com/kserve/open-inference-protocol; binary tensors follow the JSON, whose length is in a header.
"""

from __future__ import annotations

from typing import Any

import msgspec


class InferInput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: Any = msgspec.UNSET


class InferOutput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    parameters: dict[str, Any] = {}


class InferBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    inputs: list[InferInput]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[InferOutput] = []


class OutputHead(msgspec.Struct, frozen=True, omit_defaults=True):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, int] = {}
    data: Any = msgspec.UNSET


class InferAnswer(msgspec.Struct, frozen=True, kw_only=True):
    model_name: str
    model_version: str
    id: str | msgspec.UnsetType = msgspec.UNSET
    outputs: list[OutputHead]


class TensorMetadata(msgspec.Struct, frozen=True):
    name: str
    datatype: str
    shape: list[int]
    """-1 for an axis that requests choose."""


class ModelMetadata(msgspec.Struct, frozen=True):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServerMetadata(msgspec.Struct, frozen=True):
    name: str
    version: str
    extensions: list[str]


class ServerLive(msgspec.Struct, frozen=True):
    live: bool


class ServerReady(msgspec.Struct, frozen=True):
    ready: bool


class ModelReady(msgspec.Struct, frozen=True):
    name: str
    ready: bool


class FlatError(msgspec.Struct, frozen=True):
    """What this protocol's clients read of an error."""

    error: str
