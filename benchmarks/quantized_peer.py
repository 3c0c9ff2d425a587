"""Another library's quantized products behind our layers, for ``quantized_speed``: humming-kernels (Apache-2.0).

It compiles each of its kernels with nvcc or NVRTC when it is first asked for, which takes seconds; several threads ask
at once. It quantizes weights itself, so its results are compared with the weights that it was given, loosely.
"""

from __future__ import annotations

import copy
import importlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.graph_times import graph_microseconds
from benchmarks.quantized_layers import MOST_CHECKED, QuantizedLayer
from benchmarks.tuned_layers import ROTATED_BYTES

CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "int4": ({"dtype": "int4", "group_size": 128}, {}),
    "int8": ({"dtype": "int8"}, {}),
    "w8a8": ({"dtype": "int8"}, {"dtype": "int8"}),
    "fp8": ({"dtype": "float8e4m3"}, {"dtype": "float8e4m3"}),
}
LARGEST_ERROR = {"int4": 0.2, "int8": 0.02, "w8a8": 0.03, "fp8": 0.06}
"""Of what quantizing normally distributed weights costs, and as much again."""


class Peer:
    """Layers of one library; without it, none."""

    def __init__(self, folder: Path | None, seconds: float) -> None:
        """``folder``: of the unpacked package, where it is not installed. ``seconds``: for compiling, in all."""
        self.failures: list[str] = []
        self._left = seconds
        self._layer: Any = None
        if folder is not None:
            sys.path.insert(0, str(folder))
        try:
            self._layer = importlib.import_module("humming.layer").HummingLayer
        except ImportError as error:
            self.failures.append(f"humming-kernels: {error}")

    def times(self, layer: QuantizedLayer, rows: list[int]) -> dict[int, float]:
        """Microseconds of the product alone, by rows; none for those that failed or were not compiled in time."""
        if self._layer is None or self._left <= 0:
            return {}
        try:
            return self._times(layer, rows)
        except Exception as error:  # noqa: BLE001 - of another library: its failure must not end the measurement
            self.failures.append(f"{layer.layer.name} {layer.format}: {type(error).__name__}: {error}"[:300])
            return {}

    def _times(self, layer: QuantizedLayer, rows: list[int]) -> dict[int, float]:
        shape, x = layer.layer.shape, layer.x
        weights, inputs = CONFIGS[layer.format]
        weight = torch.randn(shape.lines, shape.depth, device=x.device, dtype=x.dtype) * shape.depth**-0.5
        # Their constructors fill the dictionaries in.
        own = self._layer(
            shape_n=shape.lines,
            shape_k=shape.depth,
            weight_config=dict(weights),
            input_config=dict(inputs),
            torch_dtype=x.dtype,
        ).to(x.device)
        own.load_from_unquantized(weight)
        own.transform()
        found = {}
        for count in self._compiled(own, x, rows):
            expected = x[:count].float() @ weight.float().t()
            error = float((own(x[:count]).float() - expected).norm() / expected.norm())
            if error > LARGEST_ERROR[layer.format]:
                self.failures.append(f"{layer.layer.name} {layer.format}, {count} rows: error {error:.2g}")
                continue
            copies = max(-(-ROTATED_BYTES // layer.weight_bytes), 2) if count <= MOST_CHECKED else 2
            layers = [own, *(copy.deepcopy(own) for _ in range(copies - 1))]
            calls = [partial(layers[number % copies], x[:count]) for number in range(max(copies, 4))]
            found[count] = graph_microseconds(calls, 5, warm=calls[0])
        return found

    def _compiled(self, own: Any, x: torch.Tensor, rows: list[int]) -> list[int]:
        """Those of ``rows`` whose kernels are there in the time that is left."""
        begun = time.monotonic()
        pool = ThreadPoolExecutor(len(rows))
        asked = {pool.submit(_ask, own, x[:count]): count for count in rows}
        done, late = wait(asked, timeout=max(self._left, 0.0))
        pool.shutdown(wait=False, cancel_futures=True)
        self._left -= time.monotonic() - begun
        self.failures += [f"{asked[one]} rows: not compiled in time" for one in late]
        self.failures += [f"{asked[one]} rows: {error}"[:300] for one in done if (error := one.exception())]
        return sorted(asked[one] for one in done if one.exception() is None)


def _ask(own: Any, x: torch.Tensor) -> None:
    with torch.no_grad():
        own(x)
    torch.cuda.synchronize()
