"""Times latent attention (MLA) of V2-Lite on the GPU at hand: decodes and their kernels, and prefill.

    python -m benchmarks.mla_speed

Random latents and weights, in as many copies as no cache holds, inside CUDA graphs. Prints microseconds a layer, the
rate at which the cache and weights are read (decode), and TFLOP/s of attention as if expanded (prefill). JSON goes to
``$OUT`` or benchmarks/results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import report
from benchmarks.floors import read_bandwidth
from benchmarks.graph_times import graph_microseconds
from engines.kernels import LatentQueries, LatentUp, latent_attention
from engines.kernels.cuda import mla
from engines.kernels.cuda.device import starts_early
from engines.models.batch import Batch

DEVICE = torch.device("cuda", 0)
HEADS, NOPE, VALUE, RANK, ROPE = 16, 128, 128, 512, 64
BLOCK = 16
DECODES = [(1, 600), (1, 4000), (4, 600), (8, 600), (16, 600), (32, 600), (64, 600), (128, 600), (256, 600), (64, 2048)]
PREFILLS = [(4, 2048, 2048), (1, 8192, 8192), (16, 512, 512), (1, 1024, 3072)]
"""Rows, new tokens of each, tokens of its context."""
CACHED_BYTES = 150 << 20


@dataclass
class Case:
    queries: torch.Tensor
    latents: torch.Tensor
    shapes: list[LatentQueries]
    caches: list[torch.Tensor]
    batch: Batch

    def each(self, call: Callable[[LatentQueries, torch.Tensor], object]) -> float:
        calls = [partial(call, shape, cache) for shape, cache in zip(self.shapes, self.caches, strict=True)]
        return graph_microseconds(calls)


def shape() -> LatentQueries:
    up = torch.randn(HEADS, NOPE + VALUE, RANK, device=DEVICE).mul_(RANK**-0.5).bfloat16()
    return LatentQueries(
        up=LatentUp(HEADS, NOPE, VALUE, up, (), ()),
        latent_gain=torch.ones(RANK, device=DEVICE, dtype=torch.bfloat16),
        latent_eps=1e-6,
        cos_sin=torch.rand(16384, ROPE, device=DEVICE),
        interleaved=True,
        scale=(NOPE + ROPE) ** -0.5,
    )


def make(rows: int, count: int, context: int) -> Case:
    """``count`` new tokens at the end of each row's ``context``."""
    blocks = -(-context // BLOCK)
    copies = max(3, min(32, CACHED_BYTES // (rows * context * (RANK + ROPE) * 2) + 1))
    tables = torch.randperm(rows * blocks, device=DEVICE).view(rows, blocks)
    positions = torch.arange(context - count, context, device=DEVICE).repeat(rows)
    slots = tables.repeat_interleave(count, 0).gather(1, (positions // BLOCK).unsqueeze(1))[:, 0] * BLOCK
    batch = Batch(
        token_ids=positions,
        positions=positions,
        cache_slots=slots + positions % BLOCK,
        query_starts=torch.arange(rows + 1, dtype=torch.int32, device=DEVICE) * count,
        context_lengths=torch.full((rows,), context, dtype=torch.int32, device=DEVICE),
        block_tables=tables.int(),
        decode_rows=rows if count == 1 else 0,
        longest_query=count,
        longest_context=4096 if count == 1 else context,
    )
    caches = [
        torch.randn(rows * blocks, BLOCK, RANK + ROPE, device=DEVICE, dtype=torch.bfloat16) for _ in range(copies)
    ]
    queries = torch.randn(rows * count, HEADS * (NOPE + ROPE), device=DEVICE, dtype=torch.bfloat16)
    latents = torch.randn(rows * count, RANK + ROPE, device=DEVICE, dtype=torch.bfloat16)
    return Case(queries, latents, [shape() for _ in range(copies)], caches, batch)


def decode(rows: int, context: int) -> dict[str, float]:
    case = make(rows, 1, context)
    batch, early = case.batch, starts_early(DEVICE)
    queries = case.queries.view(rows, HEADS, NOPE + ROPE)
    absorbed = mla.prepare(queries, case.latents, case.shapes[0], case.caches[0], batch, rows, early)
    output = torch.empty(rows, HEADS, VALUE, device=DEVICE, dtype=torch.bfloat16)
    size = rows * context * (RANK + ROPE) * 2 + HEADS * (NOPE + VALUE) * RANK * 2
    whole = case.each(lambda layer, cache: latent_attention(case.queries, case.latents, layer, (cache,), batch))
    warps, mla.ATTEND_WARPS = mla.ATTEND_WARPS, 4
    narrow = case.each(lambda layer, cache: mla.attend_decodes(absorbed, layer, cache, batch, rows, output, early))
    mla.ATTEND_WARPS = warps
    return {
        "us": whole,
        "attend_4_warps": narrow,
        "prepare": case.each(lambda layer, cache: mla.prepare(queries, case.latents, layer, cache, batch, rows, early)),
        "attend": case.each(
            lambda layer, cache: mla.attend_decodes(absorbed, layer, cache, batch, rows, output, early)
        ),
        "bytes": size,
    }


def prefill(rows: int, count: int, context: int) -> dict[str, float]:
    case = make(rows, count, context)
    batch = case.batch
    pairs = rows * sum(range(context - count + 1, context + 1))
    whole = case.each(lambda layer, cache: latent_attention(case.queries, case.latents, layer, (cache,), batch))
    return {"us": whole, "flops": 2.0 * pairs * HEADS * (NOPE + ROPE + VALUE)}


def attempt(run: Callable[[], dict[str, float]]) -> dict[str, float] | str:
    """One failing case must not stop the rest."""
    try:
        return run()
    except Exception as error:  # noqa: BLE001 - one case must not stop the rest
        return f"{type(error).__name__}: {error}"[:200]


def main() -> None:
    facts = report.print_header("latent attention")
    bandwidth = read_bandwidth(DEVICE)
    results: dict[str, object] = {}
    lines = []
    for rows, context in DECODES:
        found = attempt(partial(decode, rows, context))
        results[f"decode {rows} x {context}"] = found
        if isinstance(found, str):
            lines.append(f"decode {rows:4} x {context:5}: {found}")
            continue
        rate = found["bytes"] / found["us"] * 1e6
        lines.append(
            f"decode {rows:4} x {context:5}: {found['us']:8.1f} us (prepare {found['prepare']:.1f}, attend and expand "
            f"{found['attend']:.1f}; {found['attend_4_warps']:.1f} with 4 warps)  {rate / 1e12:.2f} TB/s, "
            f"{rate / bandwidth:.0%}"
        )
    for rows, count, context in PREFILLS:
        found = attempt(partial(prefill, rows, count, context))
        results[f"prefill {rows} x {count} of {context}"] = found
        text = (
            found
            if isinstance(found, str)
            else f"{found['us']:8.1f} us  {found['flops'] / found['us'] / 1e6:.0f} TFLOP/s"
        )
        lines.append(f"prefill {rows:3} x {count:5} of {context:5}: {text}")
    report.write("mla_speed", {**facts, "bandwidth": bandwidth, "results": results}, report.folder_out())
    print(f"read bandwidth {bandwidth / 1e12:.2f} TB/s; a layer's latent attention:")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
