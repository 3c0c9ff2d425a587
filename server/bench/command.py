"""``slimserve bench serve``: a load on any OpenAI-compatible server, and what its users would feel."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from server.bench.load import Load
    from server.bench.run import Target
    from server.bench.summary import Summary

bench = typer.Typer(no_args_is_help=True, help="Measure a running server.")


@bench.callback()
def _group() -> None:
    pass


class Prompt(StrEnum):
    ids = "ids"
    words = "words"
    chat = "chat"


LOAD, REQUESTS, CLIENT = "Load (choose one)", "Requests", "Client and report"
EXAMPLES = """
[bold]Examples[/bold]

slimserve bench serve http://127.0.0.1:8000 --rate 8 --input 256-768 --output 64-320 --slo ttft=200ms,tpot=15ms
[dim]# 8 requests a second at random times: what users feel, and how many of them get the promised speed[/dim]

slimserve bench serve http://127.0.0.1:8000 --concurrency 64 --requests 256 --input 512 --output 128 --seeds 1
[dim]# 64 streams, the next request when one ends: how many tokens the server makes at most[/dim]

An open loop (--rate, --trace) sends each request at its time, whether or not the server keeps up; only that shows
what happens when it does not. Raise --rate until "good" falls: that is what the server carries. Prompts are new random
tokens in each run, so no prefix cache helps. Times count from when a request was due.
"""


@bench.command(epilog=EXAMPLES)
def serve(
    url: Annotated[str, typer.Argument(help="Where the server is, with or without /v1.")] = "http://127.0.0.1:8000",
    rate: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="Requests a second, Poisson. With --trace: stretch it to this.", rich_help_panel=LOAD
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Times and lengths from a .csv (Azure) or .jsonl (Mooncake) file.", rich_help_panel=LOAD),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Closed loop of this many streams.", rich_help_panel=LOAD)
    ] = None,
    requests: Annotated[
        int, typer.Option(min=1, help="A seed. p99 is shown from 500 up.", rich_help_panel=REQUESTS)
    ] = 500,
    input: Annotated[
        str | None,
        typer.Option(help="Prompt tokens: 512 or 256-768. Clips a trace's. Default 256-768.", rich_help_panel=REQUESTS),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(help="Output tokens. Clips a trace's. Default 64-320.", rich_help_panel=REQUESTS),
    ] = None,
    prompt: Annotated[
        Prompt,
        typer.Option(
            help="Random token ids; random words for servers that take text only; or words as a chat message.",
            rich_help_panel=REQUESTS,
        ),
    ] = Prompt.ids,
    vocab: Annotated[
        int, typer.Option(min=2, help="Token ids are below this; at most the model's.", rich_help_panel=REQUESTS)
    ] = 32000,
    temperature: Annotated[float, typer.Option(min=0, max=2, rich_help_panel=REQUESTS)] = 0.6,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos/--no-ignore-eos",
            help="Ask for exactly --output tokens; not all servers can.",
            rich_help_panel=REQUESTS,
        ),
    ] = True,
    model: Annotated[
        str | None, typer.Option(help="Default: the server's first one.", rich_help_panel=REQUESTS)
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="SLIMSERVE_API_KEY", help="Key.", rich_help_panel=REQUESTS)
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Runs, with new times and lengths in each.", rich_help_panel=CLIENT)
    ] = 3,
    slo: Annotated[
        str, typer.Option(help="Targets of ttft, tpot, gap, e2e: ttft=200ms,tpot=15ms", rich_help_panel=CLIENT)
    ] = "",
    clients: Annotated[
        int, typer.Option(min=1, help="Client processes, so that the client is not the limit.", rich_help_panel=CLIENT)
    ] = 4,
    timeout: Annotated[
        str, typer.Option(help="A request that takes longer has failed.", rich_help_panel=CLIENT)
    ] = "600s",
    json: Annotated[Path | None, typer.Option(help="Write all figures here.", rich_help_panel=CLIENT)] = None,
) -> None:
    """Send a load to an OpenAI-compatible server: latency, goodput, tokens/s. Ctrl-C shows what there is so far."""
    from server.bench.load import choose_load, find_target, parse_slo, seconds

    targets = parse_slo(slo)
    load = choose_load(
        rate=rate,
        trace=trace,
        concurrency=concurrency,
        requests=requests,
        inputs=input,
        outputs=output,
    )
    target = find_target(
        url,
        model,
        api_key,
        prompt=prompt.value,
        vocab=vocab,
        temperature=temperature,
        ignore_eos=ignore_eos,
        timeout=seconds(timeout, "--timeout"),
    )
    _run(target, load, seeds, clients, targets, json)


def _run(target: Target, load: Load, seeds: int, clients: int, slo: dict[str, float], path: Path | None) -> None:
    from server.bench.load import measure
    from server.bench.show import RequestProgress, as_json, show

    console = Console()
    console.print(f"{target.model} at {target.url}: {load.describe()}", highlight=False, markup=False, soft_wrap=True)
    summaries: list[Summary] = []
    interrupted = False
    for seed in range(seeds):
        with RequestProgress(console, f"seed {seed}", load.requests) as progress:
            summary, interrupted = measure(target, load, seed, clients=clients, slo=slo, on_progress=progress.show)
        if summary is not None:
            summaries.append(summary)
        if interrupted:
            break
    if summaries:
        show(console, summaries, slo)
    if interrupted:
        console.print("interrupted: requests that had not ended are left out")
    if path is not None and summaries:
        path.write_bytes(as_json({**load.settings(), "url": target.url, "model": target.model, "slo": slo}, summaries))
    if interrupted:
        raise typer.Exit(130)
