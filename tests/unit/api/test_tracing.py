"""Spans of a request's way, as OpenTelemetry's own in-memory exporter gets them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from engines.protocol import SamplingParams
from server.api.routes import create_api
from server.errors import Overloaded
from server.observer import Observer
from server.request_record import GenerationRecord, RequestRecord
from server.requests import Reply, Request
from server.tracing import Tracer
from tests.unit.api.harness import Connection, Now, ScriptedDispatcher, call, make_state, until

pytest.importorskip("opentelemetry.sdk")

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
NOT_SAMPLED = f"00-{TRACE}-b7ad6b7169203331-00"
BOOT = 1_700_000_000.0
"""Unix time at which the clock of the records was 0."""


class Collected:
    """A tracer and what it exported."""

    def __init__(self) -> None:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.clock = Now(0.0)
        self.tracer = Tracer(provider, "1", clock=self.clock, wall_clock=lambda: BOOT + self.clock.seconds)

    @property
    def spans(self) -> dict[str, Any]:
        return {span.name: span for span in self.exporter.get_finished_spans()}

    def times(self, name: str) -> tuple[float, float]:
        """Seconds of the records' clock."""
        span = self.spans[name]
        return round(span.start_time / 1e9 - BOOT, 3), round(span.end_time / 1e9 - BOOT, 3)


def reply(offered: Sequence[float] = (1.3,), first: float | None = 2.0) -> Reply:
    request = Request(0, "m", [1, 2, 3], 4, (SamplingParams(seed=1, temperature=0.5),), arrived=1.0)
    made = Reply(request, lambda _: None)
    made.offered_at.extend(offered)
    if first is not None:
        made.queue_seconds = 0.2
        made.deliver(0, 0, [5, 6], "length", now=first)
        made.took_part(3)
        made.took_part(5)
    return made


def record(generation: GenerationRecord | None, **fields: Any) -> RequestRecord:
    made = RequestRecord("id-1", "POST", "/v1/completions", 0.9, route="/v1/completions")
    made.status, made.answered_at, made.ended, made.generation = 200, 2.1, 4.1, generation
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def generation(replies: Sequence[Reply], **fields: Any) -> GenerationRecord:
    made = GenerationRecord("m", 1.0, 1.2, 3, replies, streamed=True, admitted=1.3, ended=4.0, output_tokens=2)
    made.finish_reasons = ("length",)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_each_part_of_the_way_is_a_span_with_its_times_and_number() -> None:
    collected = Collected()
    collected.tracer.record(record(generation([reply()])))
    ways = {
        "parse": ("1", 1.0, 1.2),
        "admission": ("2", 1.2, 1.3),
        "dispatch": ("3", 1.3, 1.3),
        "queue": ("4", 1.3, 1.5),
        "prefill": ("4-6", 1.5, 2.0),
        "decode": ("4-6", 2.0, 4.0),
        "respond": ("7", 2.1, 4.1),
    }
    for name, (way, start, end) in ways.items():
        assert collected.spans[name].attributes["slimserve.way"] == way
        assert collected.times(name) == (start, end), name
    assert collected.times("POST /v1/completions") == (0.9, 4.1)
    assert collected.times("text_completion m") == (1.2, 4.0)
    assert len(collected.spans) == len(ways) + 2
    decode = collected.spans["decode"].attributes
    assert (decode["slimserve.steps"], decode["slimserve.batch.mean"], decode["slimserve.batch.max"]) == (2, 4.0, 5)
    parents = {span.context.span_id: name for name, span in collected.spans.items()}
    inner = ("admission", "dispatch", "queue", "prefill", "decode")
    assert {parents[collected.spans[name].parent.span_id] for name in inner} == {"text_completion m"}
    outer = ("parse", "respond", "text_completion m")
    assert {parents[collected.spans[name].parent.span_id] for name in outer} == {"POST /v1/completions"}


def test_attributes_are_those_of_the_conventions() -> None:
    collected = Collected()
    collected.tracer.record(record(generation([reply()])))
    attributes = collected.spans["text_completion m"].attributes
    assert dict(attributes) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "slimserve",
        "gen_ai.request.model": "m",
        "gen_ai.response.model": "m",
        "gen_ai.request.stream": True,
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.response.time_to_first_chunk": 1.0,
    }
    http = collected.spans["POST /v1/completions"].attributes
    assert (http["http.request.method"], http["http.route"]) == ("POST", "/v1/completions")
    assert (http["http.response.status_code"], http["slimserve.request_id"]) == (200, "id-1")


@pytest.mark.parametrize(
    ("made", "last", "missing"),
    [
        (reply([], None), "dispatch", ("queue", "prefill", "decode")),
        (reply([1.3], None), "queue", ("prefill", "decode")),
    ],
)
def test_a_request_that_ends_early_has_spans_as_far_as_it_came(made: Reply, last: str, missing: Sequence[str]) -> None:
    collected = Collected()
    collected.tracer.record(record(generation([made], finish_reasons=("cancelled",)), status=None, answered_at=None))
    assert collected.times(last)[1] == 4.0
    assert not {"respond", *missing} & collected.spans.keys()
    assert collected.spans["POST /v1/completions"].attributes["error.type"] == "client_left"


def test_a_death_of_a_worker_shows() -> None:
    collected = Collected()
    collected.tracer.record(record(generation([reply([1.3, 1.8])])))
    assert collected.spans["dispatch"].attributes["slimserve.offers"] == 2


@pytest.mark.parametrize("sent", [PARENT, "00-nonsense-01", ""])
def test_the_trace_is_the_client_s_where_it_sent_one(sent: str) -> None:
    collected = Collected()
    trace = collected.tracer.record(record(None, parent={"traceparent": sent}))
    assert (trace == TRACE) == (sent == PARENT)
    root = collected.spans["POST /v1/completions"]
    assert (root.parent is not None) == (sent == PARENT)


def test_a_trace_that_the_client_does_not_record_is_not_recorded() -> None:
    collected = Collected()
    assert collected.tracer.record(record(generation([reply()]), parent={"traceparent": NOT_SAMPLED})) == TRACE
    assert not collected.spans


# --- through the API


def state_with(manifest: Any, dispatcher: ScriptedDispatcher, collected: Collected) -> Any:
    state = make_state(manifest, dispatcher)
    state.observer = Observer(state.clock, 100, collected.tracer)
    return state


def test_the_api_notes_what_the_spans_need(manifest: Any) -> None:
    collected = Collected()
    state = state_with(manifest, ScriptedDispatcher(lambda request, choice: "abc"), collected)
    body = {"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": "Hello"}]}
    headers = {"traceparent": PARENT, "tracestate": "vendor=1", "x-request-id": "mine"}
    (answer,) = call(create_api(state), ("POST", "/v1/chat/completions", body), headers=headers)
    usage = answer.json()["usage"]
    chat = collected.spans["chat tiny"]
    assert chat.attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert chat.attributes["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 2
    assert chat.attributes["gen_ai.response.finish_reasons"] == ("length",)
    root = collected.spans["POST /v1/chat/completions"]
    assert root.attributes["slimserve.request_id"] == "mine"
    assert f"{root.context.trace_id:032x}" == TRACE
    assert root.context.trace_state.get("vendor") == "1"
    assert "Hello" not in repr([span.to_json() for span in collected.spans.values()])


def test_a_refusal_is_a_trace_too(manifest: Any) -> None:
    collected = Collected()
    dispatcher = ScriptedDispatcher()
    dispatcher.refusal = Overloaded("busy", retry_after=1, reason="late")
    state = state_with(manifest, dispatcher, collected)
    call(create_api(state), ("POST", "/v1/completions", {"model": "tiny", "prompt": "a"}))
    assert collected.spans["admission"].attributes["slimserve.refusal"] == "late"
    assert collected.spans["text_completion tiny"].attributes["error.type"] == "late"
    assert collected.spans["POST /v1/completions"].attributes["http.response.status_code"] == 503


def test_an_unknown_route_is_named_by_its_method_alone(manifest: Any) -> None:
    collected = Collected()
    call(create_api(state_with(manifest, ScriptedDispatcher(), collected)), ("GET", "/v1/none?key=secret", None))
    assert collected.spans["GET"].attributes["url.path"] == "/v1/none"
    assert "secret" not in collected.spans["GET"].to_json()


def test_probes_and_scrapes_leave_no_trace(manifest: Any) -> None:
    collected = Collected()
    app = create_api(state_with(manifest, ScriptedDispatcher(), collected))
    call(app, *(("GET", path, None) for path in ("/health/live", "/health/ready", "/metrics", "/stats")))
    assert not collected.spans


def test_a_client_that_leaves_ends_its_trace(manifest: Any) -> None:
    async def main() -> None:
        collected = Collected()
        dispatcher = ScriptedDispatcher()
        app = create_api(state_with(manifest, dispatcher, collected))
        connection = Connection(app, "/v1/completions", {"model": "tiny", "prompt": "a", "stream": True})
        await until(lambda: dispatcher.replies)
        connection.leave()
        await connection.task
        assert collected.spans["text_completion tiny"].attributes["gen_ai.response.finish_reasons"] == ("cancelled",)
        assert collected.spans["POST /v1/completions"].attributes["error.type"] == "client_left"

    asyncio.run(main())
