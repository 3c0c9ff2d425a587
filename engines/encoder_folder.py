"""An encoder's folder (BERT family) as sentence-transformers and transformers write it. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from engines.fields import Fields
from engines.manifest import LARGEST_JSON, read_headers, read_json
from engines.protocol import EngineLoadError

Activation = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"]
Pooling = Literal["mean", "cls", "max"]

WIDEST = 1 << 16
MOST_LAYERS = 256
POOLING_KEYS: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}
MODULES = {"Transformer", "Pooling", "Normalize"}


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The shapes of one encoder of the BERT family."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocab: int
    positions: int
    """Longest sequence in tokens."""
    position_offset: int
    """Row of the position table that the first token takes: RoBERTa leaves out the rows up to its padding id."""
    token_types: int
    eps: float
    activation: Activation
    labels: int = 0
    """Outputs of a classification head over the pooled first token; 0 where the model has none."""


@dataclass(frozen=True, kw_only=True)
class EncoderFolder:
    """All that running the model needs, but for the weights themselves."""

    source: Path
    config: EncoderConfig
    pooling: Pooling
    normalise: bool
    """Embeddings are scaled to length 1."""
    max_tokens: int
    """Longest text, special tokens included; longer ones are cut."""
    pad_token_id: int
    tokenizer: Path
    files: tuple[Path, ...]
    fingerprint: str
    """SHA-256 over configs and the weight files' bytes."""


def is_encoder_folder(folder: Path) -> bool:
    """Whether ``config.json`` names an encoder that ``read_encoder_folder`` knows. Raises nothing."""
    try:
        return read_json(folder / "config.json").get("model_type") in ("bert", "roberta", "xlm-roberta")
    except EngineLoadError:
        return False


def read_encoder_folder(folder: Path) -> EncoderFolder:
    """Read and check the configs and the weights' headers; hashes the weights, 1 GB in about 1 s.

    Raises EngineLoadError for what is missing, damaged or not supported.
    """
    if not (folder / "config.json").is_file():
        raise EngineLoadError(f"{folder.name} has no config.json: give the folder of a Hugging Face encoder")
    raw = read_json(folder / "config.json")
    config = _parse_config(Fields(raw, "config.json"))
    pooling, normalise = _read_pooling(folder, config)
    headers = read_headers(folder)
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise EngineLoadError(f"{folder.name} has no tokenizer.json; fetch the model again, with all its files")
    lengths = _optional(folder / "sentence_bert_config.json")
    described = json.dumps([raw, pooling, normalise], sort_keys=True, default=str)
    return EncoderFolder(
        source=folder,
        config=config,
        pooling=pooling,
        normalise=normalise,
        max_tokens=lengths.count("max_seq_length", config.positions, most=config.positions),
        pad_token_id=_pad_token(Fields(raw, "config.json")),
        tokenizer=tokenizer,
        files=tuple(headers),
        fingerprint=_fingerprint(described, tuple(headers)),
    )


def _parse_config(fields: Fields) -> EncoderConfig:
    kind = fields.text("model_type")
    if kind not in ("bert", "roberta", "xlm-roberta"):
        raise EngineLoadError(f"{fields.name}: {kind[:80]!r} is no encoder that is known; bert and roberta are")
    classes = fields.texts("architectures")
    labelled = bool(classes) and classes[0] == "BertForSequenceClassification"
    if classes and not labelled and not classes[0].endswith(("BertModel", "RobertaModel")):
        raise EngineLoadError(f"{fields.name}: {classes[0][:80]} has a head that is not supported")
    if fields.text("position_embedding_type", "absolute") != "absolute":
        raise fields.fail("position_embedding_type", "'absolute'; relative positions are not supported")
    if fields.flag("is_decoder") or fields.flag("add_cross_attention"):
        raise EngineLoadError(f"{fields.name}: this is a decoder; an encoder reads the whole text at once")
    activation = next((name for name in get_args(Activation) if name == fields.text("hidden_act", "gelu")), None)
    if activation is None:
        raise fields.fail("hidden_act", f"one of {', '.join(get_args(Activation))}")
    hidden, heads = fields.count("hidden_size", most=WIDEST), fields.count("num_attention_heads", most=WIDEST)
    if hidden % heads:
        raise fields.fail("num_attention_heads", f"a divisor of hidden_size, {hidden}")
    rows = fields.count("max_position_embeddings", most=1 << 20)
    offset = 0 if kind == "bert" else _pad_token(fields) + 1
    if offset >= rows:
        raise fields.fail("max_position_embeddings", f"more than {offset}")
    return EncoderConfig(
        layers=fields.count("num_hidden_layers", most=MOST_LAYERS),
        hidden=hidden,
        heads=heads,
        intermediate=fields.count("intermediate_size", most=WIDEST),
        vocab=fields.count("vocab_size", most=1 << 24),
        positions=rows - offset,
        position_offset=offset,
        token_types=fields.count("type_vocab_size", 2, most=1024),
        eps=fields.number("layer_norm_eps", 1e-12),
        activation=activation,
        labels=_labels(fields) if labelled else 0,
    )


def _labels(fields: Fields) -> int:
    names = fields.section("id2label").values
    return len(names) if names else fields.count("num_labels", 2, most=WIDEST)


def _pad_token(fields: Fields) -> int:
    default = 0 if fields.text("model_type") == "bert" else 1
    return next(iter(fields.token_ids("pad_token_id")), default)


def _read_pooling(folder: Path, config: EncoderConfig) -> tuple[Pooling, bool]:
    """What ``modules.json`` lists; mean pooling without scaling where there is none, as sentence-transformers does."""
    path = folder / "modules.json"
    if not path.is_file():
        return "mean", False
    kinds: dict[str, str] = {}
    for module in _read_list(path):
        entry = Fields(module, path.name)
        kind = entry.text("type").rpartition(".")[2]
        if kind not in MODULES:
            raise EngineLoadError(f"{path.name}: the module {kind[:80]} is not supported; {', '.join(sorted(MODULES))}")
        kinds[kind] = entry.text("path", "")
    if "Pooling" not in kinds:
        raise EngineLoadError(f"{path.name} lists no Pooling, so there is no embedding of a text")
    place = kinds["Pooling"]
    if Path(place).name != place:
        raise EngineLoadError(f"{path.name}: the path {place[:80]!r} leaves the model's folder")
    return _pooling_mode(Fields(read_json(folder / place / "config.json"), f"{place}/config.json"), config), (
        "Normalize" in kinds
    )


def _pooling_mode(fields: Fields, config: EncoderConfig) -> Pooling:
    """Exactly one of the modes that are known must be set. Later versions write ``pooling_mode: mean`` instead."""
    if fields.count("word_embedding_dimension", config.hidden) != config.hidden:
        raise fields.fail("word_embedding_dimension", f"the model's width, {config.hidden}")
    if fields.has("pooling_mode"):
        mode = next((mode for mode in get_args(Pooling) if mode == fields.text("pooling_mode")), None)
        if mode is None:
            raise fields.fail("pooling_mode", f"one of {', '.join(get_args(Pooling))}")
        chosen: Pooling = mode
        return chosen
    wanted = [key for key in fields.values if key.startswith("pooling_mode_") and fields.flag(key)]
    if len(wanted) != 1 or wanted[0] not in POOLING_KEYS:
        raise EngineLoadError(
            f"{fields.name}: one of {', '.join(POOLING_KEYS)} must be true and nothing else, "
            f"not {', '.join(wanted)[:80] or 'none'}"
        )
    return POOLING_KEYS[wanted[0]]


def _optional(path: Path) -> Fields:
    return Fields(read_json(path) if path.is_file() else {}, path.name)


def _read_list(path: Path) -> list[dict[str, Any]]:
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise EngineLoadError(f"{path.name} is too large; it is not what it should be")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise EngineLoadError(f"{path.name} cannot be read; fetch it again") from error
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise EngineLoadError(f"{path.name} must hold a list of objects")
    return value


def _fingerprint(described: str, files: tuple[Path, ...]) -> str:
    digest = hashlib.sha256(described.encode())
    for path in files:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise EngineLoadError(f"{path.name} cannot be read: {error.strerror}") from error
    return digest.hexdigest()
