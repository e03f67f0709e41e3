"""Messages between web processes, engine processes, and the historian: msgspec structs, MessagePack on the wire.

New fields are added at the end with a default, so that processes of two versions understand each other.
"""

from typing import Any, Literal

import msgspec

from scheduling.core.sequence import SamplingParams, TokenLogprob

State = Literal["queued", "running", "finished", "cancelled", "failed"]
FinishReason = Literal["stop", "length", "cancelled", "error"]
ReplicaState = Literal["starting", "ready", "paused", "draining", "stopped", "failed", "unhealthy"]
"""`unhealthy`: the server that an upstream replica stands for does not serve; it claims nothing until that does."""
Backend = Literal["builtin", "openai"]
"""What computes: an engine of this project, or a server behind it that speaks OpenAI's dialect."""
BatchMode = Literal["serial", "static", "dynamic", "continuous"]
PrefixCache = Literal["on", "per_tenant", "off"]


class InferenceRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An admitted request, as it stands in its record in Redis."""

    id: str
    model: str
    tenant: str
    priority: int
    arrival_s: float
    prompt_token_ids: list[int]
    max_tokens: int
    sampling: SamplingParams
    reply_to: str = ""
    """Name of the web process that streams the answer; empty for submit-and-poll."""
    endpoint: str = "completions"
    deadline_s: float | None = None
    user: str = ""
    charged_tokens: int = 0
    """What admission took from the tenant's token bucket; the unused rest is given back at the end."""
    keep_s: int = 60
    """How long the record stays after the end."""
    traceparent: str = ""
    """W3C trace context of the web process's span; empty where nothing is traced."""
    forwarded: bytes = b""
    """What an upstream server is sent, as a JSON object: the messages or the prompt as they came, and the options that
    the client gave. Empty for a model of the builtin engine, which gets `prompt_token_ids` instead."""
    estimated_prompt_tokens: int = 0
    """Length of a forwarded prompt as the web process counted or guessed it; the upstream's own count comes later."""
    comes_again: bool = False
    """Whoever sent it sends it again where it is shed, under another id: that is not the end of it."""

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt, a guess where it is forwarded."""
        return self.estimated_prompt_tokens or len(self.prompt_token_ids)


class Finish(msgspec.Struct, frozen=True, array_like=True):
    """How a request ended. `text` is what the detokenizer still held back."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    text: str = ""
    error_code: str = ""
    error_message: str = ""


class SequenceUpdate(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one request. Tokens are numbered from 0; `texts[i]` belongs to token `start + i`.

    After a worker was lost, the next one sends everything from 0 again with a higher `attempt`; the receiver drops what
    it has by number.
    """

    request_id: str
    attempt: int
    start: int
    token_ids: list[int]
    texts: list[str]
    finish: Finish | None = None
    logprobs: list[TokenLogprob] = []
    """One for each token where the request asked for them."""


MarkKind = Literal["started", "preempted", "displaced", "resumed"]


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """A turn in a request's life on its worker: `ms` after its arrival.

    `preempted`: for lack of memory; `displaced`: a higher request took its slot. `tokens` is its output by then.
    """

    ms: int
    kind: MarkKind
    tokens: int


class Slot(msgspec.Struct, frozen=True, array_like=True):
    """One running request, as the dashboard shows it."""

    request_id: str
    tenant: str
    priority: int
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    claimed_ms: int = 0
    """After its arrival, as is the next."""
    first_token_ms: int | None = None
    marks: list[Mark] = []


class ProcessMemory(msgspec.Struct, frozen=True, array_like=True):
    """Device memory that one process holds; `bytes` is None where the driver does not say."""

    pid: int
    bytes: int | None = None


class Telemetry(msgspec.Struct, frozen=True, kw_only=True):
    """What the device says. Fields the source cannot read are None."""

    source: Literal["nvml", "host"]
    device: str
    utilization_percent: float | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    throttle_reasons: list[str] = []
    time_s: float = 0.0
    """When it was read."""
    stale_s: float = 0.0
    """Age of a reading whose successor is overdue, because the driver hangs; 0 for a fresh one."""
    lost: bool = False
    """The GPU has fallen off the bus or needs a reset; `detail` has the driver's word for it."""
    detail: str = ""
    """Why this is not the source one would expect, or what is wrong with it."""
    uuid: str = ""
    """NVML's name of the GPU or of the MIG instance."""
    mig: str = ""
    """`instance 1, compute 0` for a slice of a GPU; power, clocks, temperature and ECC are then the whole GPU's."""
    power_limit_w: float | None = None
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    ecc_corrected: int | None = None
    """Since the driver was loaded, as is the next."""
    ecc_uncorrected: int | None = None
    process_memory_bytes: int | None = None
    """What this engine process itself holds."""
    processes: list[ProcessMemory] = []
    """All compute processes on the device, largest first, 16 at most."""


class Histogram(msgspec.Struct, frozen=True, array_like=True):
    """Cumulative counts since the replica started, per bucket of LATENCY_BUCKETS_S plus one for the rest."""

    counts: list[int]
    sum_s: float


class SizeChange(msgspec.Struct, frozen=True, array_like=True):
    """A batch size from `time_s` (unix seconds) on, and why."""

    time_s: float
    batch_size: int
    reason: str


LATENCY_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0,
)  # fmt: skip


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine process says of itself several times a second."""

    replica: str
    model: str
    host: str
    pid: int
    state: ReplicaState
    time_s: float
    started_s: float
    detail: str = ""
    mode: BatchMode = "continuous"
    max_batch_size: int = 0
    slots: list[Slot] = []
    batch_tokens: int = 0
    """Context tokens held by the running batch."""
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    kv_block_size: int = 16
    steps: int = 0
    """Cumulative, as are the other counters below."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    finished: dict[str, int] = {}
    """By finish reason."""
    tokens_per_s: float = 0.0
    """Output tokens a second over the last second."""
    step_ms_p50: float = 0.0
    step_ms_p99: float = 0.0
    policy: str = ""
    policy_revision: int = 0
    """Revision under which this replica last claimed."""
    telemetry: Telemetry | None = None
    queue_time: Histogram | None = None
    time_to_first_token: Histogram | None = None
    time_per_output_token: Histogram | None = None
    end_to_end: Histogram | None = None
    overhead_percent: float = 0.0
    """Share of the busy loop's time outside the forward pass."""
    restarts: dict[str, int] = {}
    """How often this worker has started its engine process again, by reason: `failed`, `hung`, `lost`."""
    sizing: str = "fixed"
    """The strategy that sets `max_batch_size`, and its parameters."""
    sizing_params: dict[str, float] = {}
    size_changes: list[SizeChange] = []
    """The latest few, newest last."""
    trigger: str = ""
    """What started the latest collected batch (`size`, `wait`, `urgent`, `memory`), and in words."""
    trigger_reason: str = ""
    triggers: dict[str, int] = {}
    """How many batches each trigger started."""
    slot_preemptions: int = 0
    """Of all preemptions, those in which a higher request took the slot of a lower one."""
    prefix_tokens: int = 0
    """Tokens of admitted sequences whose keys and values were looked for in the cache, and those found there."""
    prefix_hit_tokens: int = 0
    kv_blocks_cached: int = 0
    """Blocks that nobody holds, kept for prompts that begin alike; they count as free."""
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    host_blocks_total: int = 0
    """Places in host memory for blocks of preempted sequences."""
    host_blocks_used: int = 0
    draft_tokens: int = 0
    """Guessed tokens that were verified, and of these the ones that were right."""
    accepted_tokens: int = 0
    settings: str = ""
    """Digest of the deployment's settings that it has taken up (`inference.plan.settings_digest`)."""
    backend: Backend = "builtin"


class SharedLevel(msgspec.Struct, frozen=True, array_like=True):
    """A model's level of backpressure as the web processes agree on it. Times are unix seconds."""

    level: int
    reason: str
    called_s: float
    """When a reading last called for it."""
    time_s: float
    """When it was written; after a while without, nobody holds it up."""


class RequestEvent(msgspec.Struct, frozen=True, kw_only=True, tag="request"):
    """A request's end, for the historian. Times are unix seconds; None where it never got there."""

    id: str
    model: str
    tenant: str
    priority: int
    endpoint: str
    state: State
    finish_reason: FinishReason
    error_code: str = ""
    arrival_s: float
    claimed_s: float | None = None
    first_token_s: float | None = None
    finished_s: float
    prompt_tokens: int
    completion_tokens: int
    max_tokens: int
    attempts: int = 1
    replica: str = ""
    policy: str = ""
    policy_revision: int = 0
    deadline_s: float | None = None
    user: str = ""
    traceparent: str = ""
    """W3C trace context of the web process's span; empty where nothing is traced."""
    marks: list[Mark] = []
    """In order, of the last attempt; MAX_MARKS at most."""
    bursts: list[tuple[int, int]] = []
    """(ms after the arrival, output tokens) of even spans of the answer that had any; MAX_BURSTS at most."""
    burst_ms: int = 0
    """Length of such a span."""


MAX_MARKS = 32
MAX_BURSTS = 16


def unserved_event(
    request: InferenceRequest, *, state: State, reason: FinishReason, now_s: float, error_code: str = ""
) -> RequestEvent:
    """The end of a request that no engine process ever took up."""
    return RequestEvent(
        id=request.id,
        model=request.model,
        tenant=request.tenant,
        priority=request.priority,
        endpoint=request.endpoint,
        state=state,
        finish_reason=reason,
        error_code=error_code,
        arrival_s=request.arrival_s,
        finished_s=now_s,
        prompt_tokens=request.num_prompt_tokens,
        completion_tokens=0,
        max_tokens=request.max_tokens,
        attempts=0,
        deadline_s=request.deadline_s,
        user=request.user,
        traceparent=request.traceparent,
    )


class BatchEvent(msgspec.Struct, frozen=True, kw_only=True, tag="batch"):
    """One second of one replica, for the historian."""

    replica: str
    model: str
    second_s: int
    steps: int
    batch_size_mean: float
    batch_size_max: int
    prompt_tokens: int
    output_tokens: int
    step_ms_mean: float
    step_ms_max: float
    kv_blocks_used: int
    kv_blocks_total: int
    preemptions: int
    mode: BatchMode
    policy: str
    policy_revision: int
    telemetry: Telemetry | None = None
    max_batch_size: int = 0
    sizing: str = ""
    size_changes: list[SizeChange] = []
    triggers: dict[str, int] = {}
    """How many batches each trigger started, and the latest one's reason."""
    trigger_reason: str = ""
    busy_ms: float = 0.0
    """Time of the turns that took a step: the steps, and all that lies between them."""
    prefill_tokens: int = 0
    """What the steps computed, as `scheduling.core.sizing.cost_model.StepFeatures` counts it; so the next three."""
    decode_sequences: int = 0
    context_tokens: int = 0
    attention_pairs: int = 0
    step_cost: list[float] = []
    """What a step costs as learned from single steps by then: the fields of `StepCost`; empty while too few ran."""
    prefix_tokens: int = 0
    prefix_hit_tokens: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


HistoryEvent = RequestEvent | BatchEvent

HISTORY_LENGTH = 1_000_000
"""Entries that the history stream keeps at most, about, while the database is away."""


class LatencyTarget(msgspec.Struct, frozen=True, array_like=True):
    """What an SLA promises a priority level of a tenant (empty: of every tenant that has none of its own), seconds."""

    tenant: str
    priority: int
    ttft_s: float | None = None
    e2e_s: float | None = None
    tpot_s: float | None = None


class DeploymentSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A model as operators want it served; published in Redis so that gpu workers need no database."""

    name: str
    path: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    mode: BatchMode = "continuous"
    max_batch_size: int = 16
    max_model_len: int = 0
    """0 takes the checkpoint's own."""
    step_tokens: int = 2048
    """Token budget of one engine step."""
    kv_memory_bytes: int = 0
    """0 sizes the cache from free memory."""
    created_s: int = 0
    speculation: Literal["off", "ngram", "model"] = "off"
    """Guess tokens from what the text repeats, or by a small model, and verify them in the step."""
    draft_path: str = ""
    """Directory of that small model's checkpoint; its vocabulary is this one's."""
    num_draft_tokens: int = 4
    """Tokens guessed ahead at most, per request and step."""
    sizing: str = "fixed"
    """Strategy that sets the batch size, see scheduling/core/sizing; `max_batch_size` is where it starts."""
    sizing_params: dict[str, float] = {}
    triggers: dict[str, Any] = {}
    """When `dynamic` and `static` batches start, see `parse_trigger`; empty: the mode's own way."""
    prefix_cache: PrefixCache = "on"
    """Whether prompts that begin alike share KV blocks: among all, within a tenant, or not at all."""
    long_prefill_threshold: int = 512
    """Most tokens of one prompt in a step while others decode; 0: as many as the step has room for."""
    targets: list[LatencyTarget] = []
    """SLAs, for sizing strategies."""
    quantization: Literal["none", "int8"] = "none"
    """Whether weights are kept in int8; rounding changes what a model says (the replica's description: by how much)."""
    backend: Backend = "builtin"
    upstream_url: str = ""
    """Base address of an OpenAI-compatible server (`http://host:port/v1`); for the backend `openai`, as the rest."""
    upstream_model: str = ""
    """The model's name there; empty: `name`."""
    upstream_key: str = ""
    """Name of the environment variable, on the gpu worker's machine, that holds the server's API key; empty: none."""
    upstream_first_token_s: float = 120.0
    """How long the server may take to its first token before it counts as hung."""
    upstream_gap_s: float = 30.0
    """The same between two tokens."""

    @property
    def is_upstream(self) -> bool:
        """Whether another server computes."""
        return self.backend == "openai"
