"""Quantizes a model by llm-compressor, for ``compression_peer``: runs in that library's own environment.

    python benchmarks/llm_compressor_run.py JOB.json

The job names the model's folder, the file of calibration windows, the method, the group size and the folder to write.
The last line of output is JSON: versions and seconds.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any


def recipe(method: str, group_size: int) -> list[Any]:
    """4 bits with zero points, linear layers without the head; all else is the library's default."""
    quantization = importlib.import_module("compressed_tensors.quantization")
    weights = quantization.QuantizationArgs(num_bits=4, strategy="group", group_size=group_size, symmetric=False)
    groups = {"group_0": quantization.QuantizationScheme(targets=["Linear"], weights=weights)}
    rounding = importlib.import_module("llmcompressor.modifiers.quantization")
    if method == "gptq":
        gptq = importlib.import_module("llmcompressor.modifiers.gptq")
        return [gptq.GPTQModifier(config_groups=groups, ignore=["lm_head"])]
    awq = importlib.import_module("llmcompressor.modifiers.transform.awq")
    if not importlib.import_module("torch").accelerator.is_available():
        # It pins what it caches for a copy to the device, which fails where there is none.
        cache = importlib.import_module("llmcompressor.pipelines.cache").IntermediatesCache
        cache.pin_memory = lambda self, batch_index, input_names=None: None
    return [awq.AWQModifier(), rounding.QuantizationModifier(config_groups=groups, ignore=["lm_head"])]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch = importlib.import_module("torch")
    torch.set_num_threads(job["threads"])
    transformers = importlib.import_module("transformers")
    datasets = importlib.import_module("datasets")
    library = importlib.import_module("llmcompressor")
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    tokens = importlib.import_module("safetensors.torch").load_file(job["windows"])["tokens"].tolist()
    rows = {"input_ids": tokens, "attention_mask": [[1] * len(window) for window in tokens]}
    begun = time.monotonic()
    model = library.oneshot(
        model=model,
        tokenizer=transformers.AutoTokenizer.from_pretrained(job["model"]),
        dataset=datasets.Dataset.from_dict(rows),
        recipe=recipe(job["method"], job["group_size"]),
        num_calibration_samples=len(tokens),
        max_seq_length=len(tokens[0]),
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )
    seconds = time.monotonic() - begun
    model.save_pretrained(job["out"], save_compressed=True)
    transformers.AutoTokenizer.from_pretrained(job["model"]).save_pretrained(job["out"])
    names = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    print(json.dumps({"seconds": seconds, "versions": {name: metadata.version(name) for name in names}}))


if __name__ == "__main__":
    main()
