"""Run everything under one supervisor, from an empty folder to a system that answers."""

import asyncio
import json
import socket
import subprocess
import sys
import time
import urllib.request
from argparse import ArgumentParser
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import redis
from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError

from controlplane import preflight
from controlplane.announcement import address, announce
from controlplane.config import Config
from controlplane.demo import Secrets, model_folder, offer_model, offer_upstream, prepare_accounts, train_model
from controlplane.embedded_redis import NoServer, server_command
from controlplane.machine import MachineKeeper, keep_machine
from controlplane.processes import ops_process, redis_process, web_process
from controlplane.supervisor import Supervisor
from inference.checkpoint import CheckpointError, read_chat_template
from inference.messages import ReplicaStatus
from inference.models import ModelDeployment
from inference.services import publish, read_replicas
from inference.upstream.address import AddressError
from scheduling.connection import live_keys, live_redis

REDIS_PATIENCE_S = 20.0
SLOW_S = 90.0
POLL_S = 0.2
KINDS = ("web", "gpu", "ops")


class Command(BaseCommand):
    """`manage.py up`."""

    help = "Run web, gpu and ops processes, and Redis where REDIS_URL is empty, until Ctrl-C."
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--only", choices=KINDS, help="one kind of process, on a machine that serves with others")

    def handle(self, *args: Any, only: str | None = None, **options: Any) -> None:
        config: Config = settings.PENSTOCK
        try:
            with preflight.lock_var(config):
                kinds = (only,) if only else KINDS
                listener = preflight.listen(config) if "web" in kinds else None
                self._check(config, kinds)
                failure = asyncio.run(self._run(config, kinds, listener))
        except (preflight.CannotStart, NoServer) as error:
            raise CommandError(str(error)) from None
        except subprocess.CalledProcessError:
            raise CommandError("The demo model could not be trained; the lines above say why.") from None
        except KeyboardInterrupt:
            raise CommandError("Stopped before everything had started.") from None
        if failure:
            raise CommandError(failure)

    def _check(self, config: Config, kinds: tuple[str, ...]) -> None:
        """All that can be known and prepared before a process starts."""
        preflight.check_traces(config)
        preflight.check_redis(config)
        preflight.check_database(config)
        if not config.redis_url:
            server_command(config)
        preflight.migrate()
        if "gpu" in kinds:
            train_model(config)

    async def _run(self, config: Config, kinds: tuple[str, ...], listener: socket.socket | None) -> str:
        """From the first process to the last; a sentence where a process would not stay up."""
        supervisor = Supervisor(sys.stdout, plain=config.log_format == "json")
        await supervisor.open()
        try:
            if not config.redis_url:
                await supervisor.start([redis_process()])
                await self._wait_for_redis(config)
            secrets = await sync_to_async(_set_up)(config, kinds)
            specs = []
            if listener is not None:
                specs.append(web_process(config, listener.fileno()))
            if "ops" in kinds:
                specs.append(ops_process(config))
            await supervisor.start(specs)
            async with keep_machine(config, supervisor) if "gpu" in kinds else nullcontext() as keeper:
                greeting = asyncio.create_task(self._greet(config, kinds, secrets, supervisor, keeper))
                await supervisor.wait()
                greeting.cancel()
            self.stdout.write("Stopping ...")
            return supervisor.failure
        finally:
            await supervisor.close()

    async def _wait_for_redis(self, config: Config) -> None:
        deadline = time.monotonic() + REDIS_PATIENCE_S
        client = redis.asyncio.Redis.from_url(config.redis)
        while time.monotonic() < deadline:
            try:
                await client.ping()  # an append-only file that is still being read answers with an error
            except redis.RedisError:
                await asyncio.sleep(POLL_S / 4)
            else:
                await client.aclose()
                return
        raise preflight.CannotStart(
            f"The embedded Redis does not answer on {config.redis_socket}; see its lines above."
        )

    async def _greet(
        self,
        config: Config,
        kinds: tuple[str, ...],
        secrets: Secrets | None,
        supervisor: Supervisor,
        keeper: MachineKeeper | None,
    ) -> None:
        """Announce the system once it answers; say so where that takes long, or a worker reports that it cannot."""
        if kinds != KINDS:
            self.stdout.write(f"Running {kinds[0]}. Ctrl-C stops it.")
            return
        slow_from, failed = time.monotonic() + SLOW_S, set[str]()
        while not supervisor.stopping:
            replicas = await sync_to_async(_replicas)()
            for replica in replicas:
                if replica.state in ("failed", "unhealthy") and replica.replica not in failed:
                    failed.add(replica.replica)
                    self.stderr.write(f"{replica.replica} cannot serve {replica.model}: {replica.detail}")
            ready = [replica.model for replica in replicas if replica.state == "ready"]
            if (ready or not (keeper and keeper.wants_any)) and await asyncio.to_thread(_web_is_ready, config):
                model = ready[0] if ready else "MODEL"
                announce(config, secrets, model, sys.stdout, chats=await sync_to_async(_chats)(model))
                return
            if time.monotonic() > slow_from:
                slow_from = float("inf")
                self.stderr.write("Not everything is ready yet; a large model takes a while to load. Still waiting.")
            await asyncio.sleep(POLL_S)


def _set_up(config: Config, kinds: tuple[str, ...]) -> Secrets | None:
    """What is in the database before anybody asks for it; Redis has to run, which hears of changes."""
    if "gpu" in kinds:
        try:
            offer_upstream(config)
        except (ValidationError, AddressError) as error:
            problem = " ".join(error.messages) if isinstance(error, ValidationError) else str(error)
            raise preflight.CannotStart(f"PENSTOCK_UPSTREAM cannot be used: {problem}") from None
        try:
            offer_model(config)
        except CheckpointError as error:
            raise preflight.CannotStart(
                f"The demo model cannot be served: {error} Remove {model_folder(config)}; the next start trains it."
            ) from None
        preflight.check_checkpoint(config)
    publish()
    return prepare_accounts(config) if kinds == KINDS else None


def _replicas() -> list[ReplicaStatus]:
    try:
        return read_replicas(live_redis(), live_keys())
    except redis.RedisError:
        return []


def _chats(model: str) -> bool:
    """Whether the model has a chat template; so it says of one that it does not know."""
    deployment = ModelDeployment.objects.filter(name=model).first()
    return deployment is None or deployment.is_upstream or read_chat_template(Path(deployment.path)) is not None


def _web_is_ready(config: Config) -> bool:
    """Whether it answers requests for a model; the dashboard may be there before."""
    try:
        with urllib.request.urlopen(f"{address(config)}/readyz", timeout=5) as answer:  # noqa: S310
            return bool(json.load(answer)["checks"]["models"]["ok"])
    except OSError:  # refused, or 503: not yet
        return False
