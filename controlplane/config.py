"""Every setting, typed and validated at start. Nothing else in the project reads the environment."""

import os
import re
import sys
from functools import cached_property
from pathlib import Path
from socket import gethostname
from typing import Literal

from pydantic import Field, IPvAnyNetwork, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

ROOT = Path(__file__).resolve().parent.parent


class Config(BaseSettings):
    """Settings from the environment. The README's table is made from the descriptions below."""

    model_config = SettingsConfigDict(env_prefix="PENSTOCK_", frozen=True, extra="forbid")

    database_url: str = Field(
        "",
        alias="DATABASE_URL",
        description="PostgreSQL, as `postgres://user:password@host/name`; empty: SQLite under `var/`.",
    )
    redis_url: str = Field(
        "", alias="REDIS_URL", description="Redis or Valkey, 6.2 or later; empty: the embedded server."
    )
    var: Path = Field(ROOT / "var", description="Where data, sockets, the demo model and generated secrets live.")
    secret_key: str = Field("", description="Django's secret key; empty: generated once under `var/`.")
    debug: bool = Field(False, description="Django's debug pages. Never on a reachable host.")
    allowed_hosts: list[str] = Field(
        ["127.0.0.1", "localhost", "[::1]"], description="Host names the web process answers to (JSON list)."
    )
    trusted_origins: list[str] = Field(
        [],
        description="Origins that a proxy in front gives the dashboard, such as `https://penstock.example.org` (JSON list).",
    )
    proxies: list[str] = Field(
        ["127.0.0.1", "::1"],
        description="Addresses or networks of proxies in front, whose `X-Forwarded-For` and `X-Forwarded-Proto` are believed "
        "(JSON list). They must set both themselves.",
    )
    host: str = Field("127.0.0.1", description="Address the web process binds.")
    port: int = Field(8000, ge=1, le=65535, description="Port the web process binds.")
    web_processes: int = Field(1, ge=1, le=64, description="Web processes that `make up` starts.")
    gpu_workers: int = Field(
        1, ge=0, le=64, description="GPU workers that `make up` starts; several go to the visible GPUs in turn."
    )
    model: str = Field(
        "",
        description="Model that gpu workers serve, or several with commas between, a worker for each; "
        "empty: the newest deployment.",
    )
    upstream: str = Field(
        "",
        pattern=r"^([A-Za-z0-9][A-Za-z0-9._/-]{0,127}=([^@\s]{1,256}@)?https?://\S{1,400})?$",
        description="An OpenAI-compatible server to offer as a model, `NAME=URL` or `NAME=ITS_MODEL@URL`, such as "
        "`llama=llama3.2:3b@http://127.0.0.1:11434/v1`; takes the place of the demo model (docs/upstream.md).",
    )
    replica: str = Field(
        "gpu-0", pattern=r"^[a-zA-Z0-9_-]{1,64}$", description="Name of a gpu worker; each needs its own."
    )
    machine: str = Field(
        "",
        pattern=r"^[a-zA-Z0-9._-]{0,128}$",
        description="Name of this machine on the Fleet page, where replicas are placed; empty: its host name, "
        "or under an orchestrator `PENSTOCK_REPLICA`.",
    )
    orchestrated: bool = Field(
        False,
        description="An orchestrator (Kubernetes, compose) decides how many gpu workers run: none are added or removed here.",
    )
    cuda_devices: str = Field(
        "",
        alias="CUDA_VISIBLE_DEVICES",
        description="GPUs of this machine that replicas may be placed on, as CUDA has it; empty: all.",
    )
    drain_s: float = Field(
        5.0,
        ge=0,
        le=3600,
        description="How long a gpu worker that is told to stop finishes what it runs; the rest goes back to the queue.",
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="Device of a gpu worker: `auto`, `cpu`, `cuda`, `cuda:N`.",
    )
    gpu: str = Field(
        "",
        pattern=r"^(\d{1,3}|(GPU|MIG)-[0-9A-Za-z/-]{1,128})?$",
        description="GPU whose telemetry a gpu worker shows, by NVML's number or UUID (`GPU-...`, `MIG-...`); "
        "empty: that of its CUDA device.",
    )
    step_timeout_s: float = Field(
        120.0,
        ge=1,
        le=86400,
        description="An engine process that ends no step for this long is killed and started again; its requests go on.",
    )
    load_timeout_s: float = Field(
        1800.0, ge=10, le=86400, description="The same for an engine process that loads its model."
    )
    key_prefix: str = Field("penstock", pattern=r"^[a-z0-9_-]{1,32}$", description="Prefix of all Redis keys.")
    queue_limit: int = Field(20_000, ge=1, description="Waiting requests per model before new ones are refused.")
    queue_tokens: int = Field(
        0,
        ge=0,
        description="Waiting tokens (prompt and `max_tokens`) per model before new ones are refused; 0: no bound.",
    )
    no_replica_s: float = Field(
        30.0,
        ge=0,
        le=86_400,
        description="Requests of a model that no worker has served for this long are refused; 0: they wait.",
    )
    idempotency_keep_s: int = Field(
        600,
        ge=60,
        le=86_400,
        description="How long the answer of a request with an `Idempotency-Key` stays after its end.",
    )
    lease_s: float = Field(
        5.0, ge=0.5, le=120, description="A worker silent for this long loses its requests to others."
    )
    max_body_bytes: int = Field(2 * 2**20, ge=1024, description="Largest request body.")
    files: Path | None = Field(
        None,
        description="Folder of the files that tenants upload, shared by web and ops; empty: `files` under `PENSTOCK_VAR`.",
    )
    max_file_bytes: int = Field(32 * 2**20, ge=1024, description="Largest file that a tenant may upload.")
    history_days: int = Field(30, ge=1, le=3650, description="How long request and batch records are kept.")
    minutes_days: int = Field(30, ge=1, le=3650, description="How long history summed up by minutes is kept.")
    hours_days: int = Field(730, ge=1, le=36500, description="How long history summed up by hours is kept.")
    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="Log level.")
    log_format: Literal["line", "json"] = Field(
        "line", description="`json`: an object a line, for log collectors, with the request's id."
    )
    traces: str = Field(
        "",
        pattern=r"^(https?://.+|/.+)?$",
        description="Where OpenTelemetry traces go: an OTLP/HTTP endpoint such as `http://collector:4318/v1/traces`, or a file; "
        "empty: nowhere. Needs `deploy/requirements-traces.txt`.",
    )
    metrics_tenants: int = Field(
        50, ge=0, le=1000, description="Tenants that `/metrics` names; the others are summed up as `other`."
    )

    webhook_networks: list[IPvAnyNetwork] = Field(
        [],
        description="Networks beside the public ones that webhooks of alerts may connect to, such as `10.0.0.0/8` (JSON list).",
    )
    email_host: str = Field("", description="SMTP server for alerts by e-mail; empty: no e-mail.")
    email_port: int = Field(587, ge=1, le=65535, description="Its port.")
    email_user: str = Field("", description="User name there; empty: none is given.")
    email_password: str = Field("", description="Password there.")
    email_security: Literal["starttls", "tls", "none"] = Field(
        "starttls", description="`starttls`, `tls` from the first byte (port 465), or `none`."
    )
    email_from: str = Field("penstock@localhost", description="Sender of e-mails.")

    @cached_property
    def models(self) -> list[str]:
        """Names in `model`; [""] for the newest deployment."""
        return [name.strip() for name in self.model.split(",")]

    @property
    def upstream_parts(self) -> tuple[str, str, str]:
        """The name that clients use, the model's name on the server (empty: the same), and the server's address."""
        name, _, rest = self.upstream.partition("=")
        model, has_model, url = rest.partition("@http")
        return (name, model, f"http{url}") if has_model else (name, "", rest)

    @property
    def num_gpu_processes(self) -> int:
        """GPU workers to start: at least one for each model."""
        return max(self.gpu_workers, len(self.models)) if self.gpu_workers else 0

    @cached_property
    def machine_name(self) -> str:
        """What this machine is called where replicas are placed."""
        return self.machine or (self.replica if self.orchestrated else re.sub(r"[^a-zA-Z0-9._-]", "-", gethostname()))

    @cached_property
    def files_folder(self) -> Path:
        """Where tenants' files lie."""
        return self.files or self.var / "files"

    @cached_property
    def redis(self) -> str:
        """URL of the Redis in use."""
        return self.redis_url or f"unix://{self.redis_socket}"

    @cached_property
    def redis_socket(self) -> Path:
        """Socket of the embedded server; in a short path, since a socket's name holds 107 bytes at most."""
        return self.var.resolve() / "run" / "redis.sock"


def load_config() -> Config:
    """Read the environment; end the process with a sentence where a setting is unknown or malformed."""
    known = {f"PENSTOCK_{name.upper()}" for name, field in Config.model_fields.items() if not field.alias}
    unknown = sorted(name for name in os.environ if name.startswith("PENSTOCK_") and name not in known)
    if unknown:
        sys.exit(f"Unknown setting {unknown[0]}. The settings are listed in README.md, section Settings.")
    try:
        return Config()
    except SettingsError as error:  # a list that is no JSON
        field = re.search(r'field "(\w+)"', str(error))
        name = _variable(field.group(1)) if field else "A list"
        sys.exit(f'{name} must be a JSON list, such as ["example.org"]. See README.md, section Settings.')
    except ValidationError as error:
        problems = "; ".join(f"{_variable(str(e['loc'][0]))}: {e['msg']}" for e in error.errors())
        sys.exit(f"A setting cannot be used: {problems}. See README.md, section Settings.")


def _variable(name: str) -> str:
    """The environment variable of a field or an alias."""
    return name if name.isupper() else f"PENSTOCK_{name.upper()}"
