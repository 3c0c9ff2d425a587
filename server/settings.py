"""All options of ``slimserve serve``. Precedence: flags > environment (``SLIMSERVE_``) > YAML file > defaults."""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)
from yaml import YAMLError

from engines.plain_model import FILE_NAME as ONNX_FILE
from engines.plain_model import is_plain_model
from server.errors import UsageError
from server.logs import LogFormat
from server.requests import Targets
from server.scheduler.config import SchedulerConfig
from server.scheduler.law import Policy
from server.tenants import PRIORITIES, TenantTable, read_tenants
from server.tls import Certificate
from server.worker.wire import Priority

DEFAULT_MODEL = "smollm2-135m"
_OTHER_VARIABLES = ("home", "url")
"""Read elsewhere: the cache folder, and the server that ``slimserve chat`` talks to."""

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(us|ms|s|min)?")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, None: 1.0, "min": 60.0}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_duration(value: object) -> object:
    """``"5ms"``, ``"0.5s"``, ``"2min"`` or a plain number of seconds, to seconds."""
    if not isinstance(value, str):
        return value
    match = _DURATION.fullmatch(value.strip())
    if match is None:
        raise ValueError("a time is a number with us, ms, s or min behind it, such as 5ms or 0.5s")
    return float(match[1]) * _SECONDS[match[2]]


def parse_memory(value: object) -> object:
    """``"8GiB"``, ``"500MB"`` or bytes, to bytes (int); a share such as ``0.5`` stays a float in (0, 1]."""
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            raise ValueError("a memory limit is a size such as 8GiB or a share such as 0.5")
        unit = (match[2] or "").lower()
        if not unit and float(match[1]) <= 1:
            return float(match[1])
        return int(float(match[1]) * (1024 if unit.endswith("i") else 1000) ** _POWERS[unit[:1]])
    return value


_DurationText = Annotated[str, Field(pattern=f"^{_DURATION.pattern}$")]
_MemoryText = Annotated[str, Field(pattern=r"^(\d+(?:\.\d+)?)\s*([KMGTkmgt]i?)?[Bb]?$")]
Duration = Annotated[float, BeforeValidator(parse_duration, json_schema_input_type=float | _DurationText)]
Memory = Annotated[int | float, BeforeValidator(parse_memory, json_schema_input_type=float | _MemoryText)]
Origin = Annotated[str, Field(pattern=r"^https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:\d{1,5})?$")]
"""As browsers send it: in lower case, without a path."""


class ModelOptions(BaseModel):
    """What one model can be told. At the top level they are the defaults of every entry under ``models:``."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """auto, cpu, cuda or cuda:N. auto takes the GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of weights and activations. auto takes the one that suits the device."""
    kv_dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8"] = "auto"
    """Data type of the KV cache. auto follows dtype; fp8 holds twice the tokens of a 16-bit type."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Longest sequence in tokens, prompt and output together. Default: what the model can do."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads inside one operation. Default: chosen by measurement at start."""
    keep_quantized: bool = False
    """Keep the weights of a quantized .gguf file as they are stored. On a CPU this takes a fifth of the memory and
    is two to three times as fast, and inputs of products are rounded to 8 bits, as in llama.cpp: perplexity rises by
    0.3 %, and some answers change."""
    random_weights: int | None = Field(default=None, ge=0)
    """Seed: fill the model's shapes with random weights and read none. For speed work and tests."""
    min_quality: float | None = Field(default=None, ge=0, le=1)
    """Least share of its base's quality that a model must have kept, by its evaluation card; below it, and without a
    card, it is not served."""
    memory_limit: Memory | None = None
    """Memory of the device for weights, workspace and KV together: a size (8GiB) or a share of the device (0.5)."""

    @field_validator("memory_limit")
    @classmethod
    def _share_is_at_most_all(cls, value: int | float | None) -> int | float | None:
        if value is not None and (value <= 0 or (isinstance(value, float) and value > 1)):
            raise ValueError("a memory limit is a size such as 8GiB or a share such as 0.5")
        return value


class ModelSettings(ModelOptions):
    """One entry under ``models:``."""

    source: str = ""
    """Name from the catalogue, hf:org/name[@revision], a folder, a .gguf or an .onnx file."""
    name: str = ""
    """Name that requests use. Default: the last part of the source."""
    kind: Literal["generation", "onnx", "fake"] = "generation"
    """Engine. A source that is an .onnx file, or a folder with model.onnx, is of the kind onnx unless this says
    otherwise. fake computes nothing: it measures and tests everything around an engine."""
    replicas: int = Field(default=1, ge=1, le=64)
    """Workers that serve this model, each on a device of its own (on the CPU: a process of its own)."""
    uniform_routing: bool = False
    """Draw the experts of each token at random: random weights route to a few only. For speed work, as they are."""
    fake_step_seconds: float = Field(default=0.0, ge=0, le=3600)
    """How long a step of the fake engine takes, in seconds."""

    @property
    def served_name(self) -> str:
        """The name that requests use."""
        if self.name:
            return self.name
        source = self.source.rstrip("/").removesuffix(f"/{ONNX_FILE}")
        return re.split(r"[/:]", source)[-1].split("@")[0].removesuffix(".gguf").removesuffix(".onnx")


class ClassTargets(BaseModel):
    """Targets of one priority class. What is left out is as at the top level."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    target_ttft: Duration | None = Field(default=None, ge=0.0001, le=120)
    """Wanted time to first token."""
    target_tpot: Duration | None = Field(default=None, ge=0.0001, le=120)
    """Wanted time per output token."""


class Settings(ModelOptions, BaseSettings):
    """Every option of the server."""

    model_config = SettingsConfigDict(
        env_prefix="SLIMSERVE_", env_nested_delimiter="__", extra="forbid", use_attribute_docstrings=True
    )

    models: list[ModelSettings] = []
    """What is served. ``slimserve serve MODEL`` is short for one entry here."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs an API key."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    api_key: SecretStr | None = None
    """Key that requests carry as ``Authorization: Bearer KEY``. Better set as SLIMSERVE_API_KEY than as a flag."""
    tenants: Path | None = None
    """YAML file of tenants: hashes of their keys, weights and quotas. See docs/api.md."""
    admin_key: SecretStr | None = None
    """Key that opens /admin, also from other machines. Without it /admin answers this machine alone."""
    tls_cert: Path | None = None
    """PEM file of the server's certificate and those between it and a root: serves HTTPS. Read again at a reload."""
    tls_key: Path | None = None
    """PEM file of its private key, not encrypted."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Serve /metrics on this port, and no longer on the other; 0 takes a free one. The same keys open it."""
    metrics_host: str = "127.0.0.1"
    """Address of the metrics port."""
    cors_origins: list[Origin] = []
    """Origins whose web pages may use the API, such as https://app.example.org. None by default."""
    openapi: bool = True
    """Describe the API at /openapi.json."""
    allow_remote_without_key: bool = False
    """Permit a host other than loopback without an API key: everyone who reaches the port may use the models."""
    max_batch: int | None = Field(default=None, ge=1, le=4096)
    """Most sequences in one step. Default: derived from the machine."""
    max_delay: Duration = Field(default=0.0, ge=0, le=10)
    """Longest time that a one-shot request waits for others to share its step; a stream never waits."""
    target_ttft: Duration | None = Field(default=None, ge=0.0001, le=120)
    """Wanted time to first token. A request that must miss it is refused with 503, as soon as that is known."""
    target_tpot: Duration | None = Field(default=None, ge=0.0001, le=120)
    """Wanted time per output token; bounds how much prompt may join a step that decodes."""
    classes: dict[Priority, ClassTargets] = {}
    """Targets of the priority classes high, normal and low, where they differ from those at the top level."""
    policy: Policy = "adaptive"
    """What sets the size of a step: the measured step times and deadlines (adaptive), a rule that halves and doubles
    (aimd), or nothing (static)."""
    prefix_cache: bool = True
    """Reuse the KV blocks of a prompt beginning that was computed before."""
    grace: Duration = Field(default=30.0, ge=0, le=3600)
    """How long open requests may go on after Ctrl-C or SIGTERM."""
    step_timeout: Duration = Field(default=120.0, gt=0)
    """A worker that settles no step, or says nothing, for this long is killed and started again."""
    load_timeout: Duration = Field(default=1800.0, gt=0)
    """The same deadline while a worker loads a model."""
    max_restarts: int = Field(default=8, ge=0, le=1000)
    """Restarts of a worker without one completed step in between before it is given up."""
    max_queue: int = Field(default=2048, ge=1)
    """Most choices of one model running and waiting; a request beyond gets 503 with Retry-After."""
    max_wait: Duration = Field(default=120.0, gt=0, le=3600)
    """Predicted wait beyond which a request gets 503 with Retry-After."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much is logged to stderr."""
    log_format: LogFormat = "text"
    """text, or json: one object a line, with a line for each request. See docs/operations.md."""
    otlp_endpoint: str | None = Field(default=None, pattern=r"^https?://[^\s/]\S*$")
    """Send a trace of each request to this OpenTelemetry collector (OTLP over HTTP), such as http://localhost:4318."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls)

    def tenant_table(self) -> TenantTable:
        """Reads the tenants file. Raises UsageError."""
        keys = () if self.api_key is None else (self.api_key.get_secret_value(),)
        admin = None if self.admin_key is None else self.admin_key.get_secret_value()
        table = TenantTable(() if self.tenants is None else read_tenants(self.tenants), keys, admin)
        if admin is not None and not table.open and table.find(admin.encode()) is not None:
            raise UsageError("admin_key: it is also an API key; whoever may send requests could reload the server")
        return table

    def certificate(self) -> Certificate | None:
        """None for plain HTTP. Raises UsageError where one of the two files is missing from the settings."""
        if self.tls_cert is None and self.tls_key is None:
            return None
        if self.tls_cert is None or self.tls_key is None:
            raise UsageError("TLS needs both: --tls-cert and --tls-key")
        return Certificate(self.tls_cert, self.tls_key)

    def targets(self) -> dict[str, Targets]:
        """By priority class."""
        found: dict[str, Targets] = {}
        for priority in PRIORITIES:
            own = self.classes.get(priority, ClassTargets())
            found[priority] = Targets(own.target_ttft or self.target_ttft, own.target_tpot or self.target_tpot)
        return found

    def scheduler_config(self) -> SchedulerConfig:
        return SchedulerConfig(
            max_batch=self.max_batch,
            max_delay=self.max_delay,
            target_ttft=self.target_ttft,
            target_tpot=self.target_tpot,
            prefix_cache=self.prefix_cache,
            policy=self.policy,
        )


def load_settings(
    flags: Mapping[str, Any],
    *,
    config: Path | None = None,
    model: str | None = None,
    served_model_name: str | None = None,
) -> Settings:
    """Read all layers. ``flags`` holds only what was given on the command line; ``model`` takes the place of the
    entries under ``models:``, and where there are none either the default model is served.

    Options of a model given as flags or in the environment apply to every entry; those at the top of the file fill
    what an entry leaves out. Raises UsageError that names the key and what is wrong with it.
    """
    _refuse_unknown_environment(os.environ)

    class FromLayers(Settings):
        model_config = SettingsConfigDict(yaml_file=config)

    try:
        if config is not None and not config.is_file():
            raise UsageError(f"--config: there is no file {config}")
        settings = FromLayers(**flags)
        forced = {*from_environment(), *flags}
    except ValidationError as error:
        raise UsageError("; ".join(_explain(detail["loc"], detail["msg"]) for detail in error.errors())) from None
    except (YAMLError, SettingsError, TypeError, UnicodeDecodeError) as error:
        raise UsageError(f"the configuration cannot be read: {error}") from None
    settings.models = _entries(settings, forced, model, served_model_name)
    _check(settings)
    return settings


def from_environment() -> Collection[str]:
    """Names of the settings that the environment gives."""
    return EnvSettingsSource(Settings)().keys()


def _entries(
    settings: Settings, forced: Collection[str], model: str | None, served_model_name: str | None
) -> list[ModelSettings]:
    entries = settings.models
    if model is not None or not entries:
        entries = [ModelSettings(source=model or DEFAULT_MODEL)]
    if served_model_name is not None:
        if len(entries) > 1:
            raise UsageError("--served-model-name is for one model; the configuration names several")
        entries = [entries[0].model_copy(update={"name": served_model_name})]
    return [_fill(entry, settings, forced) for entry in entries]


def _fill(entry: ModelSettings, settings: Settings, forced: Collection[str]) -> ModelSettings:
    inherited = [key for key in ModelOptions.model_fields if key in forced or key not in entry.model_fields_set]
    update = {key: getattr(settings, key) for key in inherited}
    if "kind" not in entry.model_fields_set and entry.source and is_plain_model(Path(entry.source).expanduser()):
        update["kind"] = "onnx"
    return entry.model_copy(update=update)


def _explain(location: tuple[int | str, ...], message: str) -> str:
    key = ".".join(str(part) for part in location)
    if message != "Extra inputs are not permitted":
        return f"{key}: {message.removeprefix('Value error, ')}"
    known = Settings.model_fields
    if len(location) > 1:
        known = ClassTargets.model_fields if location[0] == "classes" else ModelSettings.model_fields
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"{key}: unknown option" + (f"; did you mean {close[0]}?" if close else "")


def _refuse_unknown_environment(environment: Mapping[str, str]) -> None:
    for variable in environment:
        key = variable.upper().removeprefix("SLIMSERVE_").split("__")[0].lower()
        known = key in Settings.model_fields or key in _OTHER_VARIABLES
        if variable.upper().startswith("SLIMSERVE_") and not known:
            raise UsageError(f"{variable}: " + _explain((key,), "Extra inputs are not permitted"))


def _check(settings: Settings) -> None:
    names = [entry.served_name for entry in settings.models]
    for entry in settings.models:
        if entry.kind != "fake" and not entry.source:
            raise UsageError("models: an entry needs a source: a name, hf:org/name, a folder, a .gguf or .onnx file")
        if not re.fullmatch(r"[A-Za-z0-9][\w.:/@-]{0,199}", entry.served_name):
            raise UsageError(f"{entry.served_name!r} is no model name; choose one with --served-model-name")
        if names.count(entry.served_name) > 1:
            raise UsageError(f"models: two entries are served as {entry.served_name}; give one another name")
    _check_access(settings)


def _check_access(settings: Settings) -> None:
    settings.tenant_table()
    if (certificate := settings.certificate()) is not None:
        certificate.check()
    locked = settings.api_key is not None or settings.tenants is not None
    hosts = {"--host": settings.host}
    if settings.metrics_port is not None:
        hosts["--metrics-host"] = settings.metrics_host
    for flag, host in hosts.items():
        if not is_loopback(host) and not locked and not settings.allow_remote_without_key:
            raise UsageError(
                f"{flag} {host} can be reached from other machines and no API key is set: set SLIMSERVE_API_KEY"
                ", --api-key or --tenants, or permit access without a key with --allow-remote-without-key"
            )


def is_loopback(host: str) -> bool:
    """Only this machine reaches a server that listens on ``host``."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
