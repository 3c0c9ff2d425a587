"""``slimserve.json``: what the compression toolkit records in an engine folder beside the weights.

The offline side writes it, the API process and the engine read it, so nothing here needs torch. A folder without one
is a plain checkpoint. Weight formats are not described here: ``config.json`` says them, as other servers expect. An
unknown key is an error, because it may change what the others mean.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from engines.protocol import EngineLoadError

FILE_NAME = "slimserve.json"
LARGEST_RECORD = 16 << 20
"""Bytes. The hashes of a terabyte of weights take about 5 MB."""
CHUNK_BYTES = 16 << 20
"""Of a weight file for each hash, so that the chunks of one file are hashed by several threads."""

LayerClass = Literal["routed", "shared", "attention", "mlp", "router", "embedding", "head", "norm"]
"""What a parameter belongs to: routed and shared experts, dense feed-forward layers are ``mlp``, biases count with
their layer."""

Share: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
Digest: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class ClassCoverage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of all parameters of one class. Scales, offsets and codebooks count to the bytes, not to the parameters."""

    parameters: Count
    quantized_parameters: Count
    """Stored in fewer than 16 bits."""
    bytes: Count
    """On disk, all of the class."""
    quantized_bytes: Count
    """Of them those of the quantized parameters."""


class Coverage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much of the model is quantized, counted from the written files."""

    classes: dict[LayerClass, ClassCoverage]
    promised: dict[LayerClass, Share] = {}
    """Least share of quantized parameters that the recipe promised; export fails below it."""


class LogitFingerprint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The model's next-token log probabilities after some prompts, to be computed again at the first load."""

    prompts: list[list[Count]]
    """Token ids."""
    tokens: list[list[Count]]
    """For each prompt the likeliest next tokens, best first."""
    logprobs: list[list[float]]
    """Theirs, in float32."""
    tolerances: dict[str, Annotated[float, msgspec.Meta(gt=0)]]
    """Largest allowed difference of a log probability, by ``device kind/dtype`` such as ``cpu/float32``."""


class Quality(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The card's summary; None is what was not measured. ``base`` is the unquantized model on the same data."""

    perplexity: float | None = None
    base_perplexity: float | None = None
    perplexity_ratio: float | None = None
    kl: float | None = None
    """Mean Kullback-Leibler divergence from the base's next-token distribution, nats a token."""
    top1_agreement: Share | None = None
    """Share of tokens at which both models' likeliest next token is the same."""
    accuracy: Share | None = None
    base_accuracy: Share | None = None
    """On the task named in the card."""
    router_agreement: Share | None = None
    """Mean overlap of the sets of chosen experts."""
    measured_on: str = ""
    """Names of the data, for people."""


class EngineRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of ``slimserve.json``."""

    version: Literal[1] = 1
    recipe: dict[str, Any]
    """As it was resolved: preset and file merged."""
    base: str
    """Name of the model that was compressed; no path."""
    base_fingerprint: str = ""
    """The base's ``Manifest.fingerprint``."""
    created_with: str
    """Program and version."""
    notes: list[str] = []
    """What the maker has to say about single layers: fallbacks, skipped layers, starved experts."""
    coverage: Coverage
    hashes: dict[str, list[Digest]]
    """SHA-256 of each chunk of ``chunk_bytes``, for each weight file by its name in the folder."""
    chunk_bytes: Annotated[int, msgspec.Meta(ge=1 << 16)] = CHUNK_BYTES
    fingerprint: LogitFingerprint | None = None
    quality: Quality = Quality()


def read_engine_record(folder: Path) -> EngineRecord | None:
    """The folder's record; None where it has none.

    Raises EngineLoadError if the file cannot be read, is too large, or is not what this version writes.
    """
    path = folder / FILE_NAME
    try:
        if path.stat().st_size > LARGEST_RECORD:
            raise EngineLoadError(f"{FILE_NAME} is larger than {LARGEST_RECORD >> 20} MB; it is not what it should be")
        record = msgspec.json.decode(path.read_bytes(), type=EngineRecord)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise EngineLoadError(f"{FILE_NAME} cannot be read: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise EngineLoadError(
            f"{FILE_NAME} is damaged or was written by another version ({str(error)[:120]}); compress the model again"
        ) from error
    _check_fingerprint(record.fingerprint)
    if any(Path(name).name != name for name in record.hashes):
        raise EngineLoadError(f"{FILE_NAME}: hashes must name files in its own folder")
    return record


def _check_fingerprint(fingerprint: LogitFingerprint | None) -> None:
    if fingerprint is None:
        return
    widths = [len(row) for row in fingerprint.tokens]
    if len(fingerprint.prompts) != len(widths) or widths != [len(row) for row in fingerprint.logprobs]:
        raise EngineLoadError(f"{FILE_NAME}: the fingerprint's lists do not belong together")


def write_engine_record(folder: Path, record: EngineRecord) -> None:
    """Write the record in one step: a reader sees the old file, the new one, or none."""
    partial = folder / f".{FILE_NAME}.partial"
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1))
    partial.replace(folder / FILE_NAME)
