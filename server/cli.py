"""The command ``slimserve``. Each command imports what it needs when it is called, so that ``--help`` is quick."""

from __future__ import annotations

import sys
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from engines.protocol import EngineLoadError
from server import compress_command, evaluate_command, tenant_commands
from server.bench.command import bench
from server.errors import SlimserveError, UsageError

app = typer.Typer(
    name="slimserve",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Serve language models behind an OpenAI-compatible API.\n\n"
    "[bold]slimserve serve[/bold] fetches a small model and serves it; [bold]slimserve chat[/bold] talks to it.",
)
app.add_typer(tenant_commands.app, name="tenants")
app.add_typer(bench, name="bench")
app.command(epilog=compress_command.EXAMPLES)(compress_command.compress)
app.command(epilog=evaluate_command.EXAMPLES)(evaluate_command.evaluate)


def _print_version(wanted: bool) -> None:
    if wanted:
        from server.version import version

        typer.echo(version())
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


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


NETWORK, MODEL, BATCHING = "Network", "Model", "Batching and latency"
SERVE_EXAMPLES = """
[bold]Examples[/bold]

slimserve serve  [dim]# smollm2-135m, fetched first when it is not here[/dim]

slimserve serve ./DeepSeek-R1-Distill-Qwen-1.5B --dtype bfloat16 --target-tpot 50ms

slimserve serve ./model.gguf --served-model-name assistant --max-model-len 4096

SLIMSERVE_API_KEY=... slimserve serve --host 0.0.0.0 --config models.yaml

Each option is also an environment variable (SLIMSERVE_PORT) and a key of the YAML file (port). Flags win over the
environment, which wins over the file. Times are 5ms, 0.5s, 2min or plain seconds; sizes are 8GiB or 500MB.
"""


@app.command(epilog=SERVE_EXAMPLES)
def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="A name (slimserve list), hf:org/name, a folder or a .gguf file. Default: smollm2-135m."),
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
    log_level: Annotated[LogLevel | None, typer.Option(help="Of the log on stderr.")] = None,
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
        from server.display import ServeDisplay
        from server.logs import configure_logging

        configure_logging(settings.log_level)
        raise typer.Exit(run(settings, ServeDisplay(_console()), read, first))


@app.command()
def pull(name: Annotated[str, typer.Argument(help="smollm2-135m, or hf:org/name[@revision][:FILE.gguf].")]) -> None:
    """Fetch a model into the cache folder, verified."""
    from server.catalog import Catalog, cache_home
    from server.display import ProgressLines

    lines = ProgressLines(_console())
    try:
        path = Catalog(cache_home()).pull(name, lambda what, done, total: lines.update(name, what, done, total))
    finally:
        lines.close()
    _print(f"{name}: {path}")


@app.command("list")
def list_models(
    folders: Annotated[list[Path] | None, typer.Argument(help="Engine folders to show besides.")] = None,
) -> None:
    """Show the models that are here, with what is known of their quality."""
    from server.catalog import Catalog, cache_home, describe_folder, shipped_models
    from server.display import columns, size
    from server.sources import CATALOG

    models = [*shipped_models(), *Catalog(cache_home()).list(), *(describe_folder(folder) for folder in folders or ())]
    rows = [(model.name, size(model.size), model.source, model.quality, str(model.path)) for model in models]
    for line in columns([("name", "size", "source", "quality", "path"), *rows]) if rows else ():
        _print(line)
    others = ", ".join(sorted(set(CATALOG) - {model.name for model in models}))
    if others:
        _print(f"can be pulled: {others}, hf:org/name")


@app.command()
def rm(name: Annotated[str, typer.Argument(help="As slimserve list shows it.")]) -> None:
    """Delete a pulled model."""
    from server.catalog import Catalog, cache_home
    from server.display import size

    freed = Catalog(cache_home()).remove(name)
    _print(f"{name}: removed, {size(freed)} freed")


@app.command(
    epilog="[bold]Examples[/bold]\n\nslimserve chat\n\necho 'Why is the sky blue?' | slimserve chat --max-tokens 200"
)
def chat(
    url: Annotated[str, typer.Option(envvar="SLIMSERVE_URL", help="Where the server is.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Default: the server's first one.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0 takes the best token.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="SLIMSERVE_API_KEY", show_envvar=True, help="Key.")] = None,
) -> None:
    """Talk to a running server. Ctrl-C stops an answer, Ctrl-D leaves; a question can come through a pipe."""
    from server.chat_client import ChatClient, converse

    options = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    with ChatClient(url, api_key, {name: value for name, value in options.items() if value is not None}) as client:
        converse(client, model, system, _console())


@app.command()
def env() -> None:
    """Print versions and devices, for a bug report."""
    from server.environment import describe

    for name, value in describe():
        _print(f"{name:12} {value}")


def _console() -> Console:
    return Console()


def _print(text: str) -> None:
    _console().print(text, highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    """Errors are one line each: exit status 2 for a wrong command line, 1 for what did not work."""
    try:
        app()
    except UsageError as error:
        _fail(error, 2)
    except (SlimserveError, EngineLoadError) as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(error: Any, status: int) -> None:
    Console(stderr=True).print(f"Error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
