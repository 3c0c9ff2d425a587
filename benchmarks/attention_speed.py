"""Attention of one layer on a GPU: microseconds, bytes and operations per second of each kind of step.

    python -m benchmarks.attention_speed [--sweep] [--models r1-1.5b r1-7b] [--seconds 55] [--kv-dtype fp8]

Random queries over random paged caches; every case rotates over so many caches that none is found in the L2 cache,
inside one CUDA graph. Decode bytes are those of the cached keys and values, read once; prefill operations are those
of the causal half. ``--sweep`` times every tile and division too, which is how the built-in ones were chosen.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import torch

from benchmarks import report
from benchmarks.model_configs import CONFIGS
from engines.kernels import Fusion, GroupedQueries, PackedLinear, linear, pack_dense, rope_write_kv
from engines.kernels.attention import grouped_query_attention
from engines.kernels.cuda import decode_attention, prefill_attention
from engines.kernels.reference import quantize
from engines.models.batch import Batch

Cache = tuple[torch.Tensor, ...]
Facts = dict[str, object]

BLOCK_SIZE = 16
ROTATED_BYTES = 192 << 20
BOUND = 4096
"""Longest context that the captured steps are made for, in tokens."""
REPLAYS = 7
DECODES = [(rows, context) for context in (600, 2048) for rows in (1, 8, 32, 64, 128, 256)]
PREFILLS = [((2048,) * 4, 0, 0), ((512,) * 16, 0, 0), ((512,), 1536, 0), ((512,), 512, 64), ((128,), 0, 32)]
"""Counts of new tokens of each prompt, their cached tokens, and decode rows of 600 tokens beside them."""
DECODE_TILES = [(32, 2), (32, 4), (64, 4), (64, 8), (128, 8)]
"""Keys, warps; two warps over an fp8 cache are a line with an error (``choose_fp8_tile``)."""
PREFILL_TILES = [(128, 64, 8, 5), (128, 64, 8, 7), (64, 64, 4, 3), (64, 64, 4, 5), (64, 128, 4, 3)]
"""Pairs, keys, warps, stages."""


@dataclasses.dataclass(frozen=True)
class Heads:
    model: str
    queries: int
    keys: int
    width: int = 128
    fp8: bool = False

    @property
    def token_bytes(self) -> int:
        """Of one cached token's keys and values."""
        return 2 * self.keys * self.width * (1 if self.fp8 else 2)

    def cache(self, blocks: int) -> Cache:
        """Random keys and values, and in fp8 their scales."""
        pair = [torch.randn(blocks, BLOCK_SIZE, self.keys, self.width, device="cuda") for _ in range(2)]
        if not self.fp8:
            return tuple(tensor.bfloat16() for tensor in pair)
        scales = torch.full((2, self.keys), 2.0**-4, device="cuda")
        return *(quantize(tensor, scales[0][:, None]) for tensor in pair), scales

    def shape(self) -> GroupedQueries:
        angles = torch.rand(BOUND, self.width // 2, device="cuda") * 6
        table = torch.cat([angles.cos(), angles.sin()], dim=1)
        return GroupedQueries(self.queries, self.keys, self.width, self.width**-0.5, table)


@dataclasses.dataclass
class Case:
    """One step over several caches."""

    shape: GroupedQueries
    batch: Batch
    qkv: torch.Tensor
    hidden: torch.Tensor
    caches: list[Cache]


def make_case(heads: Heads, counts: list[int], contexts: list[int], captured: bool) -> Case:
    """Rows of these new tokens at the end of these contexts; ``captured`` with bounds as a captured step has."""
    widest = -(-max(contexts) // BLOCK_SIZE)
    blocks = sum(-(-context // BLOCK_SIZE) for context in contexts)
    order, taken = torch.randperm(blocks), 0
    tables = torch.zeros(len(counts), max(BOUND // BLOCK_SIZE, widest))
    slots, positions = [], []
    for row, (count, context) in enumerate(zip(counts, contexts, strict=True)):
        used = -(-context // BLOCK_SIZE)
        ids = order[taken : taken + used]
        tables[row, :used], taken = ids, taken + used
        place = torch.arange(context - count, context)
        positions.append(place)
        slots.append(ids[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE)
    decodes = sum(count == 1 for count in counts)
    batch = Batch(
        token_ids=torch.zeros(sum(counts), dtype=torch.int64, device="cuda"),
        positions=torch.cat(positions).cuda(),
        cache_slots=torch.cat(slots).cuda(),
        query_starts=torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device="cuda"),
        context_lengths=torch.tensor(contexts, dtype=torch.int32, device="cuda"),
        block_tables=tables[:, : None if captured else widest].int().cuda(),
        decode_rows=decodes if decodes == len(counts) or not captured else None,
        longest_query=max(counts),
        longest_context=BOUND if captured else max(contexts),
        table_rows=torch.arange(len(counts), dtype=torch.int32, device="cuda") if captured else None,
    )
    size = blocks * BLOCK_SIZE * heads.token_bytes
    caches = [heads.cache(blocks) for _ in range(max(2, min(400, ROTATED_BYTES // size)))]
    columns = (heads.queries + 2 * heads.keys) * heads.width
    qkv = torch.randn(sum(counts), columns, device="cuda", dtype=torch.bfloat16)
    hidden = qkv[:, : heads.queries * heads.width].contiguous()
    return Case(heads.shape(), batch, qkv, hidden, caches)


def microseconds(case: Case, run: Callable[[Cache], object]) -> float:
    """Median time of one call over the case's caches, in a graph."""
    run(case.caches[0])
    calls = max(len(case.caches), 16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(calls):
            run(case.caches[index % len(case.caches)])
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / calls)
    return float(statistics.median(times))


def timed(case: Case, run: Callable[[Cache], object], facts: Facts, how: str, moved: int = 0, work: float = 0) -> Facts:
    """One measurement, with the rate of ``moved`` bytes and of ``work`` operations; a failure is a line too."""
    try:
        us = microseconds(case, run)
    except Exception as error:  # noqa: BLE001 - the other configurations are still worth their time
        return {**facts, "how": how, "error": str(error)[:200]}
    line = {**facts, "how": how, "us": round(us, 2)}
    if moved:
        line["tb_s"] = round(moved / us / 1e6, 3)
    if work:
        line["tflop_s"] = round(work / us / 1e6, 1)
    return line


def decode_lines(heads: Heads, sweep: bool) -> Iterator[Facts]:
    weights = [layer_weights(heads) for _ in range(16)]
    for rows, context in DECODES:
        case = make_case(heads, [1] * rows, [context] * rows, captured=True)
        facts: Facts = {"model": heads.model, "kind": "decode", "rows": rows, "context": context}
        moved = rows * context * heads.token_bytes
        yield timed(case, partial(run_layer, case), facts, "chosen", moved)
        yield timed(case, partial(run_decode, case, None, None), facts, "chosen, none started early", moved)
        for early in (True, False):
            how = f"between its linear layers, early {early}"
            yield timed(case, partial(run_between, case, cycle(weights), early), facts, how)
        if not sweep:
            continue
        around = decode_attention.choose_splits(rows, heads.keys, BOUND, 264, 64)
        all_splits = sorted({max(1, around // 2), around, min(64, around * 3 // 2), min(64, around * 2)})
        for (keys, warps), splits in itertools.product(DECODE_TILES, all_splits):
            tile = decode_attention.DecodeTile(keys, warps)
            how = f"keys {keys} warps {warps} splits {splits}"
            yield timed(case, partial(run_decode, case, tile, splits), facts, how, moved)


def layer_weights(heads: Heads) -> tuple[PackedLinear, PackedLinear]:
    """Of the layers before and behind attention."""
    width = heads.queries * heads.width
    qkv = torch.randn(width + 2 * heads.keys * heads.width, width, device="cuda", dtype=torch.bfloat16)
    output = torch.randn(width, width, device="cuda", dtype=torch.bfloat16)
    return pack_dense(qkv / width**0.5), pack_dense(output / width**0.5)


def run_between(case: Case, weights: Iterator[tuple[PackedLinear, PackedLinear]], early: bool, cache: Cache) -> None:
    """What a step launches around attention; the step's times show what an early start hides."""
    before, behind = next(weights)
    qkv = linear(case.hidden, before)
    attended = decode_attention.attend_fused(qkv, case.shape, cache, case.batch, early=early)
    linear(attended, behind, None, Fusion(residual=attended))


def run_layer(case: Case, cache: Cache) -> None:
    grouped_query_attention(case.qkv, case.shape, cache, case.batch)


def run_decode(case: Case, tile: decode_attention.DecodeTile | None, splits: int | None, cache: Cache) -> None:
    decode_attention.attend_fused(case.qkv, case.shape, cache, case.batch, tile, splits, early=False)


def prefill_lines(heads: Heads, sweep: bool) -> Iterator[Facts]:
    for prompts, cached, decodes in PREFILLS:
        counts = [1] * decodes + list(prompts)
        case = make_case(heads, counts, [600] * decodes + [cached + count for count in prompts], bool(decodes))
        pairs = sum(count * cached + count * count / 2 for count in prompts) + 600 * decodes
        work = 4 * heads.queries * heads.width * pairs
        kind = "mixed" if decodes else "prefill"
        context = f"{len(prompts)}x{prompts[0]}+{cached}"
        facts: Facts = {"model": heads.model, "kind": kind, "rows": decodes, "context": context}
        yield timed(case, partial(run_paged, case, heads), facts, "chosen", work=work)
        moved = 4 * sum(counts) * (heads.queries + 2 * heads.keys) * heads.width
        yield timed(case, partial(run_rope, case, heads), facts, "rope and cache write", moved)
        if not sweep:
            continue
        for sizes in PREFILL_TILES:
            tile = prefill_attention.PrefillTile(*sizes)
            how = "pairs {} keys {} warps {} stages {}".format(*sizes)
            yield timed(case, partial(run_chunks, case, heads, tile), facts, how, work=work)


def queries_of(case: Case, heads: Heads) -> torch.Tensor:
    return case.qkv.view(case.qkv.shape[0], -1, heads.width)[:, : heads.queries]


def run_paged(case: Case, heads: Heads, cache: Cache) -> None:
    prefill_attention.paged_attention(queries_of(case, heads), cache, case.batch, case.shape.scale)


def run_chunks(case: Case, heads: Heads, tile: prefill_attention.PrefillTile, cache: Cache) -> None:
    queries = queries_of(case, heads)
    output = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    prefill_attention.attend_chunks(queries, cache, case.batch, case.shape.scale, output, tile)


def run_rope(case: Case, heads: Heads, cache: Cache) -> None:
    parts = case.qkv.view(case.qkv.shape[0], -1, heads.width)
    queries, keys, values = parts.split_with_sizes((heads.queries, heads.keys, heads.keys), dim=1)
    positions, slots = case.batch.positions, case.batch.cache_slots
    rope_write_kv(
        queries, keys, values, positions, case.shape.cos_sin, interleaved=False, cache=cache, cache_slots=slots
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["r1-1.5b", "r1-7b"], default=["r1-1.5b", "r1-7b"])
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--kv-dtype", choices=["bfloat16", "fp8"], default="bfloat16")
    parser.add_argument("--seconds", type=float, default=55, help="no case is begun later than this")
    arguments = parser.parse_args()
    started, lines = time.perf_counter(), []
    fp8 = arguments.kv_dtype == "fp8"
    how = f"bf16 over a {arguments.kv_dtype} cache"
    print(f"# attention of one layer, {how}: {torch.cuda.get_device_name()}, commit {report.commit()}", flush=True)
    for model, measure in itertools.product(arguments.models, (decode_lines, prefill_lines)):
        config = CONFIGS[model]
        heads = Heads(model, config["num_attention_heads"], config["num_key_value_heads"], fp8=fp8)
        for line in measure(heads, arguments.sweep):
            lines.append(line)
            print("  ".join(f"{value}" for value in line.values()), flush=True)
            if time.perf_counter() - started > arguments.seconds:
                print(f"# stopped after {arguments.seconds:.0f} s")
                break
    facts = {"device": torch.cuda.get_device_name(), "commit": report.commit(), "kv_dtype": arguments.kv_dtype}
    result = {**facts, "lines": lines}
    report.write(f"attention_speed{'_fp8' if fp8 else ''}", result, report.folder_out())


if __name__ == "__main__":
    main()
