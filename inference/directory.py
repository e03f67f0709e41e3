"""Tenants, keys and deployments in memory: what a web process needs to admit a request without asking the database."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import msgspec
import redis
import redis.asyncio
from channels.db import database_sync_to_async
from django.db import Error as DatabaseError
from django.db import connections
from redis.exceptions import RedisError

from inference.messages import DeploymentSpec, LatencyTarget
from inference.models import ModelDeployment
from scheduling.core.request import Priority
from scheduling.credentials import digest_key
from scheduling.keys import Keys
from scheduling.models import ApiKey, ConfigVersion, ServiceLevel, Tenant

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantConfig:
    """A tenant and its quota; None is no limit. `max_priority` is the lowest number it may ask for."""

    name: str
    weight: float = 1.0
    suspended: bool = False
    rpm: int | None = None
    tpm: int | None = None
    concurrency: int | None = None
    max_priority: int = Priority.HIGH
    tpd: int | None = None
    deadlines_s: Mapping[int, float] = field(default_factory=dict)
    """Priority -> end-to-end target in seconds, the tenant's own or everybody's: the deadline where none is named."""
    drop_expired: bool = False
    """Whether a request that waits past its deadline is dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyConfig:
    """A key that is let in. `max_priority` already includes the tenant's ceiling."""

    prefix: str
    digest: str
    tenant: str
    max_priority: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Directory:
    """One consistent reading of the configuration."""

    version: int = 0
    """-1 stands for one that was never read."""
    keys: Mapping[str, KeyConfig] = field(default_factory=dict)
    """By digest; revoked keys are absent."""
    tenants: Mapping[str, TenantConfig] = field(default_factory=dict)
    """By name, suspended ones included, so that they can be told so."""
    deployments: Mapping[str, DeploymentSpec] = field(default_factory=dict)

    @property
    def is_read(self) -> bool:
        """Whether this is what the database said, rather than nothing at all."""
        return self.version >= 0

    def find_key(self, plaintext: str) -> KeyConfig | None:
        """The key that a client presented, or None where it is unknown or revoked."""
        return self.keys.get(digest_key(plaintext))


def load_directory() -> Directory:
    """Read the database.

    The version is read first and without a transaction: what is changed meanwhile carries a later version, so the next
    look at the version reads all of it again.
    """
    version = _version()
    targets = _read_targets()
    tenants = {t.name: _tenant_config(t, targets) for t in Tenant.objects.select_related("quota")}
    found = ApiKey.objects.filter(revoked_at=None).values_list("prefix", "digest", "tenant__name", "max_priority")
    keys = {
        digest: KeyConfig(
            prefix=prefix, digest=digest, tenant=name, max_priority=max(own or 0, tenants[name].max_priority)
        )
        for prefix, digest, name, own in found
        if name in tenants
    }
    promised = _read_promises()
    deployments = {
        d.name: msgspec.structs.replace(d.to_spec(), targets=promised)
        for d in ModelDeployment.objects.filter(enabled=True)
    }
    return Directory(version=version, keys=keys, tenants=tenants, deployments=deployments)


def _read_promises() -> list[LatencyTarget]:
    """All SLAs, for the engines' sizing strategies."""
    rows = ServiceLevel.objects.order_by("tenant__name", "priority")
    return [
        LatencyTarget(name or "", priority, *(ms and ms / 1000 for ms in promised))
        for name, priority, *promised in rows.values_list("tenant__name", "priority", "ttft_ms", "e2e_ms", "tpot_ms")
    ]


def _read_targets() -> dict[int | None, dict[int, float]]:
    """End-to-end targets in seconds by priority, of each tenant (by primary key) and of everybody (None)."""
    targets: dict[int | None, dict[int, float]] = {}
    for tenant_id, priority, e2e_ms in ServiceLevel.objects.values_list("tenant_id", "priority", "e2e_ms"):
        if e2e_ms is None:
            continue
        targets.setdefault(tenant_id, {})[priority] = e2e_ms / 1000
    return targets


def _tenant_config(tenant: Tenant, targets: Mapping[int | None, Mapping[int, float]]) -> TenantConfig:
    config = TenantConfig(
        name=tenant.name,
        weight=tenant.weight,
        suspended=tenant.suspended,
        deadlines_s={**targets.get(None, {}), **targets.get(tenant.pk, {})},
        drop_expired=tenant.drop_expired,
    )
    quota = getattr(tenant, "quota", None)
    if quota is None:
        return config
    return replace(
        config,
        rpm=quota.rpm,
        tpm=quota.tpm,
        tpd=quota.tpd,
        concurrency=quota.concurrency,
        max_priority=quota.max_priority,
    )


def publish_deployments(client: redis.Redis, keys: Keys, directory: Directory) -> bool:
    """Make Redis name exactly the directory's deployments, for gpu workers. True where something had to change."""
    wanted: dict[bytes | str, bytes | str] = {
        name.encode(): msgspec.json.encode(spec) for name, spec in directory.deployments.items()
    }
    published = client.hgetall(keys.deployments)
    if published == wanted:
        return False
    with client.pipeline(transaction=True) as pipe:
        if gone := published.keys() - wanted.keys():
            pipe.hdel(keys.deployments, *gone)
        for name, spec in wanted.items():
            pipe.hset(keys.deployments, name, spec)
        pipe.execute()
    return True


class DirectoryWatch:
    """Keeps a `Directory` current in an asyncio process.

    Looks at the version in Redis every `redis_period_s`, and at the one in the database every `database_period_s`
    (or as often as at Redis while that is away). While the database is away the last good directory stays.
    """

    def __init__(
        self,
        client: redis.asyncio.Redis,
        keys: Keys,
        *,
        redis_period_s: float = 0.25,
        database_period_s: float = 5.0,
        on_change: Callable[[Directory], None] | None = None,
    ) -> None:
        self.current = Directory(version=-1)
        self.loaded = asyncio.Event()
        """Set once a directory was read."""
        self._client = client
        self._keys = keys
        self._redis_period_s = redis_period_s
        self._database_period_s = database_period_s
        self._on_change = on_change
        self._hint: bytes | str | None = None
        self._next_look_s = 0.0
        self._troubles: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        # A thread of its own: a slow page must not keep a suspension from taking effect.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="directory")
        self._read = database_sync_to_async(_load_if_changed, thread_sensitive=False, executor=self._thread)

    async def start(self) -> None:
        """Read the directory (where the database answers) and go on watching."""
        await self._look()
        self._task = asyncio.create_task(self._watch(), name="directory-watch")

    async def stop(self) -> None:
        """End watching and give the database connection back."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await asyncio.get_running_loop().run_in_executor(self._thread, connections.close_all)
        self._thread.shutdown(wait=False)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._redis_period_s)
            try:
                await self._look()
            except Exception:
                logger.exception("Watching the configuration failed; going on with the last good one.")

    async def _look(self) -> None:
        """Ask Redis for the hint, and the database where the hint is new, missing or old."""
        now = asyncio.get_running_loop().time()
        try:
            hint = await self._client.get(self._keys.config_version)
        except (RedisError, OSError) as error:
            self._trouble("redis", f"Redis does not answer ({error}); asking the database for changes instead.")
            await self._refresh()
            return
        self._recovered("redis")
        if (hint != self._hint or now >= self._next_look_s) and await self._refresh():
            self._hint = hint
            self._next_look_s = now + self._database_period_s

    async def _refresh(self) -> bool:
        """Take over what the database says now; False where it does not answer."""
        try:
            directory = await self._read(self.current.version if self.loaded.is_set() else None)
        except (DatabaseError, OSError) as error:
            self._trouble("database", f"The database does not answer ({error}); keeping the last good configuration.")
            return False
        self._recovered("database")
        if directory is not None:
            self.current = directory
            self.loaded.set()
            if self._on_change:
                self._on_change(directory)
        return True

    def _trouble(self, source: str, message: str) -> None:
        if source not in self._troubles:
            self._troubles.add(source)
            logger.warning(message)

    def _recovered(self, source: str) -> None:
        if source in self._troubles:
            self._troubles.discard(source)
            logger.warning("%s answers again.", source.capitalize())


def _load_if_changed(known: int | None) -> Directory | None:
    """The directory, or None where the database still has the version `known`."""
    return None if known is not None and _version() == known else load_directory()


def _version() -> int:
    return ConfigVersion.objects.values_list("version", flat=True).first() or 0
