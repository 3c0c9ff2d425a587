"""The contract between the scheduler and every engine: plain data, no tensor, no torch.

The scheduler decides (which items, how many tokens, which KV blocks); an engine computes. Everything that
crosses this seam is one of the structs below, so a plan can be encoded, logged, replayed and sent to a peer rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

import msgspec

from engines.tensors import Signature

EngineKind = Literal["generation", "onnx", "fake"]
End = Literal["", "stop", "length", "cancelled", "error"]
"""How an item ended; the empty string means that it goes on."""
Irregular = Literal["", "compile", "capture", "swap", "retry"]
"""What took part of a step's time beside its work: compiling, capturing a graph, moving memory between tiers, running
its items one by one because together they failed."""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What a load finds out by trying. The next load of the same spec on the same device may start from it."""

    max_rows: int
    step_tokens: int
    """Tokens of the largest step."""
    workspace: int
    """Bytes that rows and the largest step need beside weights and KV."""
    threads: int = 0
    """CPU threads that were fastest; 0 where they were not chosen by measurement. The rest is about them."""
    cores: int = 0
    step_seconds: float = 0.0
    """Of a step, roughly, before its tokens count."""
    token_seconds: float = 0.0
    profile: tuple[StepSample, ...] = ()
    """How long some steps took, so that the first requests are not scheduled blindly."""


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker needs to build one engine. Sizes in bytes, lengths in tokens."""

    name: str
    kind: EngineKind = "generation"
    source: str = ""
    """Folder or ``.gguf`` file of the model, already on this machine."""
    device: str = "cpu"
    dtype: str = "auto"
    kv_dtype: str = "auto"
    max_model_len: int | None = None
    max_batch: int | None = None
    max_step_tokens: int | None = None
    memory_limit: int | None = None
    """Bytes that this engine may take for weights, workspace and KV together; None takes the device's default share."""
    threads: int | None = None
    """CPU threads inside one operation; None chooses by measurement."""
    keep_quantized: bool = False
    """Keep the quantized weights of a ``.gguf`` file as they are stored, instead of dequantizing them at load."""
    random_weights: int | None = None
    """Seed that fills the config's shapes with random weights instead of reading any file."""
    uniform_routing: bool = False
    """Draw each token's experts uniformly at random: random weights route to a few only. Needs ``random_weights``."""
    measured: Measured | None = None
    """From an earlier load of this very spec on this device, which then need not be repeated, nor the checks of an
    engine folder's files and fingerprint."""
    verified: str = ""
    """Folder that remembers which files were found to be what their record says; empty reads them all again."""
    fake_step_seconds: float = 0.0
    """Only for the kind ``fake``: how long each of its steps takes."""


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine can hold and do in one step; fixed at load but for ``graph_rows``."""

    blocks: int
    """KV blocks, ids 0 .. blocks-1."""
    block_size: int
    """Tokens in one KV block."""
    max_rows: int
    """Rows in one step, and slots 0 .. max_rows-1 of resident row state."""
    max_step_tokens: int
    max_model_len: int
    """Longest sequence, prompt and output together."""
    graph_rows: tuple[int, ...] = ()
    """Row counts for which a captured graph of decodes exists, ascending."""
    graph_tokens: tuple[int, ...] = ()
    """Flat token counts for which a captured graph of any other step exists, ascending."""
    one_shot_rows: tuple[int, ...] = ()
    """Row counts that steps of one-shot items are padded to, ascending; one of more rows, or of any where there are
    none, is computed as it is."""


class LoadPhase(msgspec.Struct, frozen=True):
    """One part of a load, in the order in which they came."""

    name: str
    seconds: float


class ModelWork(msgspec.Struct, frozen=True, kw_only=True):
    """What a step computes and must read at least, by the model's shape. Multiply and add are two operations."""

    token_flops: float
    """Of each computed token, attention over the context and the output layer apart."""
    row_flops: float
    """Of the output layer, for each row that draws a token."""
    decode_pair_flops: float
    """Of attention, for each query-key pair of rows that compute one token."""
    prompt_pair_flops: float
    """The same of longer rows."""
    weight_bytes: float
    """Weights that every step reads."""
    kv_token_bytes: float
    experts: int = 0
    """Routed experts of a layer; 0 where there are none."""
    experts_per_token: int = 0
    expert_bytes: float = 0.0
    """Of one routed expert in each layer that has experts, together."""


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """The GPU of an engine. Peaks are the data sheet's, without sparsity; None where we do not know them."""

    name: str
    uuid: str
    """As the driver writes it."""
    peak_flops: float | None = None
    """Operations per second in the engine's dtype."""
    peak_bytes: float | None = None
    """Bytes per second from its memory."""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What was loaded, for the log, the metrics and the root of the block hashes."""

    name: str
    fingerprint: str
    """Hash of the model's identity and the KV dtype: blocks of different fingerprints never match."""
    device: str
    dtype: str
    kv_dtype: str
    weight_bytes: int
    kv_bytes: int
    threads: int
    load_seconds: float
    load_phases: tuple[LoadPhase, ...] = ()
    """What the time of the load went into."""
    vocab_size: int
    measured: Measured | None = None
    """What ``EngineSpec.measured`` may say at the next load."""
    work: ModelWork | None = None
    """None where nobody counted it."""
    gpu: Gpu | None = None
    """None on the CPU."""
    signature: Signature | None = None
    """Of a plain model; None where requests are tokens."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one choice draws its tokens. Noise for output position p is Philox(seed, choice, p) on every backend."""

    seed: int
    """0 <= seed < 2**64, fixed at acceptance."""
    choice: int = 0
    temperature: float = 1.0
    """0 takes the best token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and output tokens, 1 is off."""
    presence_penalty: float = 0.0
    """Over output tokens only, like ``frequency_penalty``."""
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    """How many best alternatives to report beside the drawn token; None reports nothing."""
    min_tokens: int = 0
    """``stop_token_ids`` are masked until this many output tokens exist."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the item (EOS among them, unless the request ignores it)."""


class Admit(msgspec.Struct, frozen=True, kw_only=True):
    """Full state of a row that takes a slot: a new item, or one that comes back after preemption or replay."""

    item: int
    slot: int
    tokens: list[int]
    """Prompt, then the output tokens that exist already."""
    prompt_length: int
    """Output position p of the next token is ``len(tokens) - prompt_length``."""
    blocks: tuple[int, ...]
    """Block ids that already hold computed tokens (prefix hits)."""
    sampling: SamplingParams
    prompt_logprobs: int | None = None
    """As ``SamplingParams.logprobs``, for the prompt's own tokens (completions with ``echo``); None reports nothing."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One item's share of a step: compute tokens ``start .. start+count-1`` of its sequence."""

    item: int
    slot: int
    start: int
    count: int
    new_blocks: tuple[int, ...]
    """Block ids appended to the row's block table before this step writes."""
    max_new: int
    """Upper bound of tokens drawn after the last computed one: 0 in mid-prompt, else 1."""


class OneShotRow(msgspec.Struct, frozen=True, kw_only=True):
    """One item that ends after one step: a plain model's rows in a shape bucket. Holds no blocks and no slot."""

    item: int
    bucket: int
    rows: int


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """All that one step does. ``launch`` depends on this and on earlier plans only."""

    step: int
    """Rises by one with each plan of a worker; it is the ticket."""
    engine: str
    admits: tuple[Admit, ...] = ()
    rows: tuple[Row, ...] = ()
    """Rows with ``count == 1 and max_new == 1`` (decodes) come first."""
    one_shot: tuple[OneShotRow, ...] = ()
    graph_rows: int = 0
    """Captured graph to run where all rows decode, from ``Capacity.graph_rows``; 0 runs without one."""
    graph_tokens: int = 0
    """The same for any other step, from ``Capacity.graph_tokens``."""
    padded_rows: int = 0
    """Rows of a step of one-shot items with the blank ones, from ``Capacity.one_shot_rows``."""


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Natural-log probabilities at one position, of the model's distribution before temperature and truncation."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class RowResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a step gave one row: 0 .. max_new tokens; a one-shot item has ``output`` instead."""

    item: int
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] = []
    """One entry a token where the item asked for logprobs, else empty."""
    prompt_logprobs: list[TokenLogprobs] = []
    """Entries for prompt positions ``start+1 .. start+count`` that lie inside the prompt, where asked for."""
    output: bytes = b""
    error: str = ""
    """Why a one-shot item alone failed, for its client; empty where it did not."""


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """Results of one launched plan, in the plan's row order."""

    step: int
    rows: list[RowResult]
    seconds: float
    """Time that the device worked on this step."""
    irregular: Irregular = ""
    """Such a step says nothing of how long its work takes; the empty string is the usual."""


class StepSample(msgspec.Struct, frozen=True, kw_only=True):
    """How long the device works on a step of some size, measured at load. A decode is a row that computes one token."""

    rows: int
    """Of one-shot items with the blank ones."""
    tokens: int = 0
    bucket: int | None = None
    """Shape bucket of one-shot items; None for sequences."""
    decode_pairs: float = 0.0
    """Query-key pairs of the decodes."""
    prompt_pairs: float = 0.0
    """Query-key pairs of longer rows."""
    prompt_start: int = 0
    """Most earlier tokens of a longer row."""
    seconds: float


class LoadProgress(msgspec.Struct, frozen=True, kw_only=True):
    """Where a load stands; ``done`` and ``total`` in bytes, or both 0 where a phase has no measure."""

    phase: Literal["verify", "read", "compile", "allocate", "measure"]
    done: int = 0
    total: int = 0


ReportProgress = Callable[[LoadProgress], None]


class EngineLoadError(Exception):
    """A model that cannot be served. The text goes to the user: what is wrong and what to do."""


class Engine(Protocol):
    """Computes steps. One thread calls it; at most two steps are launched and not yet collected."""

    @property
    def info(self) -> EngineInfo:
        """What was loaded. Safe to call at any time."""

    @property
    def capacity(self) -> Capacity:
        """Safe to call at any time; only ``graph_rows`` and ``graph_tokens`` may differ between calls."""

    def launch(self, plan: StepPlan) -> int:
        """Enqueue the step and return its ticket (``plan.step``) within 1 ms. Safe with fewer than two in flight."""

    def collect(self, ticket: int) -> StepResult:
        """Wait for the oldest launched step and give its results. Safe only for that step's ticket.

        Raises whatever the step raised; the engine is then unusable and the worker dies.
        """

    def close(self) -> None:
        """Give back all memory. Safe when nothing is in flight."""


@runtime_checkable
class TensorEngine(Engine, Protocol):
    """An engine of one-shot items, whose inputs are no part of a plan."""

    def put(self, item: int, inputs: bytes) -> None:
        """Take the packed inputs (``engines.tensors.pack``) of an item of the step that is launched next."""
