"""The commands ``slimserve tenants ...``: make keys, and the hashes that the tenants file holds."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Make keys for the tenants file (slimserve serve --tenants FILE).")


@app.command()
def new(name: Annotated[str, typer.Argument(help="Of the tenant, as metrics will show it.")]) -> None:
    """Make a key; print the entry for the tenants file, and the key, which is stored nowhere."""
    from server.tenants import hash_key, new_key

    key = new_key()
    typer.echo(f'  - name: {name}\n    keys: ["{hash_key(key)}"]')
    typer.echo(f"the key, shown this once: {key}", err=True)


@app.command("hash")
def hash_() -> None:
    """Print the hash of a key that exists, read from standard input: arguments can be seen by other users."""
    from server.tenants import hash_key

    key = typer.prompt("key", hide_input=True) if sys.stdin.isatty() else sys.stdin.readline().strip()
    typer.echo(hash_key(key))
