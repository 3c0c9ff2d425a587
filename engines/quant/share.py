"""A rank's share of a quantized weight: it must not cut through a group or a packed word."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engines.protocol import EngineLoadError
from engines.quant.base import LinearPart, Split, WeightSource


@dataclass(frozen=True, slots=True)
class Share:
    """Size of this rank's part of a weight, and the axis that is cut."""

    out_features: int
    in_features: int
    split: Split

    def of_groups(self, groups: int) -> Split:
        """Of a tensor of (out, groups): a row's only group is whole on each rank."""
        return "none" if self.split == "in" and groups == 1 else self.split


def turned(split: Split) -> Split:
    """Of a tensor that is stored as (in, out)."""
    return {"out": "in", "in": "out"}.get(split, "none")  # type: ignore[return-value]


def share_of(
    part: LinearPart, in_features: int, split: Split, source: WeightSource, rows: int = 1, columns: int = 1
) -> Share:
    """``rows`` and ``columns``: a cut axis is cut at multiples of so many.

    Raises EngineLoadError where it cannot be.
    """
    sizes: dict[Split, int] = {"out": part.out_features, "in": in_features}
    if split != "none" and source.world > 1:
        multiple = rows if split == "out" else columns
        sizes[split], rest = divmod(sizes[split], source.world)
        if rest or sizes[split] % multiple:
            raise EngineLoadError(
                f"layer {part.name} cannot be shared by {source.world} devices: its quantized weight may only be cut "
                f"at multiples of {multiple}; use fewer devices"
            )
    return Share(sizes["out"], sizes["in"], split)


def cut_columns(unit: int, group_size: int, groups: int) -> int:
    """Multiples at which a row may be cut: whole packed units, and whole groups where there are several."""
    return math.lcm(unit, group_size) if groups > 1 else unit


def require_groups(part: LinearPart, in_features: int, group_size: int) -> int:
    """Groups in a row. Raises EngineLoadError where they do not fill it evenly."""
    groups, rest = divmod(in_features, group_size)
    if rest:
        raise EngineLoadError(
            f"layer {part.name}: groups of {group_size} do not divide its {in_features} inputs; quantize the model "
            "again with a group size that does"
        )
    return groups
