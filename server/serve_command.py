"""``slimserve serve``: its options, and the start of the server."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def complete_model(begun: str) -> list[str]:
    """For the shell's completion: models that are here or can be pulled by a name of their own."""
    from server.catalog import Catalog, cache_home, shipped_models
    from server.sources import CATALOG

    here = [model.name for model in (*shipped_models(), *Catalog(cache_home()).list())]
    return sorted(name for name in {*here, *CATALOG} if name.startswith(begun))


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class KvDtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    fp8 = "fp8"


class Policy(StrEnum):
    adaptive = "adaptive"
    aimd = "aimd"
    static = "static"


class LogLevel(StrEnum):
    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


class LogFormat(StrEnum):
    text = "text"
    json = "json"


NETWORK, MODEL, BATCHING, WATCHING = "Network", "Model", "Batching and latency", "Logs and traces"
EXAMPLES = """
[bold]Examples[/bold]

slimserve serve  [dim]# smollm2-135m, fetched first when it is not here[/dim]

slimserve serve ./DeepSeek-R1-Distill-Qwen-1.5B --dtype bfloat16 --target-tpot 50ms

slimserve serve ./model.gguf --served-model-name assistant --max-model-len 4096

SLIMSERVE_API_KEY=... slimserve serve --host 0.0.0.0 --config models.yaml

Each option is also an environment variable (SLIMSERVE_PORT) and a key of the YAML file (port). Flags win over the
environment, which wins over the file. Times are 5ms, 0.5s, 2min or plain seconds; sizes are 8GiB or 500MB.
"""


def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A name (slimserve list), hf:org/name, a folder, a .gguf or .onnx file. Default: smollm2-135m.",
            autocompletion=complete_model,
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with any of these options, and several entries under models:.")
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Default 127.0.0.1; one that others reach needs a key.", rich_help_panel=NETWORK),
    ] = None,
    port: Annotated[int | None, typer.Option(help="Default 8000; 0 takes a free one.", rich_help_panel=NETWORK)] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="Requests must carry it; better set as SLIMSERVE_API_KEY.", rich_help_panel=NETWORK),
    ] = None,
    tenants: Annotated[
        Path | None,
        typer.Option(help="YAML file of tenants: key hashes, weights, quotas.", rich_help_panel=NETWORK),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Serve HTTPS with this certificate chain (PEM).", rich_help_panel=NETWORK)
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="Private key of the certificate (PEM).", rich_help_panel=NETWORK)
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve /metrics here, and only here.", rich_help_panel=NETWORK)
    ] = None,
    metrics_host: Annotated[
        str | None, typer.Option(help="Address of the metrics port. Default 127.0.0.1.", rich_help_panel=NETWORK)
    ] = None,
    cors_origins: Annotated[
        list[str] | None,
        typer.Option(
            "--cors-origin",
            metavar="ORIGIN",
            help="Let web pages of this origin use the API; may be repeated.",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    openapi: Annotated[
        bool | None,
        typer.Option("--openapi/--no-openapi", help="Describe the API at /openapi.json.", rich_help_panel=NETWORK),
    ] = None,
    allow_remote_without_key: Annotated[
        bool | None,
        typer.Option(
            "--allow-remote-without-key", help="Listen beyond this machine without a key.", rich_help_panel=NETWORK
        ),
    ] = None,
    grace: Annotated[
        str | None,
        typer.Option(help="How long open requests may go on after Ctrl-C. Default 30s.", rich_help_panel=NETWORK),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name that requests use. Default: the model's.", rich_help_panel=MODEL)
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Longest sequence in tokens, prompt and output together.", rich_help_panel=MODEL)
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of weights and activations.", rich_help_panel=MODEL, show_choices=True)
    ] = None,
    kv_dtype: Annotated[
        KvDtype | None, typer.Option(help="Of the KV cache; fp8 holds twice the tokens.", rich_help_panel=MODEL)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:N. auto takes the GPU.", rich_help_panel=MODEL)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads. Default: measured at start.", rich_help_panel=MODEL)
    ] = None,
    keep_quantized: Annotated[
        bool | None,
        typer.Option(
            "--keep-quantized",
            help="Keep a .gguf file's weights quantized: faster on a CPU, less exact.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    random_weights: Annotated[
        int | None,
        typer.Option(metavar="SEED", help="Random weights, none are read: for speed work.", rich_help_panel=MODEL),
    ] = None,
    min_quality: Annotated[
        float | None,
        typer.Option(help="Refuse a model that kept less of its base's quality: 0.98.", rich_help_panel=MODEL),
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(metavar="SIZE|SHARE", help="Of the device, KV included: 8GiB or 0.5.", rich_help_panel=MODEL),
    ] = None,
    max_batch: Annotated[int | None, typer.Option(help="Most sequences in one step.", rich_help_panel=BATCHING)] = None,
    max_delay: Annotated[
        str | None,
        typer.Option(
            help="Longest wait of a one-shot request for others. Streams never wait.",
            rich_help_panel=BATCHING,
        ),
    ] = None,
    target_ttft: Annotated[
        str | None, typer.Option(help="Wanted time to first token, such as 500ms.", rich_help_panel=BATCHING)
    ] = None,
    target_tpot: Annotated[
        str | None, typer.Option(help="Wanted time per output token, such as 50ms.", rich_help_panel=BATCHING)
    ] = None,
    policy: Annotated[
        Policy | None, typer.Option(help="What sets the size of a step.", rich_help_panel=BATCHING, show_choices=True)
    ] = None,
    log_level: Annotated[LogLevel | None, typer.Option(help="Of the log on stderr.", rich_help_panel=WATCHING)] = None,
    log_format: Annotated[
        LogFormat | None,
        typer.Option(help="text, or json: an object a line, one for each request.", rich_help_panel=WATCHING),
    ] = None,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Send traces to this OpenTelemetry collector (OTLP/HTTP).", rich_help_panel=WATCHING
        ),
    ] = None,
) -> None:
    """Serve a model behind the OpenAI API. Ctrl-C lets open requests finish; a second Ctrl-C stops at once."""
    flags = {name: value for name, value in locals().items() if value is not None}
    from server.settings import load_settings

    read = partial(
        load_settings,
        {name: value for name, value in flags.items() if name not in ("model", "config", "served_model_name")},
        config=config,
        model=model,
        served_model_name=served_model_name,
    )
    settings = read()
    from server.devices import start_first_worker

    with start_first_worker(settings) as first:
        from server.app import serve as run
        from server.display import ServeConsole
        from server.logs import configure_logging
        from server.serve_log import ServeLog

        configure_logging(settings.log_level, settings.log_format)
        display = ServeLog() if settings.log_format == "json" else ServeConsole(Console())
        raise typer.Exit(run(settings, display, read, first))
