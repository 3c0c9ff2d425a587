"""The ``quantization_config`` of an engine folder: which layers have which format."""

from __future__ import annotations

import re
from typing import Any

from compression.plan import LayerPlan, LinearLayer
from compression.quantize.base import Scheme
from compression.stored_formats import input_arguments, stored_format, weight_arguments
from engines.quantization import EMBEDDING_LAYER, HEAD_LAYER

INDEX = re.compile(r"\.\d+(?=\.)")


def quantization_config(layers: list[LinearLayer], plan: dict[str, LayerPlan]) -> dict[str, Any]:
    """Config groups in the order of compressed-tensors' reader, who takes the first that matches.

    ``layers`` are all linear layers with embedding and head. ``quant_method`` is ``slimserve`` where other readers of
    compressed-tensors have no such format: codebooks, a quantized embedding; or where routed experts of one layer
    have several, which they refuse.
    """
    schemes: dict[Scheme, list[str]] = {}
    for layer in layers:
        if layer.name in plan:
            schemes.setdefault(plan[layer.name].scheme, []).append(layer.name)
    ignored = [layer.name for layer in layers if layer.name not in plan and layer.name != EMBEDDING_LAYER]
    names = [layer.name for layer in layers]
    if HEAD_LAYER not in names:
        ignored.append(HEAD_LAYER)  # the embedding's own weight
    # Readers that fuse experts look for a group of their own, after the others.
    ordered = sorted(schemes.items(), key=lambda item: any(".experts." in name for name in item[1]))
    groups = {
        f"group_{place}": {
            "targets": _all_linear(members) if len(schemes) == 1 else targets(members, names),
            "weights": weight_arguments(scheme),
            "input_activations": input_arguments(scheme),
            "output_activations": None,
            "format": stored_format(scheme),
        }
        for place, (scheme, members) in enumerate(ordered)
    }
    formats = {stored_format(scheme) for scheme in schemes}
    return {
        "quant_method": "slimserve" if _ours_alone(schemes) else "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": targets(ignored, names),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _all_linear(members: list[str]) -> list[str]:
    return ["Linear", *(name for name in members if name == EMBEDDING_LAYER)]


def _ours_alone(schemes: dict[Scheme, list[str]]) -> bool:
    if any(scheme.kind == "codebook" or EMBEDDING_LAYER in members for scheme, members in schemes.items()):
        return True
    with_experts: dict[str, set[Scheme]] = {}
    for scheme, members in schemes.items():
        for name in members:
            if ".experts." in name:
                with_experts.setdefault(name.partition(".experts.")[0], set()).add(scheme)
    return any(len(found) > 1 for found in with_experts.values())


def targets(members: list[str], names: list[str]) -> list[str]:
    """Few expressions that match these of all ``names`` and no other; full names where kinds do not tell them apart."""
    found = [HEAD_LAYER] if HEAD_LAYER in members and HEAD_LAYER not in names else []
    chosen = set(members)
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(INDEX.sub(".#", name), []).append(name)
    for kind, of_kind in kinds.items():
        inside = [name for name in of_kind if name in chosen]
        if len(inside) == len(of_kind):
            found.append("re:" + re.escape(kind).replace(r"\.\#", r"\.\d+") + "$")
        else:
            found += inside
    return found
