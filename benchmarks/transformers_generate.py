"""Peer for ``cpu_generation``: transformers ``generate`` in fp32, sequential and as one static batch. Prints JSON."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu_generation import OUTPUT_TOKENS, fresh_prompts
from engines.manifest import read_manifest
from tests.smollm2_reference import reference_model


def generate(model: Any, prompts: list[list[int]]) -> None:
    ids = torch.tensor(prompts)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=OUTPUT_TOKENS,
        max_new_tokens=OUTPUT_TOKENS,
        pad_token_id=0,
    )
    assert output.shape[1] == ids.shape[1] + OUTPUT_TOKENS


def main() -> None:
    path, repeats, *stream_counts = sys.argv[1:]
    model = reference_model(read_manifest(Path(path)))
    randomness = random.Random()
    rows: list[dict[str, object]] = []
    for _ in range(int(repeats)):
        for count in map(int, stream_counts):
            prompts = fresh_prompts(Path(path), count, randomness)
            # One prompt after the other runs at one rate whatever their number: four are enough to measure it.
            sample = prompts[:4]
            started = time.perf_counter()
            for prompt in sample:
                generate(model, [prompt])
            rate = len(sample) * OUTPUT_TOKENS / (time.perf_counter() - started)
            rows.append({"name": "transformers sequential", "streams": count, "rate": rate})
            started = time.perf_counter()
            generate(model, prompts)
            rate = count * OUTPUT_TOKENS / (time.perf_counter() - started)
            rows.append({"name": "transformers static batch", "streams": count, "rate": rate})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
