"""Batches of a plain model on their way through the API process: sent together, and read when all are done."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import Request as HttpRequest

from engines.protocol import SamplingParams
from server.api.exchange import Exchange
from server.api.service import Service
from server.api.state import ApiState, PlainModel
from server.errors import InternalError, SlimserveError
from server.requests import Reply, Request

_NO_DRAWS = (SamplingParams(seed=0),)


def batch_request(
    state: ApiState, model: PlainModel, arrived: float, *, rows: int, bucket: int, inputs: bytes
) -> Request:
    """``inputs`` are packed tensors."""
    return Request(
        id=state.next_request_id(),
        model=model.name,
        prompt=[],
        max_tokens=0,
        sampling=_NO_DRAWS,
        arrived=arrived,
        rows=rows,
        bucket=bucket,
        inputs=inputs,
    )


async def compute(
    state: ApiState, requests: Sequence[Request], service: Service, http_request: HttpRequest
) -> list[bytes]:
    """The packed outputs of each. Nothing stays behind when one is refused.

    Raises the error that ended the first of them, and ClientGone.
    """
    replies: list[Reply] = []
    try:
        for request in requests:
            replies.append(state.dispatcher.submit(service.apply(request)))
    except SlimserveError as error:
        for reply in replies:
            reply.close()
        seconds = state.clock() - requests[0].arrived
        state.metrics.refused(requests[0].model, error.reason, service.tenant.name, seconds)
        raise
    found: dict[int, bytes] = {}
    async with Exchange(replies, http_request.receive, _nothing, max_pending_tokens=None) as exchange:
        while len(found) < len(replies):
            for index, news in await exchange.next():
                if news.end != "stop":
                    raise InternalError("The model could not finish this answer.", log=f"a batch ended as {news.end}")
                found[index] = news.output
    return [found[index] for index in range(len(replies))]


def _nothing() -> None:
    """There is no quota of tokens to be charged."""
