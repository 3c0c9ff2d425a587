"""Builds packages: ``torch.export``, then Inductor ahead of time. Takes 10 s to some minutes, and a C++ compiler."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import time
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import msgspec
import torch
from torch.export import ExportedProgram

from engines.compiled.cache import (
    PACKAGE,
    RECORD,
    CompiledModel,
    Dtype,
    PackageKey,
    Target,
    TensorSpec,
    find,
    writing,
)
from engines.compiled.exported import ENCODER_INPUTS, MOST_TEXTS, export_encoder, quiet_compiler
from engines.encoder_folder import EncoderFolder, read_encoder_folder
from engines.models.encoder import load_encoder
from engines.protocol import EngineLoadError

DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ENGINES = Path(__file__).parents[1]
SOURCES = ("compiled/*.py", "encoder_folder.py", "models/encoder.py")
"""What a package is made by; a change there makes all packages anew."""

CPU_OPTIONS: dict[str, object] = {"freezing": True, "cpp.dynamic_threads": True}
"""Weights are constants, so batch norms fold into them and ReLUs into convolutions; threads are set when it runs."""
GPU_OPTIONS: dict[str, object] = {"freezing": True}
Report = Callable[[str], None]


def package_key(fingerprint: str, target: Target, dtype: Dtype) -> PackageKey:
    """The key on this machine, now. Raises EngineLoadError where the target is not here."""
    return PackageKey(
        fingerprint=fingerprint,
        target=target,
        dtype=dtype,
        device=_device_kind(target),
        torch=str(torch.__version__),
        sources=_sources_digest(),
    )


def compile_encoder(
    source: Path, target: Target, dtype: Dtype, report: Report, most_texts: int = MOST_TEXTS
) -> tuple[CompiledModel, Path]:
    """Compile an encoder's folder, or find the package that was made of it before. Returns its record and path.

    Raises EngineLoadError for a folder that is no encoder, a missing compiler, and a target that is not here.
    """
    refuse_programs(source)
    report("reading the model")
    folder = read_encoder_folder(source)
    key = package_key(folder.fingerprint, target, dtype)
    if (known := find(key)) is not None:
        report("compiled before")
        return known
    require_compiler()
    model = load_encoder(folder, torch.device(target), DTYPES[dtype])
    report("exporting")
    program = export_encoder(model, most_texts)
    names, output = ENCODER_INPUTS, model.output_name
    del model
    inputs = tuple(_ids(name, folder) for name in names)
    width = folder.config.labels or folder.config.hidden
    outputs = (TensorSpec(name=output, dtype="float32", shape=("texts", width)),)
    axes = {"texts": (1, most_texts), "tokens": (1, folder.config.positions)}
    report("compiling")
    return store(key, source.name, program, inputs, outputs, axes)


def store(
    key: PackageKey,
    source: str,
    program: ExportedProgram,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    axes: dict[str, tuple[int, int]],
    check: Callable[[Path], None] | None = None,
) -> tuple[CompiledModel, Path]:
    """Compile a program and put the package into the cache, unless ``check`` raises. Raises EngineLoadError."""
    started = time.monotonic()
    with writing(key) as folder:
        kernels = _compile(program, folder / PACKAGE, key.target)
        if check is not None:
            check(folder / PACKAGE)
        os.chmod(folder / PACKAGE, 0o600)
        with (folder / PACKAGE).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        record = CompiledModel(
            source=source,
            target=key.target,
            dtype=key.dtype,
            inputs=inputs,
            outputs=outputs,
            axes=axes,
            kernels=kernels,
            seconds=round(time.monotonic() - started, 1),
            sha256=digest,
        )
        (folder / RECORD).write_bytes(msgspec.json.encode(record))
        os.chmod(folder / RECORD, 0o600)
    found = find(key)
    if found is None:
        raise EngineLoadError("the package was removed from the cache while it was written; compile the model again")
    return found


def refuse_programs(source: Path) -> None:
    """Raises EngineLoadError for files that run code when they are read."""
    if source.is_file():
        if source.suffix in (".pt2", ".pt", ".pth", ".bin", ".pkl"):
            raise EngineLoadError(
                f"{source.name} can run code when it is read, and is never opened; compile the model's own folder"
            )
        raise EngineLoadError(f"{source.name} is neither an encoder's folder nor an .onnx file")


def require_compiler() -> None:
    """Raises EngineLoadError where there is no C++ compiler."""
    wanted = os.environ.get("CXX", "g++")
    if not any(shutil.which(name) for name in (wanted, "g++", "clang++")):
        raise EngineLoadError(
            f"compiling needs a C++ compiler, and {wanted} is not installed: apt-get install g++, or set CXX; models "
            "that were compiled before on such a machine run without one"
        )


def _compile(program: ExportedProgram, path: Path, target: Target) -> int:
    """Returns the number of kernels that were generated."""
    from torch._inductor import aoti_compile_and_package, metrics
    from torch._inductor.utils import fresh_cache

    metrics.reset()
    options = CPU_OPTIONS if target == "cpu" else GPU_OPTIONS
    try:
        # In a folder of this run alone: the usual one has a name that others can know before.
        with torch.no_grad(), quiet_compiler(), fresh_cache():
            aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
    except Exception as error:  # compilers raise what they like
        raise EngineLoadError(f"torch could not compile the model: {_first_line(error)}") from error
    return metrics.generated_kernel_count


def library_calls(path: Path) -> dict[str, int]:
    """How often a CPU package's code calls each function of torch's libraries, by name."""
    counts: dict[str, int] = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".wrapper.cpp"):
                for call in re.findall(r"aoti_torch_cpu_(\w+)\(", archive.read(name).decode()):
                    counts[call] = counts.get(call, 0) + 1
    return counts


def _ids(name: str, folder: EncoderFolder) -> TensorSpec:
    config = folder.config
    values = {"input_ids": config.vocab, "attention_mask": 2, "token_type_ids": config.token_types}[name]
    return TensorSpec(name=name, dtype="int64", shape=("texts", "tokens"), values=values)


def _device_kind(target: Target) -> str:
    if target == "cuda":
        if not torch.cuda.is_available():
            raise EngineLoadError("there is no CUDA GPU here; a package for one is compiled on a machine that has it")
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()} sm{major}{minor} cuda{torch.version.cuda}"
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {_cpu_flags()}"


def _cpu_flags() -> str:
    """Short digest: a package is compiled for all extensions of the processor it is made on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return hashlib.sha256(flags.encode()).hexdigest()[:12]


@cache
def _sources_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in ENGINES.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
