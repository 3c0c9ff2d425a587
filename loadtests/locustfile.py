"""What locust runs: ``locust -f loadtests/locustfile.py --host http://127.0.0.1:8000``

In locust's tables and its report the type of a row says what was timed: TOTAL, the whole answer (its size: output
tokens); TTFT, its first token; TPOT, its mean later token; REFUSED 429 and 503, answers with Retry-After; LEFT, clients
that closed the connection; FAILED, all else.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # locust itself adds this file's own folder only

import gevent
from locust import LoadTestShape, User, events, task
from locust.runners import MasterRunner, WorkerRunner

from benchmarks.simulation.traces import TraceName, load
from loadtests.answers import Api, Failed, Outcome
from loadtests.figures import (
    ALL,
    KINDS,
    TIMES,
    Figures,
    WrongLimits,
    limits_table,
    read_limits,
    summary_table,
    together,
)
from loadtests.shapes import SHAPES, Shape, users_at
from loadtests.traffic import Asked, Model, Walk, find_model

WHOLE_SHARE = 0.2
"""Of the completions that are asked for in one piece."""
PERIOD = 60.0
"""Seconds of a shape where no run time is given."""


class Failure(Exception):
    """How locust names a failed request: by its reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)


class _Run:
    """What all users of this process share."""

    api: Api
    model: Model
    users = 0
    verdict: Sequence[str] = ()


RUN = _Run()


@events.init_command_line_parser.add_listener
def _options(parser: Any) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="steady", help="Users over time. Default steady")
    parser.add_argument(
        "--pace", type=float, default=0.2, help="Requests a second of each user; 0: one after the other"
    )
    parser.add_argument(
        "--length-scale", type=float, default=1.0, help="Of the traces' lengths: 0.1 for a slow machine"
    )
    parser.add_argument("--disconnects", type=float, default=0.05, help="Share of requests whose client leaves early")
    parser.add_argument("--served-model", help="Default: the first that the server lists")
    parser.add_argument("--api-key", env_var="SLIMSERVE_API_KEY", is_secret=True, help="Sent as bearer token")
    parser.add_argument("--limits", type=Path, help="TOML file of limits that fail the run: loadtests/limits.toml")
    parser.add_argument("--figures", type=Path, help="Write what was found to this file, as JSON")
    parser.add_argument("--seed", type=int, default=0, help="Of lengths, texts and times")


@events.test_start.add_listener
def _find(environment: Any, **_: Any) -> None:
    """Ask the server for its model. Without one there is no run."""
    if isinstance(environment.runner, MasterRunner):
        return
    options = environment.parsed_options
    try:
        RUN.api = Api(environment.host or "", options.api_key)
        RUN.model = find_model(RUN.api, options.served_model)
    except (Failed, OSError, ValueError) as error:
        print(f"no run: {error}", file=sys.stderr)
        environment.process_exit_code = 1
        gevent.spawn(environment.runner.quit)


class _Asking(User):
    """Walks along its trace. The first task does nothing: the wait behind it spreads the users' beginnings."""

    abstract = True
    trace: TraceName

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        options = environment.parsed_options
        RUN.users += 1
        self.randomness = random.Random(f"{options.seed} {RUN.users}")
        self.asked: Asked | None = None
        self._disconnects = options.disconnects
        self._walk = Walk(load(self.trace), options.pace, options.length_scale, RUN.model.longest, self.randomness)
        self._due = time.monotonic()

    def wait_time(self) -> float:
        """Until the next request is due; one that is late goes at once, and times count from there."""
        self.asked = self._walk.next()
        now = time.monotonic()
        self._due = max(self._due + self.asked.gap, now)
        return self._due - now

    def send(self, kind: str, path: str, body: Mapping[str, object], output: int) -> None:
        """And tell locust what became of it."""
        leave_after = None
        if self.randomness.random() < self._disconnects:
            # Tokens share events, so that an answer has fewer of these; one in a piece has none.
            leave_after = self.randomness.randint(0, output // 2) if "stream" in body else 0
        outcome = RUN.api.ask(path, body, leave_after)
        for type_, seconds in parts(outcome):
            self.environment.events.request.fire(
                request_type=type_,
                name=kind,
                response_time=seconds * 1000,
                response_length=outcome.tokens if type_ == "TOTAL" else 0,
                exception=Failure(outcome.reason) if type_ == "FAILED" else None,
                context={},
            )


def parts(outcome: Outcome) -> list[tuple[str, float]]:
    """Rows of locust's tables that an outcome counts in, with its time there."""
    if outcome.kind != "complete":
        type_ = f"REFUSED {outcome.status}" if outcome.kind == "refused" else outcome.kind.upper()
        return [(type_, outcome.total)]
    times = {"TOTAL": outcome.total, "TTFT": outcome.ttft, "TPOT": outcome.tpot}
    return [(type_, seconds) for type_, seconds in times.items() if seconds is not None]


class ChatUser(_Asking):
    """Streamed chats as long as a recorded day's conversations."""

    trace = "azure-conversation"
    weight = 2

    @task
    def ask(self) -> None:
        if self.asked is not None:
            body = RUN.model.chat(self.asked, self.randomness)
            self.send("chat", "/v1/chat/completions", body, self.asked.output)


class CompletionUser(_Asking):
    """Completions as long as a recorded day's code, most of them streamed."""

    trace = "azure-code"
    weight = 1

    @task
    def ask(self) -> None:
        if self.asked is not None:
            streamed = self.randomness.random() >= WHOLE_SHARE
            body = RUN.model.completion(self.asked, self.randomness, streamed=streamed)
            self.send("completion" if streamed else "whole", "/v1/completions", body, self.asked.output)


class Users(LoadTestShape):
    """``--users`` is the most there are, ``--run-time`` the time of one shape."""

    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        options = self.runner.environment.parsed_options
        elapsed, most = self.get_run_time(), options.num_users or 1
        if options.run_time and elapsed > options.run_time:
            return None
        shape: Shape = options.shape
        return users_at(shape, elapsed, options.run_time or PERIOD, most), float(most)


def figures_of(stats: Any) -> dict[str, Figures]:
    """By kind of request, and of all together, from what locust counted."""
    rows = {(type_, name): row for (name, type_), row in stats.entries.items()}
    seconds = max(0.0, (stats.last_request_timestamp or 0.0) - stats.start_time)

    def count(type_: str, kind: str) -> int:
        return sum(row.num_requests for (found, name), row in rows.items() if found.startswith(type_) and name == kind)

    found = {}
    for kind in KINDS:
        total = rows.get(("TOTAL", kind))
        found[kind] = Figures(
            complete=count("TOTAL", kind),
            failed=count("FAILED", kind),
            refused=count("REFUSED", kind),
            left=count("LEFT", kind),
            tokens=0 if total is None else total.total_content_length,
            seconds=seconds,
            times={time: dict(rows[row].response_times) for time in TIMES if (row := (time.upper(), kind)) in rows},
        )
    return found | {ALL: together(found.values())}


@events.quitting.add_listener
def _judge(environment: Any, **_: Any) -> None:
    """With limits they decide the exit status, and not that a request failed."""
    if isinstance(environment.runner, WorkerRunner) or environment.runner is None:
        return
    options, figures = environment.parsed_options, figures_of(environment.stats)
    RUN.verdict = ["", *summary_table(figures)]
    if options.figures:
        options.figures.write_text(json.dumps({kind: each.to_json() for kind, each in figures.items()}))
    if options.limits is None or environment.process_exit_code is not None:
        return
    try:
        lines, missed = limits_table(read_limits(options.limits), figures)
    except (OSError, WrongLimits) as error:
        lines, missed = [f"no limits: {error}"], 1
    environment.process_exit_code = 1 if missed else 0
    RUN.verdict = [*RUN.verdict, "", *lines]


@events.quit.add_listener
def _show(**_: Any) -> None:
    """Below locust's own tables."""
    if RUN.verdict:
        print("\n".join(RUN.verdict), flush=True)
