"""Makes the quantized checkpoints beside it, with the libraries that define their formats.

    python -m venv reference && reference/bin/pip install "llmcompressor==0.14.0.1" "auto-round==0.15.1"
    reference/bin/python tests/data/quantized/make.py [NAME...]

Each folder is a random two-layer model as that library writes it, with ``expected.json``: SHA-256 of each linear
layer's weight as that library dequantizes it, in the type of its scales. The tests read these files without it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from auto_round import AutoRound
from auto_round.export.export_to_awq.utils import dequantize_gemm
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import match_name
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

HERE = Path(__file__).parent
VOCAB, WIDTH = 64, 64
CONFIG = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    intermediate_size=WIDTH,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
    dtype="bfloat16",
)
HEAD = ["lm_head"]


def new_model(dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=dtype)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            # Unlike a grid's own numbers, with zero points off the middle.
            parameter.data.normal_(0.02 if "proj" in name else 0, 0.1)
    return model


def inputs() -> Dataset:
    tokens = torch.randint(0, VOCAB, (32, 48), generator=torch.Generator().manual_seed(1)).tolist()
    return Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * 48] * 32})


def weights(bits: int, strategy: str, **values: object) -> QuantizationArgs:
    return QuantizationArgs(num_bits=bits, strategy=strategy, **values)


def by_token(kind: str = "int") -> QuantizationArgs:
    return QuantizationArgs(num_bits=8, type=kind, strategy="token", dynamic=True)


def fixed(kind: str = "int") -> QuantizationArgs:
    return QuantizationArgs(num_bits=8, type=kind, strategy="tensor", dynamic=False)


def compressor(*schemes: QuantizationScheme, gptq: bool = False) -> Callable[[Path], None]:
    """llm-compressor's files of these schemes."""

    def make(folder: Path) -> None:
        config = {f"group_{index}": scheme for index, scheme in enumerate(schemes)}
        modifier = (GPTQModifier if gptq else QuantizationModifier)(config_groups=config, ignore=HEAD)
        data = any(scheme.input_activations and not scheme.input_activations.dynamic for scheme in schemes)
        calibration = {"dataset": inputs(), "processor": words(), "max_seq_length": 48, "num_calibration_samples": 32}
        with tempfile.TemporaryDirectory() as source:
            new_model().save_pretrained(source)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
            model = oneshot(model=model, recipe=[modifier], **(calibration if data or gptq else {}))
            model.save_pretrained(folder, save_compressed=True)
        finish(folder, dequantized_by_compressed_tensors(folder))

    return make


def dequantized_by_compressed_tensors(folder: Path) -> dict[str, torch.Tensor]:
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(
        {key: stored[key] for key in ("config_groups", "format", "ignore", "quant_method")}
    )
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for name in layers(tensors):
        scheme = next(
            scheme
            for scheme in config.config_groups.values()
            if any(target == "Linear" or match_name(name, target) for target in scheme.targets)
        )
        parts = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        kind = BaseCompressor.get_value_from_registry(scheme.format or config.format)
        found[name] = kind.decompress(parts, scheme)["weight"]
    return found


def layers(tensors: dict[str, torch.Tensor]) -> list[str]:
    return sorted({name.rpartition(".")[0] for name in tensors if "_proj." in name})


def rounded(form: str, bits: int, symmetric: bool) -> Callable[[Path], None]:
    """AutoRound's files in another tool's format."""

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as source:
            new_model(torch.float16).save_pretrained(source)
            words().save_pretrained(source)
            tool = AutoRound(
                source, bits=bits, group_size=32, sym=symmetric, iters=0, disable_opt_rtn=True, device_map="cpu"
            )
            tool.quantize_and_save(str(folder), format=form)
        written = next(folder.rglob("config.json")).parent
        if written != folder:
            for path in written.iterdir():
                shutil.move(path, folder / path.name)
            written.rmdir()
        tensors = load_file(folder / "model.safetensors")
        read = dequantized_awq if form == "auto_awq" else dequantized_gptq
        finish(folder, {name: read(tensors, name, bits) for name in layers(tensors)})

    return make


def words() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({f"w{token}": token for token in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w2")


def dequantized_awq(tensors: dict[str, torch.Tensor], name: str, bits: int) -> torch.Tensor:
    parts = [tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")]
    return dequantize_gemm(*parts, bits, 32).t()


def dequantized_gptq(tensors: dict[str, torch.Tensor], name: str, bits: int) -> torch.Tensor:
    """By the library's own layer, applied to the identity: each output is one weight and zeros."""
    packed = tensors[f"{name}.qweight"]
    width, outputs = packed.shape[0] * 32 // bits, packed.shape[1]
    layer = QuantLinear(bits, 32, width, outputs, False, g_idx=True)
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        setattr(layer, part, tensors[f"{name}.{part}"])
    return layer(torch.eye(width, dtype=torch.float16)).t()


def act_order(folder: Path) -> None:
    """AutoRound's file with the input's columns in another order: what ``desc_act`` gives."""
    rounded("auto_gptq", 4, False)(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in layers(tensors):
        codes = tensors[f"{name}.qweight"]
        nibbles = torch.stack([codes >> 4 * place & 15 for place in range(8)], dim=1).flatten(0, 1)
        order = torch.randperm(nibbles.shape[0], generator=torch.Generator().manual_seed(3))
        mixed = nibbles[order].unflatten(0, (-1, 8))
        tensors[f"{name}.qweight"] = sum(mixed[:, place] << 4 * place for place in range(8)).int()
        tensors[f"{name}.g_idx"] = tensors[f"{name}.g_idx"][order]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (folder / "config.json").write_text(json.dumps(config))
    finish(folder, {name: dequantized_gptq(tensors, name, 4) for name in layers(tensors)})


def finish(folder: Path, values: dict[str, torch.Tensor]) -> None:
    digests = {}
    for name, value in values.items():
        raw = value.contiguous().view(torch.int16).numpy().tobytes()
        digests[name] = {"dtype": str(value.dtype).removeprefix("torch."), "sha256": hashlib.sha256(raw).hexdigest()}
    (folder / "expected.json").write_text(json.dumps(digests, indent=1) + "\n")
    for path in folder.iterdir():
        path.chmod(0o644)
        if path.name not in ("config.json", "expected.json", "model.safetensors"):
            path.unlink()


LINEAR = ["Linear"]
CASES: dict[str, Callable[[Path], None]] = {
    "int4-g32": compressor(QuantizationScheme(targets=LINEAR, weights=weights(4, "group", group_size=32))),
    "int4-g32-asym-gptq": compressor(
        QuantizationScheme(targets=LINEAR, weights=weights(4, "group", group_size=32, symmetric=False)), gptq=True
    ),
    "int4-channel-asym": compressor(QuantizationScheme(targets=LINEAR, weights=weights(4, "channel", symmetric=False))),
    "int3-channel": compressor(QuantizationScheme(targets=LINEAR, weights=weights(3, "channel"))),
    "int8-g32-packed": compressor(QuantizationScheme(targets=LINEAR, weights=weights(8, "group", group_size=32))),
    "w8a8-dynamic": compressor(
        QuantizationScheme(targets=LINEAR, weights=weights(8, "channel"), input_activations=by_token())
    ),
    "w8a8-static": compressor(
        QuantizationScheme(targets=LINEAR, weights=weights(8, "tensor"), input_activations=fixed())
    ),
    "fp8-dynamic": compressor(
        QuantizationScheme(
            targets=LINEAR, weights=weights(8, "channel", type="float"), input_activations=by_token("float")
        )
    ),
    "fp8-static": compressor(
        QuantizationScheme(targets=LINEAR, weights=weights(8, "tensor", type="float"), input_activations=fixed("float"))
    ),
    "fp8-block": compressor(
        QuantizationScheme(
            targets=LINEAR,
            weights=weights(8, "block", type="float", block_structure=[48, 48]),
            input_activations=QuantizationArgs(num_bits=8, type="float", strategy="group", group_size=32, dynamic=True),
        )
    ),
    "mixed": compressor(
        QuantizationScheme(targets=["re:.*self_attn.*"], weights=weights(8, "channel"), input_activations=by_token()),
        QuantizationScheme(targets=["re:.*mlp.*"], weights=weights(4, "group", group_size=32)),
    ),
    "gptq-4": rounded("auto_gptq", 4, True),
    "gptq-8-asym": rounded("auto_gptq", 8, False),
    "gptq-4-act-order": act_order,
    "awq-4": rounded("auto_awq", 4, False),
}


def main() -> None:
    for name in sys.argv[1:] or CASES:
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        CASES[name](folder)
        print(name, sum(path.stat().st_size for path in folder.iterdir()))


if __name__ == "__main__":
    main()
