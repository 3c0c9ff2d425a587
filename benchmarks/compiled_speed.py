"""Compiled MiniLM and ResNet-50 shapes against the same modules in PyTorch without a compiler.

Random weights: only speed is measured here. Each time is the fastest of several rounds that take turns, inputs on the
device and outputs left there. On a GPU kernels of one call follow without the host waiting; a round is timed by events.

    python -m benchmarks.compiled_speed [--target cpu|cuda] [--models minilm resnet50] [--batches 1 8 64] [--tokens 64]
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.plain_models import resnet50
from benchmarks.report import device_name, print_header, row, write
from engines.compiled.build import DTYPES, package_key, store
from engines.compiled.cache import Dtype, Target, TensorSpec
from engines.compiled.engine import CompiledEngine
from engines.compiled.exported import ENCODER_INPUTS, export_encoder, quiet_compiler
from engines.encoder_folder import EncoderConfig
from engines.models.encoder import random_encoder

MINILM = EncoderConfig(
    layers=6,
    hidden=384,
    heads=12,
    intermediate=1536,
    vocab=30522,
    positions=512,
    position_offset=0,
    token_types=2,
    eps=1e-12,
    activation="gelu",
)
MOST = 64
ROUNDS = 5
ROUND_SECONDS = 0.3
Inputs = list[torch.Tensor]
Call = Callable[[Inputs], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", nargs="+", choices=["minilm", "resnet50"], default=["minilm", "resnet50"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--tokens", type=int, default=64, help="of each text")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="default: fp32 bf16, on a GPU fp32 fp16")
    given = parser.parse_args()
    target: Target = given.target
    dtypes: list[Dtype] = given.dtypes or (["fp32", "bf16"] if target == "cpu" else ["fp32", "fp16"])
    result: dict[str, Any] = {"machine": print_header(f"compiled against eager, {target}"), "device": device_name()}
    result["threads"] = torch.get_num_threads()
    widths = (10, 6, *(16 for _ in range(2 * len(dtypes))), 14)
    names = [f"{kind} {dtype}" for dtype in dtypes for kind in ("eager", "compiled")]
    print(row(("ms", "batch", *names, "/ eager fp32"), widths))
    # Packages of random weights are of no use to anybody later.
    home = tempfile.TemporaryDirectory()
    os.environ["SLIMSERVE_HOME"] = home.name
    for model in given.models:
        calls: dict[str, Call] = {}
        for dtype in dtypes:
            calls[f"eager {dtype}"], calls[f"compiled {dtype}"] = make_calls(model, target, dtype)
        for batch in given.batches:
            inputs = {name: make_inputs(model, target, name, batch, given.tokens) for name in names}
            times = measure(calls, inputs, target)
            result[f"{model} {batch}"] = {name: round(1e3 * seconds, 4) for name, seconds in times.items()}
            gain = times["eager fp32"] / times[names[-1]] if "eager fp32" in times else float("nan")
            print(row((model, str(batch), *(f"{1e3 * times[name]:.3f}" for name in names), f"{gain:.2f}x"), widths))
    home.cleanup()
    print(f"wrote {write(f'compiled_speed_{target}', result)}")


def make_calls(model: str, target: Target, dtype: Dtype) -> tuple[Call, Call]:
    """The module itself, and its package, compiled or found in the cache."""
    device = torch.device(target)
    with torch.no_grad(), quiet_compiler():
        if model == "minilm":
            module: nn.Module = random_encoder(MINILM, device, DTYPES[dtype], seed=0)
            program = export_encoder(random_encoder(MINILM, device, DTYPES[dtype], seed=0), MOST)
            inputs = tuple(TensorSpec(name=name, dtype="int64", shape=("texts", "tokens")) for name in ENCODER_INPUTS)
            axes, output = {"texts": (1, MOST), "tokens": (1, MINILM.positions)}, "sentence_embedding"
        else:
            module = resnet50().to(device, DTYPES[dtype])
            example = (torch.zeros(2, 3, 224, 224, device=device, dtype=DTYPES[dtype]),)
            free = ({0: torch.export.Dim("images", min=1, max=MOST)},)
            program = torch.export.export(copy.deepcopy(module), example, dynamic_shapes=free)
            inputs = (TensorSpec(name="images", dtype="float32", shape=("images", 3, 224, 224)),)
            axes, output = {"images": (1, MOST)}, "logits"
    key = package_key(f"benchmark {model}", target, dtype)
    outputs = (TensorSpec(name=output, dtype="float32", shape=(next(iter(axes)), 1000)),)
    record, package = store(key, model, program, inputs, outputs, axes)
    print(f"  {model} {dtype}: {record.kernels} kernels, compiled in {record.seconds} s", flush=True)
    engine = CompiledEngine(record, package)
    return (lambda tensors: module(*tensors)), engine.run_tensors


def make_inputs(model: str, target: Target, name: str, batch: int, tokens: int) -> Inputs:
    dtype = DTYPES[next(dtype for dtype in DTYPES if name.endswith(dtype))]
    generator = torch.Generator().manual_seed(0)
    if model == "resnet50":
        return [torch.randn(batch, 3, 224, 224, generator=generator).to(target, dtype)]
    shape = (batch, tokens)
    ids = torch.randint(0, MINILM.vocab, shape, generator=generator)
    made = (ids, torch.ones(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64))
    return [tensor.to(target) for tensor in made]


def measure(calls: dict[str, Call], inputs: dict[str, Inputs], target: Target) -> dict[str, float]:
    """Seconds of one call each, the fastest round's mean."""
    best = dict.fromkeys(calls, float("inf"))
    with torch.inference_mode():
        counts = {}
        for name, call in calls.items():
            for _ in range(2):
                call(inputs[name])
            counts[name] = max(1, int(ROUND_SECONDS / _time(call, inputs[name], 1, target)))
        for _ in range(ROUNDS):
            for name, call in calls.items():
                best[name] = min(best[name], _time(call, inputs[name], counts[name], target))
    return best


def _time(call: Call, inputs: Inputs, count: int, target: Target) -> float:
    if target == "cpu":
        begun = time.perf_counter()
        for _ in range(count):
            call(inputs)
        return (time.perf_counter() - begun) / count
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    for _ in range(count):
        call(inputs)
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / count


if __name__ == "__main__":
    main()
