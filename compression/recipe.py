"""Recipes: which layers of a model are stored how, and by which method. A YAML file, or the name of a preset."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml

from compression.errors import CompressionError
from engines.engine_folder import LayerClass, Share

LARGEST_RECIPE = 1 << 20
"""Bytes."""
MOST_WINDOW_TOKENS = 1 << 20

Method = Literal["rtn", "gptq", "kmeans"]
Count = Annotated[int, msgspec.Meta(ge=1)]


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A misspelt key is an error, not a default."""


class LayerRule(_Part, frozen=True, kw_only=True):
    """How the layers are stored whose names one of the patterns matches."""

    match: Annotated[list[str], msgspec.Meta(min_length=1)]
    """Names of linear layers in the checkpoint, without ``.weight``: a shell pattern, or ``re:`` and an expression that
    has to match the whole name."""
    kind: Literal["integer", "float8", "codebook", "none"] = "integer"
    """``none``: as they are, in 16 bits."""
    bits: Annotated[int, msgspec.Meta(ge=2, le=8)] = 8
    group_size: Annotated[int, msgspec.Meta(ge=8)] | None = None
    """Input columns that share a scale; none: a whole row does. Where it does not divide a layer's width, the next
    smaller size that does is taken, and the card says so."""
    symmetric: bool = True
    block: tuple[Count, Count] | None = None
    """Of float8: rows and columns that share a scale."""
    activations: Literal["float", "int8", "float8"] = "float"
    static_input: bool = False
    method: Method = "rtn"


class Calibration(_Part, frozen=True, kw_only=True):
    """What calibration reads, and how much of it."""

    source: Literal["text", "model"] = "text"
    """Text that is given with the command, or what the model itself writes (``compression.self_generated``)."""
    seed: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] = 0
    """Of what the model writes."""
    windows: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 128
    tokens: Annotated[int, msgspec.Meta(ge=8, le=MOST_WINDOW_TOKENS)] = 512
    """Of each window."""


class Scaling(_Part, frozen=True, kw_only=True):
    """Input channels are scaled up or down before rounding, and what stands before the layer undoes it exactly."""

    rule: Literal["awq", "smoothquant"]
    """What a channel's scale is a power of: its mean size (AWQ), or its largest size against its weights'."""
    match: list[str] = msgspec.field(default_factory=lambda: ["*"])
    """Layers whose inputs may be scaled."""


class Compensation(_Part, frozen=True, kw_only=True):
    """After a decoder layer is rounded, its parameters are tuned until its output is near the full model's
    (``compression.compensation``)."""

    method: Literal["scales", "rounding"]
    """``scales``: those of the groups, the codes stay as they are. ``rounding``: of integers each weight's code too."""
    steps: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 256
    """Of Adam, in each decoder layer."""
    windows_per_step: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 4
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.01
    """Of codes, in units of a code; scales move a tenth as fast, in parts of themselves. Falls to 0 over the steps."""
    bias: Literal["none", "existing", "new"] = "none"
    """Mean errors that biases take off: of layers that have one; or beside those of each decoder layer, whose
    down_proj then has a bias, which Llama's config alone can express."""


class Distillation(_Part, frozen=True, kw_only=True):
    """At the end the scales of all layers are tuned together, until the model's next-token distributions are near the
    full model's (``compression.compensation.distillation``)."""

    steps: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 128
    """Of Adam."""
    windows_per_step: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 2
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.001
    """Of scales, in parts of themselves. Falls to 0 over the steps."""


class ExpertBudget(_Part, frozen=True, kw_only=True):
    """Routed experts get one of two formats each, as many of the larger one as the bytes allow."""

    hot: LayerRule
    cold: LayerRule
    budget: Share = 0.5
    """Of the bytes between all experts cold (0) and all hot (1)."""
    rule: Literal["loss", "frequency"] = "loss"
    """By the estimated loss, or by how often an expert is chosen."""


class Recipe(_Part, frozen=True, kw_only=True):
    """The first rule that matches a layer counts; layers that none matches stay in 16 bits."""

    name: str
    description: str = ""
    layers: Annotated[list[LayerRule], msgspec.Meta(min_length=1)]
    scaling: Scaling | None = None
    experts: ExpertBudget | None = None
    compensation: Compensation | None = None
    distillation: Distillation | None = None
    calibration: Calibration | None = None
    """None: nothing has to be calibrated."""
    promise: dict[LayerClass, Share] = {}
    """Least share of each class's parameters that comes out quantized; the command fails below it."""

    @property
    def _calibrated_parts(self) -> tuple[_Part | None, ...]:
        return self.scaling, self.experts, self.compensation, self.distillation

    @property
    def calibrates(self) -> bool:
        """Whether it can be followed only with text."""
        rules = [*self.layers, *((self.experts.hot, self.experts.cold) if self.experts else ())]
        wants = any(rule.method == "gptq" or rule.static_input for rule in rules)
        # Without a calibration section, k-means goes by the weights alone.
        wants = wants or (self.calibration is not None and any(rule.method == "kmeans" for rule in rules))
        return wants or any(part is not None for part in self._calibrated_parts)


def preset_names() -> list[str]:
    """Recipes that come with the program."""
    files = resources.files("compression.presets").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_recipe(wanted: str) -> Recipe:
    """A preset's name, or the path of a YAML file. Raises CompressionError that says what is wrong with it."""
    if wanted in preset_names():
        text = resources.files("compression.presets").joinpath(f"{wanted}.yaml").read_text(encoding="utf-8")
        return parse_recipe(text, wanted)
    path = Path(wanted)
    if not path.is_file():
        raise CompressionError(
            f"there is no recipe {wanted[:80]!r}: neither a file nor one of {', '.join(preset_names())}"
        )
    if path.stat().st_size > LARGEST_RECIPE:
        raise CompressionError(f"{path.name} is larger than {LARGEST_RECIPE >> 20} MB; it is no recipe")
    try:
        return parse_recipe(path.read_text(encoding="utf-8"), path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise CompressionError(f"{path.name} cannot be read as UTF-8 text") from error


def parse_recipe(text: str, name: str) -> Recipe:
    """``name`` stands in errors, and in the recipe where the text gives none. Raises CompressionError."""
    try:
        values: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CompressionError(f"{name} is not YAML: {str(error)[:200]}") from error
    if not isinstance(values, dict):
        raise CompressionError(f"{name}: a recipe is a mapping with 'layers'")
    try:
        recipe = msgspec.convert({"name": name, **values}, type=Recipe)
    except msgspec.ValidationError as error:
        raise CompressionError(f"{name}: {error}") from error
    rules = [*recipe.layers, *((recipe.experts.hot, recipe.experts.cold) if recipe.experts else ())]
    for rule in rules:
        _check_rule(rule, name)
    if recipe.calibrates and recipe.calibration is None:
        return msgspec.structs.replace(recipe, calibration=Calibration())
    return recipe


def _check_rule(rule: LayerRule, name: str) -> None:
    """Raises CompressionError for settings that contradict each other."""
    problems = {
        "8 bits are what float8 has": rule.kind == "float8" and rule.bits != 8,
        "block is for float8 only": rule.block is not None and rule.kind != "float8",
        "a block takes the place of group_size": rule.block is not None and rule.group_size is not None,
        "gptq rounds to kind integer": rule.method == "gptq" and rule.kind != "integer",
        "kind codebook and method kmeans belong together": (rule.method == "kmeans") != (rule.kind == "codebook"),
        "static_input needs rounded activations": rule.static_input and rule.activations == "float",
        "int8 activations go with 8-bit integers": rule.activations == "int8"
        and (rule.kind != "integer" or rule.bits != 8 or rule.group_size is not None or not rule.symmetric),
        "float8 activations go with float8 weights": rule.activations == "float8" and rule.kind != "float8",
        "float8 has no groups": rule.kind == "float8" and rule.group_size is not None,
    }
    for problem, is_so in problems.items():
        if is_so:
            raise CompressionError(f"{name}: {problem} (layers that match {', '.join(rule.match)[:80]})")
    for pattern in rule.match:
        matcher(pattern)


def matcher(pattern: str) -> re.Pattern[str]:
    """Raises CompressionError for an expression that cannot be read."""
    if not pattern.startswith("re:"):
        return re.compile(fnmatch.translate(pattern))
    try:
        return re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise CompressionError(f"the pattern {pattern[:80]!r} is no regular expression: {error}") from error


def matching(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    """The names that some pattern matches. Raises CompressionError for a pattern that matches none."""
    names, found = list(names), set()
    for pattern in patterns:
        compiled = matcher(pattern)
        matched = {name for name in names if compiled.fullmatch(name)}
        if not matched:
            raise CompressionError(
                f"the recipe's pattern {pattern[:80]!r} matches no layer of this model; its layers have names such as "
                f"{', '.join(names[:3])}"
            )
        found |= matched
    return found
