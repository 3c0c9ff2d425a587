"""The command ``slimserve``. Each command imports what it needs when it is called, so that ``--help`` is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from engines.protocol import EngineLoadError
from server import (
    compile_command,
    compress_command,
    config_commands,
    evaluate_command,
    plan_memory_command,
    serve_command,
    tenant_commands,
)
from server.bench.command import bench
from server.errors import SlimserveError, UsageError
from server.serve_command import complete_model

app = typer.Typer(
    name="slimserve",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Serve language models behind an OpenAI-compatible API.\n\n"
    "[bold]slimserve serve[/bold] fetches a small model and serves it; [bold]slimserve chat[/bold] talks to it.",
)
app.add_typer(tenant_commands.app, name="tenants")
app.add_typer(config_commands.app, name="config")
app.add_typer(bench, name="bench")
app.command(epilog=serve_command.EXAMPLES)(serve_command.serve)
app.command(epilog=compress_command.EXAMPLES)(compress_command.compress)
app.command(epilog=evaluate_command.EXAMPLES)(evaluate_command.evaluate)
app.command("compile", epilog=compile_command.EXAMPLES)(compile_command.compile_model)
app.command("plan-memory", epilog=plan_memory_command.EXAMPLES)(plan_memory_command.plan_memory)


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


@app.command()
def pull(
    name: Annotated[
        str,
        typer.Argument(help="smollm2-135m, or hf:org/name[@revision][:FILE.gguf].", autocompletion=complete_model),
    ],
) -> None:
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
def rm(
    name: Annotated[str, typer.Argument(help="As slimserve list shows it.", autocompletion=complete_model)],
) -> None:
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


@app.command(epilog="[bold]Examples[/bold]\n\nslimserve ps\n\nslimserve ps --json | jq '.models[].tokens_per_second'")
def ps(
    url: Annotated[str, typer.Option(envvar="SLIMSERVE_URL", help="Where the server is.")] = "http://127.0.0.1:8000",
    once: Annotated[bool, typer.Option("--once", help="Print a plain table and leave; so it is in a pipe.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and leave.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds between two looks.")] = 1.0,
    api_key: Annotated[str | None, typer.Option(envvar="SLIMSERVE_API_KEY", show_envvar=True, help="Key.")] = None,
) -> None:
    """Show what a running server's models do: requests running and waiting, tokens per second. Live on a terminal."""
    from server.ps_command import Watcher, show_live, show_once

    console = _console()
    with Watcher(url, api_key) as watcher:
        if once or as_json or not console.is_terminal:
            show_once(watcher, console, as_json=as_json)
        else:
            show_live(watcher, console, interval)


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
        app(prog_name="slimserve")
    except UsageError as error:
        _fail(error, 2)
    except (SlimserveError, EngineLoadError) as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(error: Any, status: int) -> None:
    from server.logs import log_failure

    if log_failure(str(error)):
        sys.exit(status)
    Console(stderr=True).print(f"Error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
