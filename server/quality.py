"""What is known of a model's quality: the summary of its evaluation card, for people, for the API and as a gate."""

from __future__ import annotations

from pathlib import Path

from engines.engine_folder import Quality, read_engine_record
from engines.protocol import EngineLoadError


def read_quality(path: Path) -> Quality | None:
    """Of an engine folder that was evaluated; None for every other model. Raises EngineLoadError."""
    record = read_engine_record(path) if path.is_dir() else None
    return None if record is None or score(record.quality) is None else record.quality


def score(quality: Quality) -> float | None:
    """What ``min_quality`` bounds: the share of the base's quality that is left.

    That is the base's perplexity over the model's, or where none was measured the model's accuracy over the base's;
    None where neither was.
    """
    if quality.perplexity_ratio:
        return 1 / quality.perplexity_ratio
    if quality.accuracy is not None and quality.base_accuracy:
        return quality.accuracy / quality.base_accuracy
    return None


def check_quality(name: str, quality: Quality | None, least: float | None) -> None:
    """Raises EngineLoadError for a model below ``least``, and for one that was never measured."""
    if least is None:
        return
    found = None if quality is None else score(quality)
    if quality is None or found is None:
        raise EngineLoadError(
            f"{name}: min_quality is {least:g}, and nothing is known of this model's quality; measure it with "
            "slimserve evaluate MODEL --against BASE, or serve it without min_quality"
        )
    if found < least:
        raise EngineLoadError(
            f"{name}: its quality is {found:.4f} of its base's ({describe(quality)}), and min_quality is {least:g}; "
            "compress it with a recipe of more bits, or lower min_quality"
        )


def describe(quality: Quality) -> str:
    """In a few words: ``perplexity x1.012, same token 97.2 %``."""
    parts = []
    if quality.perplexity_ratio is not None:
        parts.append(f"perplexity x{quality.perplexity_ratio:.3f}")
    if quality.top1_agreement is not None:
        parts.append(f"same token {100 * quality.top1_agreement:.1f} %")
    if quality.kl is not None:
        parts.append(f"KL {quality.kl:.4f}")
    if quality.accuracy is not None and quality.base_accuracy is not None:
        parts.append(f"accuracy {100 * quality.accuracy:.1f} % (base {100 * quality.base_accuracy:.1f} %)")
    if quality.router_agreement is not None:
        parts.append(f"same experts {100 * quality.router_agreement:.1f} %")
    return ", ".join(parts)
