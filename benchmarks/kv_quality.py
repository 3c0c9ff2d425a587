"""What an fp8 KV cache costs in quality: perplexity, and how often the best next token is still the same.

    python -m benchmarks.kv_quality [--model smollm2-135m] [--windows 8] [--tokens 512]

Text of WikiText-2 in windows that begin with the first token of every text, computed in float32 on the CPU by the same
kernels that serve; only the KV cache differs. KL is that of the next token's distribution from the float32 cache's.
Needs ``../shared/data/text/wikitext-2-valid.txt``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import report
from engines.generation import kv_cache
from engines.generation.calibration import choose_scales
from engines.generation.placement import KV_DTYPES
from engines.manifest import read_manifest
from engines.models.batch import Batch
from engines.models.loader import load_model
from engines.models.model import Model
from engines.protocol import EngineSpec
from server.catalog import resolve
from server.text.model_text import load_text

TEXT = report.ROOT.parent / "shared" / "data" / "text" / "wikitext-2-valid.txt"
CPU = torch.device("cpu")
WIDTHS = (20, 12, 10, 10, 12)


@dataclass(frozen=True, slots=True)
class Quality:
    cache: str
    perplexity: float
    ratio: float
    """To the perplexity over a float32 cache."""
    same_best: float
    """Share of positions at which the best next token is that over a float32 cache."""
    divergence: float
    """Mean KL of the next token's distribution, in nats."""


def windows(source: Path, count: int, tokens: int) -> list[list[int]]:
    """So many parts of the text, ``tokens`` ids each with the first one of every text."""
    manifest = read_manifest(source)
    ids = load_text(manifest).encode(TEXT.read_text()[: count * tokens * 8], add_special=False)
    first = [] if manifest.bos_token_id is None else [manifest.bos_token_id]
    size = tokens - len(first)
    return [first + ids[number * size : (number + 1) * size] for number in range(count)]


def next_tokens(
    model: Model, rows: Sequence[Sequence[int]], dtype: torch.dtype, scales: Sequence[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """(T, vocab) log probabilities of each row's next tokens, computed over a cache of this type and these scales."""
    for row in rows:
        blocks, places = -(-len(row) // kv_cache.BLOCK_SIZE), torch.arange(len(row))
        batch = Batch(
            token_ids=torch.tensor(row),
            positions=places,
            cache_slots=places,
            query_starts=torch.tensor([0, len(row)], dtype=torch.int32),
            context_lengths=torch.tensor([len(row)], dtype=torch.int32),
            block_tables=torch.arange(blocks, dtype=torch.int32).unsqueeze(0),
            decode_rows=0,
            longest_query=len(row),
            longest_context=len(row),
        )
        caches = kv_cache.allocate(model.kv_layout, blocks, kv_cache.BLOCK_SIZE, dtype, CPU, scales)
        yield model.logits(model.forward(batch, caches)).log_softmax(-1)


def measure(
    name: str,
    model: Model,
    rows: Sequence[Sequence[int]],
    scales: Sequence[torch.Tensor],
    wanted: Sequence[torch.Tensor],
    plain: float,
) -> Quality:
    """``wanted`` are the log probabilities over a float32 cache, ``plain`` their perplexity."""
    dtype = KV_DTYPES[name.split()[0]]
    losses, same, divergence = [], [], []
    for row, found, expected in zip(rows, next_tokens(model, rows, dtype, scales), wanted, strict=True):
        losses.append(loss(row, found))
        same.append((found.argmax(-1) == expected.argmax(-1)).float().mean().item())
        divergence.append((expected.exp() * (expected - found)).sum(-1).mean().item())
    perplexity, count = math.exp(sum(losses) / len(losses)), len(rows)
    return Quality(name, perplexity, perplexity / plain, sum(same) / count, sum(divergence) / count)


def loss(row: Sequence[int], found: torch.Tensor) -> float:
    """Mean negative log probability of the row's own next tokens."""
    return -found[:-1].gather(1, torch.tensor(row[1:]).unsqueeze(1)).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if not TEXT.is_file():
        parser.exit(message=f"skipped: there is no shared/data/text/{TEXT.name} beside this checkout\n")
    torch.set_num_threads(arguments.threads)
    machine = report.print_header("Quality over KV caches")
    source = resolve(arguments.model)
    rows = windows(source, arguments.windows, arguments.tokens)
    manifest = read_manifest(source)
    spec = EngineSpec(name=arguments.model, max_model_len=arguments.tokens)
    model = load_model(manifest, spec, CPU, torch.float32, lambda progress: None)
    wanted = list(next_tokens(model, rows, torch.float32, ()))
    plain = math.exp(sum(map(loss, rows, wanted)) / len(rows))
    calibrated = choose_scales(model, manifest.bos_token_id, arguments.tokens, torch.float32, CPU)
    narrow = tuple(layer / 64 for layer in calibrated)
    cases: list[tuple[str, Sequence[torch.Tensor]]] = [("bfloat16", ()), ("fp8 calibrated", calibrated)]
    cases += [("fp8 scale 1", ()), ("fp8 scales / 64", narrow)]
    print(f"float32 cache: perplexity {plain:.3f}, {arguments.windows} windows of {arguments.tokens} tokens")
    print(report.row(("cache", "perplexity", "ratio", "same best", "KL"), WIDTHS))
    lines = []
    for name, scales in cases:
        line = measure(name, model, rows, scales, wanted, plain)
        lines.append(line)
        cells = (name, f"{line.perplexity:.3f}", f"{line.ratio:.4f}", f"{line.same_best:.2%}", f"{line.divergence:.5f}")
        print(report.row(cells, WIDTHS), flush=True)
    facts = {"model": arguments.model, "windows": arguments.windows, "tokens": arguments.tokens, "plain": plain}
    result = {"machine": machine, **facts, "caches": [asdict(line) for line in lines]}
    print(f"written to {report.write('kv_quality_cpu', result)}")


if __name__ == "__main__":
    main()
