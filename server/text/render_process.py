"""Renders one chat template in a process of its own: run as a script, with a line of JSON per message on stdin, stdout.

A sandbox keeps a template from reading attributes it should not, but does not bound its work: nested loops, string
multiplication, filters and plain doubling of a variable can each take hours or all memory. Here the kernel bounds all
of them: CPU time per render by an interval timer whose signal kills this process, memory by a limit on address space.
The API process shares neither its interpreter lock nor its memory with the template, so open streams go on undisturbed.

Imports nothing of the server: it must start fast. The first line holds ``template`` and the limits; each later one is
a render, answered by an object with one key: ``text``, ``raised`` (the template called ``raise_exception``),
``too_long``, ``failed`` or ``out_of_memory``.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.parser import Parser

_LONGEST_ERROR = 300


class TemplateRaised(Exception):
    """The template called ``raise_exception``."""


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}`` marks text for training; here it is just its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Unlike jinja2's own ``tojson`` it escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: object) -> None:
    raise TemplateRaised(str(message))


def build_environment() -> jinja2.Environment:
    """The dialect in which models' chat templates are written."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _clock(now: str) -> Callable[[str], str]:
    moment = datetime.fromisoformat(now)
    return lambda format: moment.strftime(format)


def render(template: jinja2.Template, variables: dict[str, Any], now: str, most_chars: int) -> dict[str, Any]:
    """The answer."""
    parts = []
    length = 0
    try:
        for part in template.generate(strftime_now=_clock(now), **variables):
            length += len(part)
            if length > most_chars:
                return {"too_long": most_chars}
            parts.append(part)
        return {"text": "".join(parts)}
    except TemplateRaised as error:
        return {"raised": str(error)[:_LONGEST_ERROR]}
    except MemoryError:
        return {"out_of_memory": True}
    except RecursionError:
        return {"failed": "it calls itself without end"}
    except Exception as error:  # noqa: BLE001 - a template can raise anything
        return {"failed": f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]}


def main() -> None:
    lines = iter(sys.stdin.buffer)
    first = json.loads(next(lines))
    resource.setrlimit(resource.RLIMIT_AS, (first["most_memory"], first["most_memory"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the API process ends this one
    broken = None
    signal.setitimer(signal.ITIMER_PROF, first["seconds"])  # compiling folds constants: it can take for ever, too
    try:
        template = build_environment().from_string(first["template"])
    except (jinja2.TemplateError, RecursionError, MemoryError) as error:
        broken = {"failed": f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]}
    for line in lines:
        signal.setitimer(signal.ITIMER_PROF, first["seconds"])
        request = json.loads(line)
        answer = broken or render(template, request["variables"], request["now"], first["most_chars"])
        data = json.dumps(answer).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(data + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
