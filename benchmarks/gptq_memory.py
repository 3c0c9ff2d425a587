"""Memory that GPTQ takes on the layers of a 7B model, against what it may take.

The bound: two layers in float32, three matrices of the widest input (the Hessian and what its inverse takes), and the
activations of the calibration windows. Random weights, on the CPU; each layer goes the way of `slimserve compress`.

    python -m benchmarks.gptq_memory [--layers 2] [--windows 4] [--tokens 128] [--width 18944]
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import psutil
import torch

from compression.calibrated_layer import LayerWeights
from compression.hidden_states import HiddenStates
from compression.layerwise import LayerQuantizer, make_window
from compression.plan import layer_index, linear_layers, make_plan
from compression.recipe import load_recipe
from engines.manifest import read_manifest
from engines.models.config import ModelConfig, parse_config
from engines.models.rope import cos_sin_table

CPU = torch.device("cpu")
QWEN2_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "eos_token_id": 151645,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--width", type=int, default=QWEN2_7B["intermediate_size"], help="of the feed-forward part")
    given = parser.parse_args()
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        (Path(folder) / "config.json").write_text(json.dumps({**QWEN2_7B, "intermediate_size": given.width}))
        config = parse_config(read_manifest(Path(folder), random_weights=True))
        measure(config, Path(folder), given.layers, given.windows, given.tokens)


def measure(config: ModelConfig, folder: Path, layers: int, windows: int, tokens: int) -> None:
    """Quantize so many layers; prints the bound and the most that each took."""
    torch.manual_seed(0)
    linears = linear_layers(config)
    plan = make_plan(load_recipe("int4-g128"), linears, [], torch.bfloat16)
    recipe = load_recipe("int4-g128")
    quantizer = LayerQuantizer(config, recipe, plan, cos_sin_table(config.rope, tokens, CPU), CPU, 4 << 30)
    rows = [make_window(torch.randint(config.vocab, (tokens,)), config, CPU) for _ in range(windows)]
    streams = [HiddenStates(folder / f"{place}.bin", windows, tokens, config.hidden) for place in range(layers + 1)]
    for window in range(windows):
        streams[0].write(window, torch.randn(tokens, config.hidden))
    process = psutil.Process()
    start = process.memory_info().rss
    widest = max(layer.in_features for layer in linears)
    own = [layer for layer in linears if layer_index(layer.name) == 0]
    layer_bytes = 4 * sum(layer.out_features * layer.in_features for layer in own)
    activations = 4 * windows * tokens * 2 * (config.hidden + widest)
    bound = 2 * layer_bytes + 3 * 4 * widest**2 + activations
    print(f"bound: 2 x {layer_bytes / 1e9:.2f} + 3 x {4 * widest**2 / 1e9:.2f} + {activations / 1e9:.2f} GB")
    for index in range(layers):
        reset_peak()
        began = time.perf_counter()
        weights = LayerWeights(random_layer(config, index))
        quantizer.quantize(index, weights, rows, streams[index], streams[index + 1])
        peak = peak_bytes() - start
        del weights
        seconds = time.perf_counter() - began
        print(f"layer {index}: {peak / 1e9:.2f} GB, {peak / bound:.2f} of the bound, {seconds:.0f} s")


def random_layer(config: ModelConfig, index: int) -> dict[str, torch.Tensor]:
    """Weights whose products keep the size of their inputs."""
    name = f"model.layers.{index}"
    tensors = {
        f"{name}.{norm}.weight": torch.ones(config.hidden) for norm in ("input_layernorm", "post_attention_layernorm")
    }
    for layer in linear_layers(config):
        if layer_index(layer.name) == index:
            tensors[f"{layer.name}.weight"] = (
                torch.randn(layer.out_features, layer.in_features) / layer.in_features**0.5
            )
            if layer.name.endswith(("q_proj", "k_proj", "v_proj")):
                tensors[f"{layer.name}.bias"] = torch.zeros(layer.out_features)
    return tensors


def reset_peak() -> None:
    """Linux: forget the largest resident size so far."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The largest resident size since ``reset_peak``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the system does not say how much memory was used")


if __name__ == "__main__":
    main()
