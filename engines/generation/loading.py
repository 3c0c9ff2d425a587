"""Builds an engine's model and memory, in this order: weights, threads and step size, workspace, KV."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from engines.generation import kv_cache, profile
from engines.generation.calibration import choose_scales
from engines.generation.choose_runner import Runner, make_runner, state_bytes, uses_triton
from engines.generation.compile_ahead import CompileAhead, Sizes, Stage, compile_ahead
from engines.generation.memory import KvSize, kv_bytes, measure_workspace, size_kv
from engines.generation.phases import PhaseTimes
from engines.generation.placement import Placement, choose_placement, describe_gpu, dtype_name
from engines.generation.probe import Probe
from engines.generation.threads import StepCost, ThreadGovernor, available_cores, best_time, choose_threads
from engines.generation.verify import record_to_verify, verify_fingerprint, verify_weights
from engines.manifest import Manifest, read_manifest
from engines.models.config import parse_config
from engines.models.loader import load_model
from engines.models.model import Model
from engines.models.work import count_work
from engines.protocol import Capacity, EngineInfo, EngineLoadError, EngineSpec, LoadProgress, Measured, ReportProgress

CPU_ROWS, GPU_ROWS = 64, 256
GPU_STEP_TOKENS = 8192
CPU_STEP_TOKENS = (512, 256, 128)
"""Step sizes to choose from on the CPU, the largest whose step stays under ``CPU_STEP_SECONDS``."""
CPU_STEP_SECONDS = 0.5
"""A prompt's chunk holds up every running stream for one step, and a cancel too."""
GRAPH_SHARE, MOST_GRAPH_BYTES = 0.04, 2 << 30
"""Of a GPU's memory, for CUDA graphs."""
PROBE_TOKENS = 64
"""Prompt tokens of the step that stands for prefill when threads and step size are chosen."""
PROBE_CONTEXT = 16384
"""Tokens of the sequences in the measured step on a GPU: attention takes no more scratch for longer ones."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    runner: Runner
    info: EngineInfo
    capacity: Capacity
    kernels: CompileAhead
    """Those that only later steps need may still be on their way into the cache."""


def load(spec: EngineSpec, report: ReportProgress, clock: Callable[[], float]) -> Loaded:
    """Load the model and lay out all memory, in the calling thread, which is then the one that may run steps.

    Raises EngineLoadError.
    """
    times = PhaseTimes(clock)
    manifest = read_manifest(Path(spec.source), spec.random_weights is not None)
    model_len = _model_len(spec, manifest)
    placement = choose_placement(spec, manifest.dtype)
    torch.set_num_threads(spec.threads or available_cores())
    if placement.device.type == "cuda":
        torch.cuda.set_device(placement.device)
    times.ended("device")
    kernels = compile_ahead(spec, manifest, placement, _settled(spec, _asked_sizes(spec, model_len, placement.device)))
    times.ended("kernel list")
    try:
        runner, info, capacity = _load(spec, manifest, placement, model_len, kernels, report, clock, times)
    except BaseException:
        kernels.close()
        raise
    _wait(kernels, "start", report)
    times.ended("kernels for steps")
    info = msgspec.structs.replace(info, load_seconds=times.seconds, load_phases=tuple(times.phases))
    return Loaded(runner, info, capacity, kernels)


def _load(
    spec: EngineSpec,
    manifest: Manifest,
    placement: Placement,
    model_len: int,
    kernels: CompileAhead,
    report: ReportProgress,
    clock: Callable[[], float],
    times: PhaseTimes,
) -> tuple[Runner, EngineInfo, Capacity]:
    """What the time of the load went into is not in ``info``."""
    try:
        uses_triton(placement.device)  # it brings the kernels up, which the weights' layout depends on
        times.ended("first kernel")
        model = _load_verified(manifest, spec, placement, report)
        times.ended("weights")
        _wait(kernels, "measure", report)
        times.ended("kernels for the largest step")
        report(LoadProgress(phase="measure"))
        scales = _kv_scales(spec, manifest, placement, model, model_len)
        measured = spec.measured or _measure(spec, model, placement, model_len, clock)
        size = _size_kv(spec, model, placement, model_len, measured)
        times.ended("largest step")
        report(LoadProgress(phase="allocate"))
        caches = kv_cache.allocate(
            model.kv_layout, size.blocks, kv_cache.BLOCK_SIZE, placement.kv_dtype, placement.device, scales
        )
        capacity = Capacity(
            blocks=size.blocks,
            block_size=kv_cache.BLOCK_SIZE,
            max_rows=measured.max_rows,
            max_step_tokens=measured.step_tokens,
            max_model_len=size.max_model_len,
        )
        governor, graphs = _governor(measured, clock), _graph_memory(placement.device, spec.memory_limit)
        runner = make_runner(model, caches, capacity, placement.device, clock, governor, graphs)
        times.ended("KV cache")
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise EngineLoadError(
            f"{spec.name}: the model does not fit in memory; use a 16-bit --dtype or a smaller model"
        ) from error
    return runner, _info(spec, manifest, placement, model, size, measured, scales), capacity


def _wait(kernels: CompileAhead, stage: Stage, report: ReportProgress) -> None:
    if kernels.misses(stage):
        report(LoadProgress(phase="compile"))
        kernels.wait(stage)


def _load_verified(manifest: Manifest, spec: EngineSpec, placement: Placement, report: ReportProgress) -> Model:
    """The model; at its first load what an engine folder's record says of it is checked."""
    record = record_to_verify(manifest, spec)
    if record is not None:
        verify_weights(record, manifest, spec, report)
    model = load_model(manifest, spec, placement.device, placement.dtype, report)
    if record is not None and record.fingerprint is not None:
        verify_fingerprint(record.fingerprint, model, spec, placement.device, placement.dtype)
    return model


def _info(
    spec: EngineSpec,
    manifest: Manifest,
    placement: Placement,
    model: Model,
    size: KvSize,
    measured: Measured,
    scales: Sequence[torch.Tensor],
) -> EngineInfo:
    return EngineInfo(
        name=spec.name,
        fingerprint=_fingerprint(spec, manifest, placement, scales),
        device=str(placement.device),
        dtype=dtype_name(placement.dtype),
        kv_dtype=dtype_name(placement.kv_dtype),
        weight_bytes=model.weight_bytes,
        kv_bytes=size.blocks * kv_cache.block_bytes(model.kv_layout, kv_cache.BLOCK_SIZE, placement.kv_dtype),
        threads=torch.get_num_threads(),
        load_seconds=0.0,
        vocab_size=model.vocab_size,
        measured=measured,
        work=count_work(parse_config(manifest), model, placement.kv_dtype.itemsize),
        gpu=None if placement.device.type == "cpu" else describe_gpu(placement),
    )


def _kv_scales(
    spec: EngineSpec, manifest: Manifest, placement: Placement, model: Model, model_len: int
) -> tuple[torch.Tensor, ...]:
    """Of an fp8 cache, each layer's; none of any other."""
    if placement.kv_dtype is not torch.float8_e4m3fn:
        return ()
    if placement.device.type == "cpu":
        _log.warning("%s: over fp8 KV the CPU's attention runs in plain torch, several times slower", spec.name)
    return choose_scales(model, manifest.bos_token_id, model_len, placement.dtype, placement.device)


def _model_len(spec: EngineSpec, manifest: Manifest) -> int:
    if spec.max_model_len is None:
        return manifest.max_context
    if not 1 <= spec.max_model_len <= manifest.max_context:
        raise EngineLoadError(
            f"{spec.name}: --max-model-len {spec.max_model_len} is not within 1 and the model's context of "
            f"{manifest.max_context} tokens"
        )
    return spec.max_model_len


def _measure(
    spec: EngineSpec, model: Model, placement: Placement, model_len: int, clock: Callable[[], float]
) -> Measured:
    """Chooses threads and the size of the largest step, and runs that step to see what memory it needs."""
    on_cpu = placement.device.type == "cpu"
    asked = _asked_sizes(spec, model_len, placement.device)
    step_tokens, longest = asked.step_tokens, min(model_len, asked.step_tokens)
    context, kv_dtype = asked.probe_context, placement.kv_dtype
    probe = Probe(model, asked.max_rows, longest, context, kv_dtype, placement.device, clock)
    cores = threads = 0
    cost = StepCost(0.0, 0.0)
    if on_cpu and spec.threads is None:
        cores = available_cores()
        threads, cost = choose_threads(cores, probe.prompt, 1, min(PROBE_TOKENS, longest), clock)
    if on_cpu and spec.max_step_tokens is None:
        tokens = min(PROBE_TOKENS, longest)
        step_tokens = choose_step_tokens(best_time(lambda: probe.prompt(tokens), clock) / tokens)
    settled = _settled(spec, msgspec.structs.replace(asked, step_tokens=step_tokens))
    max_rows, step_tokens = settled.max_rows, settled.step_tokens
    workspace = measure_workspace(placement.device, lambda: probe.largest_step(max_rows, step_tokens))
    workspace += state_bytes(model, max_rows, step_tokens, model_len, kv_cache.BLOCK_SIZE, placement.device)
    workspace += _graph_memory(placement.device, spec.memory_limit)
    return Measured(
        max_rows=max_rows,
        step_tokens=step_tokens,
        workspace=workspace,
        threads=threads,
        cores=cores,
        step_seconds=cost.fixed,
        token_seconds=cost.per_token,
        # A GPU's steps run as graphs, which are captured later and take a fraction of the time that a step takes here.
        profile=profile.measure(probe, max_rows, min(longest, step_tokens), clock) if on_cpu else (),
    )


def _asked_sizes(spec: EngineSpec, model_len: int, device: torch.device) -> Sizes:
    """What the user asked for, or the device's defaults."""
    on_cpu = device.type == "cpu"
    step_tokens = spec.max_step_tokens or (CPU_STEP_TOKENS[0] if on_cpu else GPU_STEP_TOKENS)
    longest = min(model_len, step_tokens)
    return Sizes(
        max_rows=spec.max_batch or (CPU_ROWS if on_cpu else GPU_ROWS),
        step_tokens=step_tokens,
        model_len=model_len,
        # On the CPU a step's memory does not depend on the contexts, and long ones would take seconds here.
        probe_context=longest if on_cpu else min(model_len, max(longest, PROBE_CONTEXT)),
    )


def _settled(spec: EngineSpec, sizes: Sizes) -> Sizes:
    """Each row must find room for one token in every step."""
    step_tokens = sizes.step_tokens
    if spec.max_step_tokens is None:
        step_tokens = max(step_tokens, sizes.max_rows)
    return msgspec.structs.replace(sizes, step_tokens=step_tokens, max_rows=min(sizes.max_rows, step_tokens))


def _governor(measured: Measured, clock: Callable[[], float]) -> ThreadGovernor | None:
    """Goes on from the measured thread count, set in this thread; None where the count was given."""
    if not measured.threads:
        return None
    torch.set_num_threads(measured.threads)
    return ThreadGovernor(
        measured.cores, measured.threads, StepCost(measured.step_seconds, measured.token_seconds), clock
    )


def _graph_memory(device: torch.device, memory_limit: int | None) -> int:
    """Bytes that CUDA graphs may take on the device; 0 where nothing is captured."""
    if not uses_triton(device):
        return 0
    total: int = memory_limit or torch.cuda.get_device_properties(device).total_memory
    return min(MOST_GRAPH_BYTES, int(GRAPH_SHARE * total))


def choose_step_tokens(token_seconds: float) -> int:
    """The CPU's step size for a model that takes so long for one prompt token."""
    fitting = (tokens for tokens in CPU_STEP_TOKENS if tokens * token_seconds <= CPU_STEP_SECONDS)
    return next(fitting, CPU_STEP_TOKENS[-1])


def _size_kv(spec: EngineSpec, model: Model, placement: Placement, model_len: int, measured: Measured) -> KvSize:
    return size_kv(
        spec.name,
        available=kv_bytes(placement.device, spec.memory_limit, model.weight_bytes, measured.workspace),
        block_bytes=kv_cache.block_bytes(model.kv_layout, kv_cache.BLOCK_SIZE, placement.kv_dtype),
        block_size=kv_cache.BLOCK_SIZE,
        max_rows=measured.max_rows,
        model_len=model_len,
        asked=spec.max_model_len,
    )


def _fingerprint(spec: EngineSpec, manifest: Manifest, placement: Placement, scales: Sequence[torch.Tensor]) -> str:
    """The same bytes mean other numbers under other scales."""
    dtypes = dtype_name(placement.dtype), dtype_name(placement.kv_dtype)
    parts = (
        manifest.fingerprint,
        *dtypes,
        spec.keep_quantized,
        spec.random_weights,
        [layer.tolist() for layer in scales],
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()
