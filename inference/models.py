"""What is deployed, what serves it, and what happened: deployments, replicas, and history written in bulk."""

from pathlib import Path

from django.core.exceptions import ValidationError
from django.core.validators import MaxValueValidator, MinValueValidator, RegexValidator
from django.db import models
from django.db.models import Q

from inference.checkpoint import CheckpointError, check_draft
from inference.messages import DeploymentSpec
from inference.upstream.address import AddressError, check_address, check_key_name
from inference.wanted import WantedReplica as WantedReplica
from scheduling.core.sizing.strategies import SizingError, build_sizing
from scheduling.core.triggers import TriggerError, parse_trigger
from scheduling.models import PriorityLevel

MODEL_NAME = RegexValidator(
    r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$",
    "A model's name has up to 128 letters, digits, and the characters . _ / -, and begins with a letter or digit.",
)


class ModelDeployment(models.Model):
    """A model and how it should be served: a checkpoint by the builtin engine, or what another server serves."""

    class Backend(models.TextChoices):
        """What computes."""

        BUILTIN = "builtin", "an engine of Penstock"
        OPENAI = "openai", "another server that speaks OpenAI's dialect"

    class Dtype(models.TextChoices):
        """Arithmetic of the weights; `auto` takes what the device does best."""

        AUTO = "auto"
        FLOAT32 = "float32"
        BFLOAT16 = "bfloat16"
        FLOAT16 = "float16"

    class Quantization(models.TextChoices):
        """How weights are rounded."""

        NONE = "none"
        INT8 = "int8"

    class Mode(models.TextChoices):
        """How batches form."""

        SERIAL = "serial"
        STATIC = "static"
        DYNAMIC = "dynamic"
        CONTINUOUS = "continuous"

    class Sizing(models.TextChoices):
        """Who sets the batch size, see scheduling/core/sizing."""

        FIXED = "fixed"
        THROUGHPUT_FIRST = "throughput_first"
        LATENCY_FIRST = "latency_first"
        BALANCED = "balanced"
        MEMORY_EFFICIENT = "memory_efficient"
        GRADIENT = "gradient"
        ADAPTIVE = "adaptive"

    class PrefixCache(models.TextChoices):
        """Among whom KV blocks of equal beginnings are shared."""

        ON = "on", "among all"
        PER_TENANT = "per_tenant", "within a tenant"
        OFF = "off"

    class Speculation(models.TextChoices):
        """How tokens are guessed ahead."""

        OFF = "off"
        NGRAM = "ngram", "from what the text repeats"
        MODEL = "model", "by a small draft model"

    name = models.CharField(
        max_length=128, unique=True, validators=[MODEL_NAME], help_text="What clients put into `model`."
    )
    backend = models.CharField(max_length=16, choices=Backend.choices, default=Backend.BUILTIN)
    path = models.CharField(
        max_length=1024, blank=True,
        help_text="Directory of the checkpoint, at the same path for gpu workers, web and ops. Of an upstream server's "
        "model the tokenizer at most is read, to count prompts exactly; empty: their length is guessed until the "
        "server says.",
    )  # fmt: skip
    upstream_url = models.CharField(
        "upstream address",
        max_length=500,
        blank=True,
        help_text="The other server's, such as http://127.0.0.1:8000/v1.",
    )
    upstream_model = models.CharField(
        max_length=256, blank=True, help_text="The model's name there; empty: the same as here."
    )
    upstream_key = models.CharField(
        "variable of the upstream's key", max_length=80, blank=True,
        help_text="Environment variable of the gpu worker that holds the server's API key, such as VLLM_API_KEY. The "
        "key itself is kept nowhere.",
    )  # fmt: skip
    upstream_first_token_s = models.FloatField(
        "first token within (s)", default=120.0, validators=[MinValueValidator(0.1), MaxValueValidator(3600)],
        help_text="An upstream that takes longer counts as hung; the request goes back to the queue.",
    )  # fmt: skip
    upstream_gap_s = models.FloatField(
        "next token within (s)", default=30.0, validators=[MinValueValidator(0.1), MaxValueValidator(3600)],
        help_text="The same between two tokens.",
    )  # fmt: skip
    dtype = models.CharField(max_length=16, choices=Dtype.choices, default=Dtype.AUTO)
    quantization = models.CharField(
        max_length=16, choices=Quantization.choices, default=Quantization.NONE,
        help_text="int8 takes a quarter of float32's memory and changes what the model says a little.",
    )  # fmt: skip
    mode = models.CharField(max_length=16, choices=Mode.choices, default=Mode.CONTINUOUS)
    max_batch_size = models.PositiveIntegerField(
        default=16,
        validators=[
            MinValueValidator(1, "A batch holds at least 1."),
            MaxValueValidator(4096, "A batch holds at most 4096."),
        ],
    )
    max_model_len = models.PositiveIntegerField(
        "context length", default=0, help_text="Prompt and completion tokens; 0 takes the checkpoint's own."
    )
    step_tokens = models.PositiveIntegerField(
        default=2048, validators=[MinValueValidator(1, "A step computes at least 1 token.")],
        help_text="Most tokens that one engine step computes.",
    )  # fmt: skip
    kv_memory_bytes = models.PositiveBigIntegerField(
        "KV cache (bytes)", default=0, help_text="0 sizes the cache from free memory."
    )
    sizing = models.CharField(
        max_length=32, choices=Sizing.choices, default=Sizing.FIXED, help_text="Strategy that sets the batch size."
    )
    sizing_params = models.JSONField(
        "sizing parameters", default=dict, blank=True, help_text="Those that differ from the strategy's defaults."
    )
    triggers = models.JSONField(
        default=dict, blank=True,
        help_text='When dynamic and static batches start: {"any": [{"urgent": 1}, {"size": 8}, {"wait_s": 0.05}]}; '
        "empty: dynamic ones when full or after 50 ms, static ones at once.",
    )  # fmt: skip
    prefix_cache = models.CharField(
        max_length=16, choices=PrefixCache.choices, default=PrefixCache.ON,
        help_text="Whether prompts that begin alike share KV blocks; within a tenant, none can time another's prompts.",
    )  # fmt: skip
    long_prefill_threshold = models.PositiveIntegerField(
        default=512, help_text="Most tokens of one prompt in a step while others run; 0 sets no limit."
    )
    speculation = models.CharField(
        max_length=16, choices=Speculation.choices, default=Speculation.OFF,
        help_text="Guess tokens, verify them in the step, and stop where that does not pay; answers stay the same.",
    )  # fmt: skip
    draft_path = models.CharField(
        "draft model", max_length=1024, blank=True,
        help_text="Directory of the small checkpoint that guesses; it has the same vocabulary.",
    )  # fmt: skip
    num_draft_tokens = models.PositiveSmallIntegerField(
        "draft tokens", default=4, validators=[MinValueValidator(1), MaxValueValidator(64)],
        help_text="Most tokens guessed ahead, per request and step.",
    )  # fmt: skip
    enabled = models.BooleanField(default=True, help_text="A disabled model is not offered to clients.")
    architecture = models.CharField(max_length=128, blank=True, editable=False)
    num_parameters = models.PositiveBigIntegerField("parameters", null=True, blank=True, editable=False)
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        verbose_name = "deployment"
        ordering = ["name"]
        constraints = [
            models.CheckConstraint(
                condition=Q(max_batch_size__gte=1),
                name="inference_deployment_batch_positive",
                violation_error_message="The batch size is at least 1.",
            ),
            models.CheckConstraint(
                condition=Q(step_tokens__gte=1),
                name="inference_deployment_step_positive",
                violation_error_message="The token budget of a step is at least 1.",
            ),
        ]

    def __str__(self) -> str:
        return self.name

    @property
    def is_upstream(self) -> bool:
        """Whether another server computes."""
        return self.backend == self.Backend.OPENAI

    def clean(self) -> None:
        """Backend, sizing, triggers and draft model must be ones that a worker can use. Raises ValidationError."""
        self._clean_backend()
        self._check_draft()
        if not isinstance(self.sizing_params, dict):
            raise ValidationError({"sizing_params": 'An object with numbers is needed, such as {"largest": 64}.'})
        try:
            build_sizing(self.sizing, self.sizing_params)
        except SizingError as error:
            raise ValidationError({"sizing_params": str(error)}) from error
        try:
            parse_trigger(self.triggers)
        except TriggerError as error:
            raise ValidationError({"triggers": str(error)}) from error

    def _check_draft(self) -> None:
        if self.speculation != self.Speculation.MODEL:
            return
        if not self.draft_path:
            raise ValidationError({"draft_path": "Speculation by a draft model needs that model's directory."})
        try:
            check_draft(Path(self.draft_path), Path(self.path))
        except CheckpointError as error:
            raise ValidationError({"draft_path": str(error)}) from error

    def _clean_backend(self) -> None:
        if not self.is_upstream:
            if not self.path:
                raise ValidationError({"path": "The builtin engine needs the directory of a checkpoint."})
            if self.upstream_url:
                raise ValidationError({"upstream_url": "The builtin engine has no upstream; choose the other backend."})
            return
        for field, check in (("upstream_url", check_address), ("upstream_key", check_key_name)):
            try:
                setattr(self, field, check(getattr(self, field)))
            except AddressError as error:
                raise ValidationError({field: str(error)}) from error
        if self.path and not (Path(self.path) / "tokenizer.json").is_file():
            raise ValidationError({"path": f"{self.path} has no tokenizer.json; leave it empty to guess lengths."})
        if self.mode != self.Mode.CONTINUOUS:
            raise ValidationError({"mode": "An upstream server forms its batches itself: continuous is what it does."})
        if not self.upstream_model.isprintable():
            raise ValidationError({"upstream_model": "A model's name has no control characters."})

    def to_spec(self) -> DeploymentSpec:
        """The deployment as the gpu workers read it."""
        return DeploymentSpec(
            name=self.name,
            path=self.path,
            dtype=self.dtype,  # type: ignore[arg-type]  # the choices are the literal's
            quantization=self.quantization,  # type: ignore[arg-type]
            mode=self.mode,  # type: ignore[arg-type]
            max_batch_size=self.max_batch_size,
            max_model_len=self.max_model_len,
            step_tokens=self.step_tokens,
            kv_memory_bytes=self.kv_memory_bytes,
            created_s=int(self.created_at.timestamp()),
            sizing=self.sizing,
            sizing_params=self.sizing_params,
            triggers=self.triggers,
            prefix_cache=self.prefix_cache,  # type: ignore[arg-type]
            long_prefill_threshold=self.long_prefill_threshold,
            speculation=self.speculation,  # type: ignore[arg-type]
            num_draft_tokens=self.num_draft_tokens,
            draft_path=self.draft_path,
            backend=self.backend,  # type: ignore[arg-type]
            upstream_url=self.upstream_url,
            upstream_model=self.upstream_model,
            upstream_key=self.upstream_key,
            upstream_first_token_s=self.upstream_first_token_s,
            upstream_gap_s=self.upstream_gap_s,
        )


class Replica(models.Model):
    """A gpu worker that was heard of; what it does right now stands in Redis."""

    name = models.CharField(max_length=128, unique=True)
    model = models.CharField(max_length=128, blank=True)
    host = models.CharField(max_length=255, blank=True)
    device = models.CharField(max_length=255, blank=True)
    state = models.CharField(max_length=16, blank=True)
    detail = models.TextField(blank=True)
    first_seen_at = models.DateTimeField(auto_now_add=True)
    started_at = models.DateTimeField(null=True, blank=True)
    last_seen_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ["name"]
        permissions = [("control_replica", "Can pause, resume, drain and tune replicas")]

    def __str__(self) -> str:
        return self.name


class RequestRecord(models.Model):
    """A request that ended. Names instead of foreign keys: history outlives tenants and models."""

    request_id = models.CharField(max_length=64, unique=True)
    model = models.CharField(max_length=128)
    tenant = models.CharField(max_length=63)
    priority = models.PositiveSmallIntegerField(choices=PriorityLevel.choices)
    endpoint = models.CharField(max_length=32)
    state = models.CharField(max_length=16)
    finish_reason = models.CharField(max_length=16)
    error_code = models.CharField(max_length=64, blank=True)
    arrived_at = models.DateTimeField()
    claimed_at = models.DateTimeField(null=True)
    first_token_at = models.DateTimeField(null=True)
    finished_at = models.DateTimeField()
    deadline_at = models.DateTimeField(null=True)
    prompt_tokens = models.PositiveIntegerField()
    completion_tokens = models.PositiveIntegerField()
    max_tokens = models.PositiveIntegerField()
    attempts = models.PositiveIntegerField(default=1)
    replica = models.CharField(max_length=128, blank=True)
    policy = models.CharField(max_length=63, blank=True)
    policy_revision = models.PositiveIntegerField(default=0)
    user = models.CharField(max_length=128, blank=True)
    timeline = models.JSONField(
        default=dict,
        blank=True,
        help_text="What its worker noted, in ms after the arrival: `marks` [ms, kind, number], `tokens` [ms, number].",
    )

    class Meta:
        verbose_name = "request"
        ordering = ["-finished_at", "-id"]
        indexes = [
            models.Index(fields=["finished_at"], name="inference_request_finished"),
            models.Index(fields=["tenant", "finished_at"], name="inference_request_tenant"),
            models.Index(fields=["model", "finished_at"], name="inference_request_model"),
            models.Index(fields=["state", "finished_at"], name="inference_request_state"),
            models.Index(fields=["priority", "finished_at"], name="inference_request_priority"),
        ]

    def __str__(self) -> str:
        return self.request_id

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, from arrival; None where there was none."""
        return (self.first_token_at - self.arrived_at).total_seconds() if self.first_token_at else None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None with fewer than two."""
        if self.first_token_at is None or self.completion_tokens < 2:
            return None
        return (self.finished_at - self.first_token_at).total_seconds() / (self.completion_tokens - 1)

    @property
    def e2e_s(self) -> float:
        """From arrival to the end."""
        return (self.finished_at - self.arrived_at).total_seconds()


class BatchRecord(models.Model):
    """One second of one replica."""

    replica = models.CharField(max_length=128)
    model = models.CharField(max_length=128)
    second = models.DateTimeField()
    steps = models.PositiveIntegerField()
    batch_size_mean = models.FloatField()
    batch_size_max = models.PositiveIntegerField()
    prompt_tokens = models.PositiveIntegerField()
    output_tokens = models.PositiveIntegerField()
    step_ms_mean = models.FloatField()
    step_ms_max = models.FloatField()
    kv_blocks_used = models.PositiveIntegerField()
    kv_blocks_total = models.PositiveIntegerField()
    preemptions = models.PositiveIntegerField()
    mode = models.CharField(max_length=16)
    policy = models.CharField(max_length=63, blank=True)
    policy_revision = models.PositiveIntegerField(default=0)
    telemetry_source = models.CharField(max_length=16, blank=True)
    device = models.CharField(max_length=255, blank=True)
    utilization_percent = models.FloatField(null=True)
    memory_used_bytes = models.PositiveBigIntegerField(null=True)
    memory_total_bytes = models.PositiveBigIntegerField(null=True)
    temperature_c = models.FloatField(null=True)
    power_w = models.FloatField(null=True)
    throttle_reasons = models.JSONField(default=list)
    power_limit_w = models.FloatField(null=True)
    sm_clock_mhz = models.FloatField(null=True)
    memory_clock_mhz = models.FloatField(null=True)
    ecc_uncorrected = models.PositiveBigIntegerField(null=True)
    process_memory_bytes = models.PositiveBigIntegerField(null=True)
    max_batch_size = models.PositiveIntegerField(default=0)
    sizing = models.CharField(max_length=32, blank=True)
    size_changes = models.JSONField(default=list, help_text="[unix seconds, batch size, reason] of each change.")
    triggers = models.JSONField(default=dict, help_text="Batches that each trigger started.")
    trigger_reason = models.CharField(max_length=200, blank=True)
    prefix_tokens = models.PositiveIntegerField(default=0)
    prefix_hit_tokens = models.PositiveIntegerField(default=0)
    swapped_out_blocks = models.PositiveIntegerField(default=0)
    swapped_in_blocks = models.PositiveIntegerField(default=0)
    draft_tokens = models.PositiveIntegerField(default=0, help_text="Guessed tokens that were verified.")
    accepted_tokens = models.PositiveIntegerField(default=0, help_text="Of these the ones that were right.")
    busy_ms = models.FloatField(default=0.0, help_text="Steps and all that lay between them; 0: not recorded.")
    prefill_tokens = models.PositiveBigIntegerField(default=0)
    decode_sequences = models.PositiveBigIntegerField(default=0)
    context_tokens = models.PositiveBigIntegerField(default=0)
    attention_pairs = models.PositiveBigIntegerField(default=0)
    step_cost = models.JSONField(default=list, help_text="Seconds by the fields of StepCost, as learned by then.")

    class Meta:
        verbose_name = "second of a replica"
        verbose_name_plural = "batches"
        ordering = ["-second", "replica"]
        indexes = [
            models.Index(fields=["second"], name="inference_batch_second"),
            models.Index(fields=["model", "second"], name="inference_batch_model"),
        ]
        constraints = [models.UniqueConstraint(fields=["replica", "second"], name="inference_batch_replica_second")]

    def __str__(self) -> str:
        return f"{self.replica} at {self.second:%Y-%m-%d %H:%M:%S}"


class HistoryCheckpoint(models.Model):
    """How far the historian has read a history stream. It moves in the transaction that inserts what was read."""

    stream = models.CharField(max_length=200, primary_key=True)
    last_id = models.CharField(max_length=64, default="0-0")
    num_events = models.BigIntegerField("events written", default=0)
    num_malformed = models.BigIntegerField("entries skipped", default=0)
    updated_at = models.DateTimeField(auto_now=True)

    def __str__(self) -> str:
        return f"{self.stream} up to {self.last_id}"
