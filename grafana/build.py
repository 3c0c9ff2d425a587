"""Writes ``grafana/dashboards`` from the panels: ``python -m grafana.build``."""

from __future__ import annotations

import json
from pathlib import Path

from grafana import engine, overview

FOLDER = Path(__file__).with_name("dashboards")
DASHBOARDS = {"overview": overview.DASHBOARD, "engine": engine.DASHBOARD}


def render(name: str) -> str:
    """The file of that dashboard."""
    return json.dumps(DASHBOARDS[name].to_json(), indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    for name in DASHBOARDS:
        (FOLDER / f"{name}.json").write_text(render(name))


if __name__ == "__main__":
    main()
