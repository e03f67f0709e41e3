"""What the native API answers, as pydantic schemas; the API's documentation is made from these."""

from typing import Any, Literal

from ninja import Field, Schema

from inference.messages import BatchMode

STORABLE = r"^[^\x00]*$"
"""Texts that PostgreSQL takes: without NUL."""


class Usage(Schema):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Problem(Schema):
    """Why a request ended without an answer."""

    code: str
    message: str


class RequestView(Schema):
    """A request as it stands now."""

    id: str
    model: str
    state: str = Field(description="queued, running, finished, cancelled or failed")
    priority: str
    arrival_s: float = Field(description="Unix time of arrival.")
    attempt: int = Field(description="How often a worker has taken it up.")
    queue_position: int | None = Field(
        default=None, description="Requests that go before it, about; null once it runs."
    )
    estimated_wait_s: float | None = Field(
        default=None, description="Until it runs; null before anything was seen to drain the queue."
    )
    output: str = Field("", description="The text so far.")
    finish_reason: str | None = None
    usage: Usage | None = None
    error: Problem | None = None


class CancelView(Schema):
    """Where the request was when it was cancelled."""

    id: str
    was: str = Field(description="queued, running, or gone: it had ended")


class QueueView(Schema):
    """A model's queue now."""

    model: str
    depth: int
    waiting_tokens: int
    running: int
    by_priority: dict[str, int]
    by_tenant: dict[str, int] = Field(description="A tenant's key sees its own share, operators see all.")
    oldest_wait_s: float | None
    estimated_wait_s: float | None
    backpressure: str
    backpressure_reason: str
    replicas: int = Field(description="Engine processes that report.")
    refused_because: str = Field(description="Why all requests of this model are refused, where they are.")
    policy: str
    policy_params: dict[str, float | str]
    policy_revision: int


class SlotView(Schema):
    """A request that runs."""

    request_id: str
    tenant: str
    priority: int
    prompt_tokens: int
    output_tokens: int
    max_tokens: int


class TelemetryView(Schema):
    """What the device says; null where it does not."""

    source: str = Field(description="nvml: a GPU; host: the machine.")
    device: str
    uuid: str
    mig: str
    utilization_percent: float | None
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    process_memory_bytes: int | None = Field(description="Of it, this engine process's own.")
    temperature_c: float | None
    power_w: float | None
    power_limit_w: float | None
    sm_clock_mhz: float | None
    memory_clock_mhz: float | None
    throttle_reasons: list[str]
    ecc_corrected: int | None
    ecc_uncorrected: int | None
    time_s: float = Field(description="Unix time of the reading.")
    stale_s: float = Field(description="Age of a reading whose successor is overdue.")
    lost: bool
    detail: str


class SizeChangeView(Schema):
    """A batch size, from when on, and why."""

    time_s: float
    batch_size: int
    reason: str


class ReplicaView(Schema):
    """An engine process now."""

    replica: str
    model: str
    state: str
    detail: str
    mode: str
    batch_size: int
    max_batch_size: int
    kv_usage: float
    tokens_per_s: float
    step_ms_p50: float
    step_ms_p99: float
    policy: str
    policy_revision: int
    heard_s_ago: float
    started_s: float = Field(description="Unix time.")
    slots: list[SlotView] = Field(description="What runs. A tenant's key sees its own requests, operators see all.")
    telemetry: TelemetryView | None = Field(description="Null before the first reading, and for a tenant's key.")
    sizing: str = Field(description="The strategy that sets `max_batch_size`.")
    sizing_params: dict[str, float]
    size_changes: list[SizeChangeView] = Field(description="The latest few, newest last.")
    triggers: dict[str, int] = Field(description="Batches that were started, by what started them.")
    preemptions: int = Field(description="Since it started.")
    restarts: dict[str, int] = Field(description="Of its engine process, by reason: failed, hung, lost.")


class ParameterView(Schema):
    """A parameter: a number within bounds, or one of `choices`."""

    type: Literal["number", "choice"]
    default: float | str
    minimum: float
    maximum: float
    description: str
    choices: list[str] = []


class PolicyKindView(Schema):
    """A policy that a queue can be switched to."""

    name: str
    description: str
    guarantee: str
    source: str
    parameters: dict[str, ParameterView]


class SizingKindView(Schema):
    """A strategy that sets a replica's batch size."""

    name: str
    description: str
    parameters: dict[str, ParameterView]


class ActivePolicyView(Schema):
    """The policy a queue follows."""

    model: str
    name: str
    params: dict[str, float | str]
    revision: int


class PoliciesView(Schema):
    """What there is, and what is in force."""

    kinds: list[PolicyKindView]
    active: list[ActivePolicyView]


class SwitchBody(Schema, extra="forbid"):
    """A switch of policy."""

    name: str = Field(max_length=64)
    params: dict[str, float | str] = {}
    reason: str = Field(min_length=1, max_length=500, pattern=STORABLE, description="Why; kept with the revision.")


class RevisionView(Schema):
    """A policy revision and who has taken it up."""

    model: str
    revision: int
    name: str
    params: dict[str, Any]
    state: str
    num_moved: int
    seconds: float | None
    acknowledgements: dict[str, Any]


class ControlBody(Schema, extra="forbid"):
    """A command to a replica; the other fields belong to the commands that set them."""

    command: Literal["pause", "resume", "drain", "set_mode", "set_batch_size", "sizing"]
    mode: BatchMode | None = None
    max_batch_size: int | None = Field(default=None, ge=1, le=4096, strict=True, description="Requests in a batch.")
    sizing: str | None = Field(default=None, max_length=64, description="The strategy that sets the batch size.")
    params: dict[str, float] | None = Field(default=None, description="Those of the strategy that differ.")
    reason: str = Field(min_length=1, max_length=500, pattern=STORABLE, description="Why; kept in the audit trail.")


class AckView(Schema):
    """A replica's word that it has obeyed."""

    replica: str
    command: str
    state: str
    applied_ms: float = Field(description="From reading the command to having obeyed it.")
