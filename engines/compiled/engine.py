"""Runs a compiled package: named arrays in, named arrays out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engines.compiled.build import Report, compile_encoder
from engines.compiled.cache import CompiledModel, Dtype, Target, TensorSpec
from engines.protocol import EngineLoadError

Array = NDArray[np.generic]


class InputError(Exception):
    """Arrays that the model does not take; its text names which, and may be shown to a client."""


class CompiledEngine:
    """One package on one device. Not for several threads at once."""

    def __init__(self, record: CompiledModel, package: Path) -> None:
        """Raises EngineLoadError if torch cannot load the package."""
        self.record = record
        self.package_bytes = package.stat().st_size
        self._device = torch.device(record.target)
        try:
            # The loader's own argument order is that of the export; dictionaries stay on this side.
            self._loader: Any = torch._inductor.aoti_load_package(str(package)).loader
        except Exception as error:  # whatever a library that does not fit raises
            raise EngineLoadError(f"the compiled package of {record.source} cannot be loaded: {error}") from error

    @classmethod
    def load(cls, source: Path, target: Target, dtype: Dtype, report: Report) -> CompiledEngine:
        """The package of an encoder's folder from the cache; compiled first, which takes a while, if it is not there.

        Raises EngineLoadError.
        """
        return cls(*compile_encoder(source, target, dtype, report))

    @classmethod
    def load_onnx(
        cls, source: Path, longest: dict[str, tuple[int, ...]], target: Target, dtype: Dtype, report: Report
    ) -> CompiledEngine:
        """The same of an ONNX file; ``longest`` are the inputs' shapes with each free axis as long as it may be.

        Raises EngineLoadError.
        """
        # Only here: an encoder needs no onnx package.
        from engines.compiled.build_onnx import compile_onnx

        return cls(*compile_onnx(source, longest, target, dtype, report))

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run one batch. Every axis of one name must have one length in all inputs. Raises InputError.

        Arrays must be of the declared dtypes; they are copied to the device, and the results back.
        """
        self._check(inputs)
        tensors = [torch.from_numpy(np.ascontiguousarray(inputs[spec.name])) for spec in self.record.inputs]
        with torch.inference_mode():
            results = self.run_tensors([tensor.to(self._device) for tensor in tensors])
        return {spec.name: result.cpu().numpy() for spec, result in zip(self.record.outputs, results, strict=True)}

    def run_tensors(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The inputs in their order, on the package's device, to the outputs there; nothing is checked."""
        results: list[torch.Tensor] = self._loader.run(tensors)
        return results

    def _check(self, inputs: dict[str, Array]) -> None:
        """The compiled code reads beyond its arrays where shapes or ids are other than it was compiled for."""
        wanted = {spec.name for spec in self.record.inputs}
        if inputs.keys() != wanted:
            raise InputError(f"the model takes the inputs {', '.join(sorted(wanted))}")
        lengths: dict[str, int] = {}
        for spec in self.record.inputs:
            self._check_shape(spec, inputs[spec.name], lengths)
            _check_values(spec, inputs[spec.name])

    def _check_shape(self, spec: TensorSpec, array: Array, lengths: dict[str, int]) -> None:
        if array.dtype != np.dtype(spec.dtype):
            raise InputError(f"{spec.name} must be {spec.dtype}, not {array.dtype}")
        if array.ndim != len(spec.shape):
            raise InputError(f"{spec.name} must have {len(spec.shape)} axes, not {array.ndim}")
        for axis, length in zip(spec.shape, array.shape, strict=True):
            if isinstance(axis, int):
                fits, expected = length == axis, str(axis)
            else:
                least, most = self.record.axes[axis]
                fits = least <= length <= most and lengths.setdefault(axis, length) == length
                expected = f"{least} to {most} {axis}, the same in all inputs"
            if not fits:
                raise InputError(f"an axis of {spec.name} has {length} entries where the model takes {expected}")


def _check_values(spec: TensorSpec, array: Array) -> None:
    if spec.values is not None and (array.min() < 0 or array.max() >= spec.values):
        raise InputError(f"{spec.name} must hold values from 0 to {spec.values - 1}")
