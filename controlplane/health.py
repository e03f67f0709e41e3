"""Probes: `/healthz` says that the process runs, `/readyz` whether it can serve, check by check."""

import asyncio
import uuid
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any

import msgspec
from channels.db import database_sync_to_async
from django.db import connection

from controlplane.api.openai.exchange import Exchange, Receive, Scope, Send
from inference.directory import DirectoryWatch
from inference.gateway.gateway import Gateway
from scheduling.store import Command

PATIENCE_S = 2.0
TOLD = frozenset({"models"})
"""Checks that are told and decide nothing: without a model there is still the dashboard, where one is offered."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that serving needs."""

    ok: bool
    detail: str = ""


async def answer_healthz(scope: Scope, receive: Receive, send: Send) -> None:
    """200 as long as the event loop turns."""
    await Exchange(scope, receive, send, uuid.uuid4().hex).respond(200, b'{"status":"ok"}')


async def answer_readyz(scope: Scope, receive: Receive, send: Send) -> None:
    """200 where every check passes that the dashboard needs too, otherwise 503; the body names them all."""
    checks = await run_checks(scope["state"]["gateway"], scope["state"]["directory"])
    ready = all(check.ok for name, check in checks.items() if name not in TOLD)
    body = msgspec.json.encode({"status": "ready" if ready else "not ready", "checks": checks})
    await Exchange(scope, receive, send, uuid.uuid4().hex).respond(200 if ready else 503, body)


async def run_checks(gateway: Gateway, directory: DirectoryWatch) -> dict[str, Check]:
    """All checks by name. No worker is no reason to take this process out of service: another would not serve more."""
    redis, database = await asyncio.gather(
        _reach(gateway.pipeline.send(Command(("PING",), bool)), "Redis"), _reach(_ask_database(), "The database")
    )
    deployments = directory.current.deployments
    num_models = len(gateway.models.loaded())
    if directory.loaded.is_set():
        configuration = Check(True, f"version {directory.current.version}")
    else:
        configuration = Check(False, "Tenants and keys have not been read from the database yet.")
    if num_models:
        models = Check(True, f"{num_models} of {len(deployments)} loaded")
    else:
        models = Check(False, _say_unserved(list(deployments)))
    unserved = [reason for model in gateway.models.loaded() if (reason := gateway.desk.why_unserved(model.name))]
    accepting = Check(not gateway.closing, "shutting down" if gateway.closing else "")
    return {
        "redis": redis,
        "database": database,
        "configuration": configuration,
        "models": models,
        "replicas": Check(True, " ".join(unserved)),
        "accepting": accepting,
    }


def _say_unserved(offered: list[str]) -> str:
    if not offered:
        return "No model is offered. Register one with `manage.py add_model`."
    return f"None of {', '.join(offered)} can be read here: web processes need the models' directories too."


async def _reach(answer: Awaitable[Any], name: str) -> Check:
    try:
        async with asyncio.timeout(PATIENCE_S):
            await answer
    except Exception as error:
        return Check(False, f"{name} does not answer ({type(error).__name__}).")
    return Check(True)


@database_sync_to_async  # type: ignore[untyped-decorator]
def _ask_database() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
