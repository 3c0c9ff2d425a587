"""SmolLM2 in float32: our greedy output equals that of ``transformers`` on the same prompts and dequantized weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engines.manifest import Manifest, read_manifest
from engines.models.config import parse_config
from engines.models.gguf_reader import GgufReader
from engines.models.loader import Model, build_model, load_model
from engines.models.weights import FileSource, Placement
from engines.protocol import EngineSpec
from server.text.model_text import load_text
from tests.paged_rows import PagedRows
from tests.smollm2_reference import reference_model

OUTPUT = 64
QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain photosynthesis in two sentences.",
    "List five prime numbers above 100.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Pride and Prejudice?",
    "Give me a recipe for pancakes.",
    "What is 17 times 23?",
    "Describe the colour blue to someone who cannot see.",
    "How do I reverse a list in Python?",
    "Why is the sky dark at night?",
    "Name three rivers in Africa.",
    "Name the planets of the solar system.",
    "What does HTTP stand for?",
    "Summarise the plot of Hamlet.",
)
TEXTS = (
    "The quick brown fox jumps over the lazy dog. Then",
    "def fibonacci(n):\n    ",
    "1, 2, 4, 8, 16,",
    "Once upon a time, in a village by the mountains, there lived",
    "In 1969, the Apollo 11 mission",
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def prompts(smollm2_manifest: Manifest) -> list[list[int]]:
    text = load_text(smollm2_manifest)
    chats = [text.render_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    return [text.encode(chat, add_special=False) for chat in chats] + [
        text.encode(plain, add_special=True) for plain in TEXTS
    ]


@pytest.fixture(scope="module")
def smollm2_manifest(smollm2_path: Path) -> Manifest:
    return read_manifest(smollm2_path)


def test_greedy_output_is_the_same(smollm2_manifest: Manifest, prompts: list[list[int]]) -> None:
    assert len(prompts) == 20
    ours, margins = our_greedy(smollm2_manifest, prompts)
    theirs = their_greedy(smollm2_manifest, prompts)
    for number, (left, right) in enumerate(zip(ours, theirs, strict=True)):
        assert left == right, f"prompt {number}, best logit ahead by at least {margins[number]}"


def test_blocks_kept_as_they_are_hardly_change_the_distributions(
    smollm2_manifest: Manifest, prompts: list[list[int]]
) -> None:
    """The file's blocks may be multiplied with rounded inputs."""
    spec = EngineSpec(name="smollm2", max_model_len=512, keep_quantized=True)
    kept = load_model(smollm2_manifest, spec, torch.device("cpu"), torch.float32, lambda progress: None)
    exact = dequantized_model(smollm2_manifest)
    step, longest = dict(enumerate(prompts)), max(map(len, prompts))
    ours, theirs = (
        torch.cat(list(PagedRows(model, len(prompts), longest, block_size=16).step(step).values())).log_softmax(dim=1)
        for model in (kept, exact)
    )
    divergence = (theirs.exp() * (theirs - ours)).sum(dim=1).mean()
    assert divergence < 0.02
    assert (ours.argmax(dim=1) == theirs.argmax(dim=1)).float().mean() > 0.95
    assert kept.weight_bytes < exact.weight_bytes / 3


def dequantized_model(manifest: Manifest) -> Model:
    placement = Placement(device=torch.device("cpu"), dtype=torch.float32)
    reader = GgufReader(manifest.source, manifest.config["head_dim"])
    source = FileSource(placement, reader, lambda progress: None, total=1)
    return build_model(parse_config(manifest), source, positions=512)


def our_greedy(manifest: Manifest, prompts: list[list[int]]) -> tuple[list[list[int]], list[float]]:
    """Tokens by prompt, all rows in each step, and by how much the best logit was ahead where it was closest."""
    model = dequantized_model(manifest)
    rows = PagedRows(model, len(prompts), max(map(len, prompts)) + OUTPUT, block_size=16)
    outputs: list[list[int]] = [[] for _ in prompts]
    margins = [torch.inf] * len(prompts)
    step = dict(enumerate(prompts))
    for _ in range(OUTPUT):
        for row, logits in rows.step(step).items():
            best, second = logits[-1].topk(2).values.tolist()
            margins[row] = min(margins[row], best - second)
            outputs[row].append(int(logits[-1].argmax()))
        step = {row: output[-1:] for row, output in enumerate(outputs)}
    return outputs, margins


def their_greedy(manifest: Manifest, prompts: list[list[int]]) -> list[list[int]]:
    """As one batch, padded on the left; end tokens do not end it."""
    reference = reference_model(manifest)
    reference.generation_config.eos_token_id = None
    longest = max(map(len, prompts))
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    with torch.inference_mode():
        generated = reference.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=OUTPUT,
            pad_token_id=0,
        )
    rows: list[list[int]] = generated[:, longest:].tolist()
    return rows
