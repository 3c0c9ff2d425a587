"""From the body of an infer request to packed tensors, checked against the model's signature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from engines.tensors import BYTES, ITEM_SIZES, Signature, Tensor, TensorSpec, elements, pack, unpack_strings
from server.errors import InvalidRequest
from server.infer.json_tensors import from_json
from server.infer.messages import InferBody, InferInput, InferOutput

MOST_TENSORS = 1024
_BINARY_SIZE, _BINARY_DATA, _BINARY_OUTPUTS, _TIMEOUT = (
    "binary_data_size",
    "binary_data",
    "binary_data_output",
    "timeout",
)
_decoder = msgspec.json.Decoder(InferBody)


@dataclass(frozen=True, slots=True)
class InferRequest:
    """Checked, and ready for a worker."""

    id: str
    rows: int
    bucket: int
    inputs: bytes
    """Packed."""
    outputs: Mapping[str, bool]
    """Wanted, in this order, and whether as binary."""
    timeout: float | None
    """Seconds that the client waits."""


def read_infer(body: bytes, json_length: str | None, signature: Signature) -> InferRequest:
    """``json_length`` is the header ``Inference-Header-Content-Length``, if there is one. Raises InvalidRequest."""
    length = _json_length(json_length, len(body))
    try:
        message = _decoder.decode(memoryview(body)[:length])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"The body is no infer request: {str(error)[:200]}") from None
    _refuse_others(message.parameters, {_BINARY_OUTPUTS, _TIMEOUT}, "the request")
    tensors = _read_tensors(message.inputs, memoryview(body)[length:], signature)
    sizes = _free_sizes(tensors, signature)
    rows = tensors[0].shape[0] if signature.batched else 1
    if not 0 < rows <= signature.max_rows:
        raise InvalidRequest(f"The batch has {rows} rows; 1 to {signature.max_rows} can be computed at once")
    outputs = _outputs(message, signature)
    return InferRequest(
        id=message.id,
        rows=rows,
        bucket=signature.bucket(sizes),
        inputs=pack(tensors, [] if len(outputs) == len(signature.outputs) else list(outputs)),
        outputs=outputs,
        timeout=_timeout(message.parameters),
    )


def _json_length(given: str | None, size: int) -> int:
    if given is None:
        return size
    if not (given.isascii() and given.isdigit() and len(given) < 12 and int(given) <= size):
        raise InvalidRequest(f"Inference-Header-Content-Length must be a number up to the body's {size} bytes")
    return int(given)


def _refuse_others(parameters: Mapping[str, Any], known: set[str], where: str) -> None:
    for name in parameters:
        if name not in known:
            raise InvalidRequest(f"Unknown or unsupported parameter of {where}: {name[:80]}", param=name[:80])


def _read_tensors(inputs: Sequence[InferInput], tail: memoryview, signature: Signature) -> list[Tensor]:
    """In the signature's order."""
    if len(inputs) > MOST_TENSORS:
        raise InvalidRequest(f"{len(inputs)} inputs are too many")
    specs = {spec.name: spec for spec in signature.inputs}
    found: dict[str, Tensor] = {}
    begin = 0
    for given in inputs:
        spec = specs.get(given.name)
        if spec is None or given.name in found:
            what = "there is no such input" if spec is None else "it is given twice"
            raise _wrong(given.name, f"{what}; the model's inputs are {', '.join(specs)[:200]}")
        size = _check_head(given, spec)
        found[given.name] = Tensor(given.name, spec.datatype, tuple(given.shape), _data(given, spec, tail, begin, size))
        begin += size
    if begin != len(tail):
        raise InvalidRequest(f"{len(tail)} bytes follow the JSON, and the inputs name {begin} of them")
    for name in specs:
        if name not in found:
            raise _wrong(name, "it is missing")
    return [found[name] for name in specs]


def _check_head(given: InferInput, spec: TensorSpec) -> int:
    """Type, shape and parameters against the signature. Returns the bytes that belong to it behind the JSON."""
    if given.datatype != spec.datatype:
        raise _wrong(spec.name, f"its datatype is {spec.datatype}, not {given.datatype[:20]}")
    fits = len(given.shape) == len(spec.shape) and all(
        size == fixed if fixed >= 0 else size >= 0 for size, fixed in zip(given.shape, spec.shape, strict=True)
    )
    if not fits:
        raise _wrong(spec.name, f"its shape must be like {list(spec.shape)} (-1: free), not {given.shape[:16]}")
    if any(size == 0 for size in given.shape):
        raise _wrong(spec.name, f"it is empty: {given.shape[:16]}")
    _refuse_others(given.parameters, {_BINARY_SIZE}, f"input {spec.name[:80]}")
    size = given.parameters.get(_BINARY_SIZE, 0)
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise _wrong(spec.name, f"{_BINARY_SIZE} must be a number of bytes")
    return size


def _data(given: InferInput, spec: TensorSpec, tail: memoryview, begin: int, size: int) -> bytes | memoryview:
    if _BINARY_SIZE not in given.parameters:
        if given.data is msgspec.UNSET:
            raise _wrong(spec.name, f"it has neither data nor {_BINARY_SIZE}")
        return from_json(spec.name, spec.datatype, given.shape, given.data)
    if given.data is not msgspec.UNSET:
        raise _wrong(spec.name, f"it has both data and {_BINARY_SIZE}")
    data = tail[begin : begin + size]
    if len(data) != size:
        raise _wrong(spec.name, f"{_BINARY_SIZE} is {size}, and {len(data)} bytes are left of the body")
    if spec.datatype == BYTES:
        _check_strings(spec.name, given.shape, data)
    elif size != elements(given.shape) * ITEM_SIZES[spec.datatype]:
        wanted = elements(given.shape) * ITEM_SIZES[spec.datatype]
        raise _wrong(spec.name, f"its shape takes {wanted} bytes of {spec.datatype}, and {_BINARY_SIZE} is {size}")
    elif spec.datatype == "BOOL" and any(byte > 1 for byte in bytes(data)):
        raise _wrong(spec.name, "a byte of a BOOL is 0 or 1")
    return data


def _check_strings(name: str, shape: Sequence[int], data: memoryview) -> None:
    try:
        count = len(unpack_strings(data))
    except ValueError as error:
        raise _wrong(name, str(error)) from None
    if count != elements(shape):
        raise _wrong(name, f"its shape has {elements(shape)} elements, and there are {count} strings")


def _free_sizes(tensors: Sequence[Tensor], signature: Signature) -> dict[str, int]:
    """Of each free axis; the same symbol must have the same size everywhere, and so must the batch."""
    sizes: dict[str, int] = {}
    batch = tensors[0].shape[0] if signature.batched else 0
    for tensor, spec in zip(tensors, signature.inputs, strict=True):
        for index, axis in enumerate(spec.axes):
            size = tensor.shape[index]
            if index == 0 and signature.batched:
                if size != batch:
                    raise _wrong(spec.name, f"its batch has {size} rows, that of {signature.inputs[0].name} {batch}")
            elif axis and sizes.setdefault(axis, size) != size:
                raise _wrong(spec.name, f"axis {index} has the size {size}, and that of another input is {sizes[axis]}")
    return sizes


def _outputs(message: InferBody, signature: Signature) -> dict[str, bool]:
    names = [spec.name for spec in signature.outputs]
    default = _flag(message.parameters, _BINARY_OUTPUTS, default=False)
    if not message.outputs:
        return dict.fromkeys(names, default)
    found: dict[str, bool] = {}
    for output in message.outputs:
        if output.name not in names or output.name in found:
            what = "there is no such output" if output.name not in names else "it is asked for twice"
            text = f"output {output.name[:80]!r}: {what}; the model's outputs are {', '.join(names)[:200]}"
            raise InvalidRequest(text, param=output.name[:80])
        found[output.name] = _output_flag(output, default)
    return found


def _output_flag(output: InferOutput, default: bool) -> bool:
    _refuse_others(output.parameters, {_BINARY_DATA}, f"output {output.name[:80]}")
    return _flag(output.parameters, _BINARY_DATA, default=default)


def _flag(parameters: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false", param=name)
    return value


def _timeout(parameters: Mapping[str, Any]) -> float | None:
    """In microseconds, as Triton takes it."""
    value = parameters.get(_TIMEOUT)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 24 * 3600 * 10**6:
        raise InvalidRequest("timeout must be a number of microseconds, at most a day", param=_TIMEOUT)
    return value / 1e6


def _wrong(name: str, text: str) -> InvalidRequest:
    return InvalidRequest(f"input {name[:80]!r}: {text}", param=name[:80])
