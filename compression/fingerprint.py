"""Makes the logit fingerprint of a finished model; ``engines.generation.verify`` checks it at a first load."""

from __future__ import annotations

from pathlib import Path

import torch

from engines.engine_folder import LogitFingerprint
from engines.generation.placement import dtype_name
from engines.generation.verify import TOLERANCES, largest_difference, logprobs_of, tolerance_key
from engines.generation.whole_prompts import WholePrompts
from engines.manifest import Manifest, read_manifest
from engines.models.loader import load_model
from engines.protocol import EngineSpec
from server.text import ModelText, load_text

LONGEST = 32
"""Tokens of a prompt."""
ALTERNATIVES = 8
"""Likeliest next tokens that are kept of each prompt."""
MARGIN = 4.0
"""The tolerance of another dtype is so many times the difference that was measured, where the usual one is less."""
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return",
    "In 1969, the Apollo 11 mission landed the first people on the",
    "1, 2, 3, 5, 8, 13, 21,",
    "Water boils at a temperature of 100 degrees",
    '<div class="header"><h1>Welcome</h1></',
    "Le petit chat noir dort sur la",
    "SELECT name, price FROM products WHERE price >",
    "She opened the door and saw that the whole room was",
    "The mitochondria is the powerhouse of the",
    "Dear Sir or Madam,\n\nI am writing to",
    "7 times 8 equals",
    "Die Hauptstadt von Deutschland ist",
    "To be, or not to be, that is the",
    "import numpy as np\nx = np.",
    "The three primary colours are red, yellow and",
    "Once upon a time there was a king who had three",
    "The opposite of hot is",
    "Q: How many legs does a spider have?\nA:",
    "According to the weather report, tomorrow will be",
)
"""Texts of several kinds and languages, so that a wrong part of the model shows in some of them."""


def make_fingerprint(folder: Path, device: torch.device) -> LogitFingerprint:
    """Of the model in ``folder`` as the engine loads it, in float32. Raises EngineLoadError."""
    manifest = read_manifest(folder)
    text = load_text(manifest)
    try:
        prompts = [_encode(text, prompt) for prompt in PROMPTS]
    finally:
        text.close()
    whole = _prompts(manifest, device, torch.float32)
    best = whole.last_logprobs(prompts).topk(min(ALTERNATIVES, manifest.vocab_size), dim=-1)
    tokens, logprobs = best.indices.tolist(), best.values.tolist()
    del whole
    rounded = logprobs_of(_prompts(manifest, device, torch.bfloat16), prompts, tokens)
    tolerances = dict(TOLERANCES)
    key = tolerance_key(device, torch.bfloat16)
    tolerances[key] = max(tolerances[key], MARGIN * largest_difference(rounded, logprobs))
    return LogitFingerprint(prompts=prompts, tokens=tokens, logprobs=logprobs, tolerances=tolerances)


def _encode(text: ModelText, prompt: str) -> list[int]:
    """At least one token, which a vocabulary without the text's characters would not give."""
    return text.encode(prompt)[:LONGEST] or [0]


def _prompts(manifest: Manifest, device: torch.device, dtype: torch.dtype) -> WholePrompts:
    spec = EngineSpec(
        name=manifest.source.name,
        device=str(device),
        dtype=dtype_name(dtype),
        max_model_len=min(LONGEST, manifest.max_context),
    )
    return WholePrompts(load_model(manifest, spec, device, dtype, lambda progress: None), device, dtype)
