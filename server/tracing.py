"""Traces of requests for OpenTelemetry: a span for each part of a request's way, by the numbers of
``docs/way-of-a-request.md`` (attribute ``slimserve.way``).

The spans are made when a request is over, from times that are noted anyway: beside a running stream nothing of
OpenTelemetry runs. Attributes are named by its semantic conventions for HTTP and for generative AI.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from server.errors import UsageError
from server.request_record import GenerationRecord, RequestRecord
from server.requests import Reply

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_SEND_TIMEOUT = 5
"""Seconds for one attempt to reach the collector."""
_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}


class Tracer:
    """Hands the spans of ended requests to a collector, which gets them in batches from a thread of its own."""

    def __init__(
        self, provider: TracerProvider, version: str, *, clock: Callable[[], float], wall_clock: Callable[[], float]
    ) -> None:
        """``clock`` is that of the records, ``wall_clock`` gives Unix seconds."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("slimserve", version)
        self._propagator = TraceContextTextMapPropagator()
        self._clock = clock
        self._wall_clock = wall_clock

    @classmethod
    def open(
        cls, endpoint: str, version: str, *, clock: Callable[[], float], wall_clock: Callable[[], float]
    ) -> Tracer:
        """Sends OTLP over HTTP to ``endpoint``: a collector's address, or the whole URL of its traces.

        ``OTEL_EXPORTER_OTLP_HEADERS``, ``OTEL_TRACES_SAMPLER``, ``OTEL_SERVICE_NAME`` and ``OTEL_RESOURCE_ATTRIBUTES``
        are respected. Raises UsageError where the libraries are missing.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise UsageError('--otlp-endpoint needs more libraries: pip install "slimserve[tracing]"') from None
        name = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "slimserve"}
        provider = TracerProvider(
            resource=Resource.create({**name, "service.version": version}), shutdown_on_exit=False
        )
        url = endpoint if endpoint.rstrip("/").endswith("/v1/traces") else f"{endpoint.rstrip('/')}/v1/traces"
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(url, timeout=_SEND_TIMEOUT)))
        return cls(provider, version, clock=clock, wall_clock=wall_clock)

    def close(self) -> None:
        """Send what is left. Blocks, at most some seconds."""
        self._provider.shutdown()

    def record(self, record: RequestRecord) -> str:
        """The trace's id, which is the client's where it sent one."""
        from opentelemetry.trace import format_trace_id

        root = _Root(self._tracer, self._wall_clock() - self._clock())
        root.write(record, self._propagator.extract(record.parent))
        trace: str = format_trace_id(root.span.get_span_context().trace_id)
        return trace


class _Root:
    """The spans of one request."""

    def __init__(self, tracer: Any, offset: float) -> None:
        """``offset`` takes a time of the records to Unix seconds."""
        self._tracer = tracer
        self._offset = offset
        self.span: Any = None

    def _at(self, seconds: float) -> int:
        """Unix nanoseconds."""
        return round((seconds + self._offset) * 1e9)

    def write(self, record: RequestRecord, context: Any) -> None:
        """All of them; nothing but the root where the client's trace is not to be recorded."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        name = f"{record.method} {record.route}" if record.route else record.method
        start = self._at(record.began)
        self.span = self._tracer.start_span(name, context, SpanKind.SERVER, _http_attributes(record), start_time=start)
        if self.span.is_recording():
            if record.generation is not None:
                self._write_generation(record, record.generation)
            if record.answered_at is not None:
                self._child(self.span, "respond", record.answered_at, record.ended, {"slimserve.way": "7"})
            if record.status is not None and record.status >= 500:
                self.span.set_status(Status(StatusCode.ERROR))
        self.span.end(self._at(record.ended))

    def _write_generation(self, record: RequestRecord, generation: GenerationRecord) -> None:
        from opentelemetry.trace import Status, StatusCode

        ended = record.ended if generation.ended is None else generation.ended
        self._child(self.span, "parse", generation.arrived, generation.submitted, {"slimserve.way": "1"})
        attributes = _gen_ai_attributes(record, generation)
        name = f"{attributes['gen_ai.operation.name']} {generation.model}"
        whole = self._start(self.span, name, generation.submitted, attributes)
        admitted = ended if generation.admitted is None else generation.admitted
        refusal = {"slimserve.refusal": generation.refusal} if generation.refusal else {}
        self._child(whole, "admission", generation.submitted, admitted, {"slimserve.way": "2", **refusal})
        for index, reply in enumerate(generation.replies):
            self._write_reply(whole, index, reply, admitted, ended)
        if reason := generation.refusal or generation.error:
            whole.set_attribute("error.type", reason)
            whole.set_status(Status(StatusCode.ERROR, reason))
        whole.end(self._at(ended))

    def _write_reply(self, parent: Any, index: int, reply: Reply, admitted: float, ended: float) -> None:
        """Each part of one prompt's way, as far as it came."""
        prompt = {"slimserve.prompt": index}
        if not reply.offered_at:
            self._child(parent, "dispatch", admitted, ended, {"slimserve.way": "3", **prompt})
            return
        offered, first = reply.offered_at[0], reply.first_token_at
        offers = {"slimserve.offers": len(reply.offered_at)}
        self._child(parent, "dispatch", min(admitted, offered), offered, {"slimserve.way": "3", **prompt, **offers})
        if first is None:
            self._child(parent, "queue", offered, ended, {"slimserve.way": "4", **prompt})
            return
        planned = min(offered + reply.queue_seconds, first)
        self._child(parent, "queue", offered, planned, {"slimserve.way": "4", **prompt})
        self._child(parent, "prefill", planned, first, {"slimserve.way": "4-6", **prompt})
        steps = {
            "slimserve.steps": reply.steps,
            "slimserve.batch.mean": round(reply.step_rows / max(reply.steps, 1), 2),
            "slimserve.batch.max": reply.largest_step,
        }
        self._child(parent, "decode", first, ended, {"slimserve.way": "4-6", **prompt, **steps})

    def _child(self, parent: Any, name: str, start: float, end: float, attributes: dict[str, Any]) -> None:
        self._start(parent, name, start, attributes).end(self._at(max(start, end)))

    def _start(self, parent: Any, name: str, start: float, attributes: dict[str, Any]) -> Any:
        from opentelemetry.trace import set_span_in_context

        return self._tracer.start_span(
            name, set_span_in_context(parent), attributes=attributes, start_time=self._at(start)
        )


def _http_attributes(record: RequestRecord) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "http.request.method": record.method,
        "url.path": record.path,
        "slimserve.request_id": record.id,
    }
    if record.route:
        attributes["http.route"] = record.route
    if record.status is None:
        attributes["error.type"] = "client_left"
    else:
        attributes["http.response.status_code"] = record.status
        if record.status >= 500:
            attributes["error.type"] = str(record.status)
    return attributes


def _gen_ai_attributes(record: RequestRecord, generation: GenerationRecord) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": _OPERATIONS.get(record.route, "generate_content"),
        "gen_ai.provider.name": "slimserve",
        "gen_ai.request.model": generation.model,
        "gen_ai.response.model": generation.model,
        "gen_ai.request.stream": generation.streamed,
        "gen_ai.usage.input_tokens": generation.prompt_tokens,
        "gen_ai.usage.output_tokens": generation.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": sum(reply.cached_tokens for reply in generation.replies),
    }
    if generation.replies:
        attributes |= _sampling_attributes(generation.replies[0])
    if generation.finish_reasons:
        attributes["gen_ai.response.finish_reasons"] = generation.finish_reasons
    if generation.first_token_at is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = round(generation.first_token_at - generation.arrived, 6)
    return attributes


def _sampling_attributes(reply: Reply) -> dict[str, Any]:
    first = reply.request.sampling[0]
    return {
        "gen_ai.request.max_tokens": reply.request.max_tokens,
        "gen_ai.request.choice.count": len(reply.request.sampling),
        "gen_ai.request.temperature": first.temperature,
        "gen_ai.request.top_p": first.top_p,
    }
