"""The commands ``slimserve config ...``: what a YAML file may hold, and whether one is right."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from server.settings import ModelSettings, Settings

app = typer.Typer(no_args_is_help=True, help="Check a YAML file (slimserve serve --config FILE), or print its schema.")


@app.command()
def schema() -> None:
    """Print the JSON schema of the YAML file, for editors and checks."""
    import json

    from server.settings import Settings

    document = Settings.model_json_schema() | {"title": "slimserve serve --config"}
    typer.echo(json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema"} | document, indent=2))


@app.command()
def check(file: Annotated[Path, typer.Argument(help="YAML file.", show_default=False)]) -> None:
    """Read a file as slimserve serve would, environment included, and print what is set and from where.

    Models are not looked for. Exit status 2 where something is wrong.
    """
    from server.display import columns
    from server.settings import from_environment, load_settings

    settings = load_settings({}, config=file)
    for line in columns([("setting", "value", "from"), *_rows(settings, from_environment())]):
        typer.echo(line)
    for entry in settings.models:
        typer.echo(f"model {entry.served_name}: {', '.join((entry.source or entry.kind, *_options(entry)))}")
    typer.echo(f"{file}: right")


def _rows(settings: Settings, environment: Collection[str]) -> Iterator[tuple[str, str, str]]:
    for name in sorted(settings.model_fields_set - {"models"}):
        source = f"SLIMSERVE_{name.upper()}" if name in environment else "file"
        yield name, str(getattr(settings, name)), source


def _options(entry: ModelSettings) -> Iterator[str]:
    """All that is not as it is by default."""
    for name, field in type(entry).model_fields.items():
        value = getattr(entry, name)
        if name not in ("name", "source") and value != field.default:
            yield f"{name} {value}"
