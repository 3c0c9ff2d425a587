"""Messages between the API process and a worker process: msgspec structs over a ZeroMQ PAIR socket, never pickle.

Every message from a worker carries its incarnation, so that what a dead worker still had in flight is told apart.
Tensors are frames of their own behind the message that they belong to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from engines.protocol import Capacity, End, EngineInfo, EngineSpec, LoadProgress, SamplingParams, TokenLogprobs

Priority = Literal["high", "normal", "low"]


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """One choice of a request, as the scheduler sees it. Replay is the same struct with more ``tokens``."""

    item: int
    """Unique in the life of the API process."""
    request: int
    """Items of one request form a group; cancel and log are per request."""
    engine: str
    tokens: list[int]
    """Prompt, then output tokens that exist already (after a replay). Empty for a one-shot item."""
    prompt_length: int
    max_tokens: int
    """Most output tokens, those in ``tokens`` counted in; 0 computes the prompt only."""
    sampling: SamplingParams
    prompt_logprobs: int | None = None
    cache_salt: str = ""
    """Blocks of different salts never match."""
    waited: float = 0.0
    """Seconds since the request arrived at the API process when this was sent."""
    priority: Priority = "normal"
    tenant: str = ""
    weight: float = 1.0
    """Share of the tenant beside others of the same priority."""
    ttft: float | None = None
    """Target in seconds from arrival to the first token; None aims at nothing. So does ``tpot``."""
    tpot: float | None = None
    """Target in seconds for the mean of each later token."""
    firm: bool = False
    """The operator or the client set the targets: an item that must miss its first token is refused early."""
    timeout: float | None = None
    """Seconds from arrival after which the client no longer waits for the first token."""
    suspect: bool = False
    """It was in the step at which workers died: no other item may share a step with it."""
    rows: int = 0
    """One-shot items: rows in the batch; 0 marks a sequence."""
    bucket: int = 0
    """One-shot items: index of the shape bucket; only equal buckets share a step."""


# --- API process -> worker


class LoadEngine(msgspec.Struct, frozen=True, tag=True):
    spec: EngineSpec


class UnloadEngine(msgspec.Struct, frozen=True, tag=True):
    """Its items end with an error first."""

    name: str


class Offer(msgspec.Struct, frozen=True, tag=True):
    """All items of one request."""

    items: list[Item]
    inputs: list[bytes] = []
    """Packed tensors (``engines.tensors.pack``) of each one-shot item; empty for sequences."""


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Forget these items; unknown ids are ignored, because an end may cross a cancel on the wire."""

    items: list[int]


class Configure(msgspec.Struct, frozen=True, tag=True):
    """Go on with these settings. All items are forgotten; those that are to go on are offered again after it."""

    scheduler: bytes
    """A ``SchedulerConfig`` as JSON, as on the worker's command line."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Exit at once with status 0. The API process has drained before."""


ToWorker = LoadEngine | UnloadEngine | Offer | Cancel | Configure | Stop


# --- worker -> API process


class Hello(msgspec.Struct, frozen=True, tag=True):
    incarnation: int
    pid: int


class Loading(msgspec.Struct, frozen=True, tag=True):
    incarnation: int
    name: str
    progress: LoadProgress


class Loaded(msgspec.Struct, frozen=True, tag=True):
    incarnation: int
    info: EngineInfo
    capacity: Capacity


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    """``reason`` is for the user; the traceback is in the worker's log."""

    incarnation: int
    name: str
    reason: str


class Unloaded(msgspec.Struct, frozen=True, tag=True):
    incarnation: int
    name: str


Refusal = Literal["invalid", "overload", "timeout"]
"""Why an item is refused: it can never run here, it cannot be served in time, its client has stopped waiting."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The scheduler is the second gate: it may refuse what the door let in, until an item's first token."""

    incarnation: int
    items: list[int]
    reason: str
    kind: Refusal = "invalid"
    retry_after: float = 0.0
    """Seconds until the load should have gone down; 0 where trying again is of no use."""


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges of one engine."""

    name: str
    running: int
    waiting: int
    waiting_tokens: int
    blocks_used: int
    """Referenced by a live item."""
    blocks_cached: int
    """Findable, and free to reuse."""
    blocks_total: int
    token_budget: int
    preemptions: int
    """Counters count since the worker started."""
    prefix_queries: int
    """Prompt tokens looked up."""
    prefix_hits: int
    """Prompt tokens found."""
    integrity_errors: int
    predicted_wait: float = 0.0
    """Seconds until a request that arrives now would be given its first step."""
    prompt_token_seconds: float = 0.0
    """What one more waiting prompt token adds to that, beside the decodes of now."""
    recomputed_tokens: int = 0
    """Tokens computed again after a preemption."""
    computed_tokens: int = 0
    decisions: dict[str, int] = {}
    """How often the scheduler decided what, by reason, since the worker started."""
    step_error_p50: float = 0.0
    """Relative error of the predicted step times of late."""
    step_error_p95: float = 0.0


class LoadReport(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Sent at least every half second, so it is the heartbeat too."""

    incarnation: int
    steps: int
    """Settled steps since the worker started."""
    phase: str
    """What the loop does now: idle, load, step."""
    rss_bytes: int
    engines: list[EngineLoad]


class StepStats(msgspec.Struct, frozen=True, kw_only=True):
    seconds: float
    """Device time."""
    plan_seconds: float
    """Scheduler time: plan and settle."""
    rows: int
    tokens: int
    """Computed tokens, prompt and output together."""
    prompt_tokens: int
    predicted_seconds: float = 0.0
    """What the scheduler thought that the step would take; 0 where it knew nothing yet."""
    padding: int = 0
    """Tokens, or rows of one-shot items, that were computed for nobody: a captured graph has fixed sizes."""
    flops: float = 0.0
    """Counted from the model's shape, as is ``bytes_read``; 0 where the engine does not say."""
    bytes_read: float = 0.0
    """Weights and KV that the step had to read at least once."""


class StepOutputs(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """One message a step, in parallel arrays with one entry an item that has news."""

    incarnation: int
    engine: str
    step: int
    items: list[int]
    first_index: list[int]
    """Output index of the first token in ``tokens``; a token is accepted only where the log ends."""
    tokens: list[list[int]]
    ends: list[End]
    cached_tokens: list[int]
    """Prompt tokens that a prefix hit saved this item, so far."""
    queue_seconds: list[float]
    """Time between offer and first plan; 0 after the first tokens."""
    logprobs: dict[int, list[TokenLogprobs]] = {}
    """By item, where asked for."""
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
    outputs: dict[int, bytes] = {}
    """Packed tensors by one-shot item."""
    errors: dict[int, str] = {}
    """Why one-shot items failed, for their clients."""
    stats: StepStats


FromWorker = Hello | Loading | Loaded | LoadFailed | Unloaded | Refused | LoadReport | StepOutputs

_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


def encode(message: ToWorker | FromWorker) -> bytes:
    return _encoder.encode(message)


def to_frames(message: ToWorker | FromWorker) -> list[bytes]:
    """The message, and behind it its tensors."""
    match message:
        case Offer() if message.inputs:
            bare = msgspec.structs.replace(message, inputs=[b""] * len(message.inputs))
            return [encode(bare), *message.inputs]
        case StepOutputs() if message.outputs:
            # A dict keeps its order on the wire.
            return [
                encode(msgspec.structs.replace(message, outputs=dict.fromkeys(message.outputs, b""))),
                *message.outputs.values(),
            ]
    return [encode(message)]


def more_to_worker(message: ToWorker, frame: Callable[[], bytes]) -> ToWorker:
    """With the tensors that ``frame`` gives, one at a time."""
    if isinstance(message, Offer) and message.inputs:
        return msgspec.structs.replace(message, inputs=[frame() for _ in message.inputs])
    return message


def more_from_worker(message: FromWorker, frame: Callable[[], bytes]) -> FromWorker:
    """As ``more_to_worker``."""
    if isinstance(message, StepOutputs) and message.outputs:
        return msgspec.structs.replace(message, outputs={item: frame() for item in message.outputs})
    return message


def decode_to_worker(frame: bytes) -> ToWorker:
    """Raises msgspec.DecodeError on a malformed frame."""
    return _to_worker.decode(frame)


def decode_from_worker(frame: bytes) -> FromWorker:
    """Raises msgspec.DecodeError on a malformed frame."""
    return _from_worker.decode(frame)
