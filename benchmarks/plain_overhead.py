"""What the server adds to a plain model's request: one keep-alive client, batch 1, binary tensors.

    python benchmarks/plain_overhead.py MODEL.onnx [--requests 400]

The same file is run in this process with ONNX Runtime, with the same number of threads; served and direct runs take
turns, so that what else the machine does falls on both.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from benchmarks.servers import Server, free_port, running, slimserve

BAR_MS = 1.0
TURN = 50
"""Requests of one kind in a row."""
NUMPY = {"INT32": np.int32, "INT64": np.int64, "FP32": np.float32}

Inputs = dict[str, NDArray[Any]]


def metadata(server: Server, model: str) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", f"/v2/models/{model}")
    found = json.loads(connection.getresponse().read())
    connection.close()
    return found


def ones(inputs: Any, size: int) -> Inputs:
    """Batch 1; ``size`` for every other free axis."""
    return {
        each["name"]: np.ones([1, *(size if axis < 0 else axis for axis in each["shape"][1:])], NUMPY[each["datatype"]])
        for each in inputs
    }


def message(arrays: Inputs, metadata_inputs: Any) -> tuple[bytes, int]:
    heads = [
        {
            "name": each["name"],
            "datatype": each["datatype"],
            "shape": list(arrays[each["name"]].shape),
            "parameters": {"binary_data_size": arrays[each["name"]].nbytes},
        }
        for each in metadata_inputs
    ]
    head = json.dumps({"inputs": heads, "parameters": {"binary_data_output": True}}).encode()
    return head + b"".join(arrays[each["name"]].tobytes() for each in metadata_inputs), len(head)


class Client:
    """One connection that stays open."""

    def __init__(self, port: int, model: str, body: bytes, head: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port)
        self._path = f"/v2/models/{model}/infer"
        self._body = body
        self._headers = {"Inference-Header-Content-Length": str(head), "Content-Type": "application/octet-stream"}

    def ask(self) -> bytes:
        self._connection.request("POST", self._path, self._body, self._headers)
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(content.decode())
        return content


def timed(call: Callable[[], object]) -> list[float]:
    """Seconds of each of one turn."""
    found = []
    for _ in range(TURN):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return found


def measure(path: Path, requests: int, size: int) -> dict[str, float]:
    """Milliseconds."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    port = free_port()
    command = slimserve("serve", str(path), "--port", str(port), "--threads", "1", "--served-model-name", "m")
    with (
        tempfile.NamedTemporaryFile(suffix=".log") as log,
        running("slimserve", command, port, "/health/ready", log=Path(log.name)) as server,
    ):
        inputs = metadata(server, "m")["inputs"]
        arrays = ones(inputs, size)
        client = Client(port, "m", *message(arrays, inputs))
        turns = [(timed(client.ask), timed(lambda: session.run(None, arrays))) for _ in range(-(-requests // TURN) + 1)]
    # The first turn is for warming up.
    served = [seconds for turn, _ in turns[1:] for seconds in turn]
    direct = [seconds for _, turn in turns[1:] for seconds in turn]
    return {
        "direct_p50_ms": 1e3 * statistics.median(direct),
        "served_p50_ms": 1e3 * statistics.median(served),
        "overhead_p50_ms": 1e3 * (statistics.median(served) - statistics.median(direct)),
        "served_p99_ms": 1e3 * statistics.quantiles(served, n=100)[98],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--size", type=int, default=32, help="of free axes beside the batch")
    arguments = parser.parse_args()
    found = measure(arguments.model, arguments.requests, arguments.size)
    for name, value in found.items():
        print(f"{name:16} {value:8.3f}")
    verdict = "met" if found["overhead_p50_ms"] <= BAR_MS else "missed"
    print(f"bar: overhead of at most {BAR_MS} ms, {verdict}")


if __name__ == "__main__":
    main()
