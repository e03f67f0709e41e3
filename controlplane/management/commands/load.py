"""Send mixed traffic of the demo's tenants to the running system."""

import asyncio
import contextlib
import logging
import signal
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path
from random import Random
from typing import Any

import httpx
from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from controlplane.announcement import address
from controlplane.demo import TENANTS, Secrets, read_secrets
from controlplane.load.sender import Sender
from controlplane.load.tally import Tally
from controlplane.load.traffic import BadTrace, conversations, read_trace

QUIET_PERIOD_S = 5.0


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value <= 86_400:
        raise ArgumentTypeError(f"{text} is not between 0 and 86400")
    return value


def _clients(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 1000:
        raise ArgumentTypeError(f"{text} is not between 1 and 1000")
    return value


class Command(BaseCommand):
    """`manage.py load`."""

    help = "Send traffic of several tenants until the duration is over or Ctrl-C comes, then sum up by tenant."
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--duration", type=_positive, default=60.0, help="seconds (60)")
        parser.add_argument("--clients", type=_clients, default=32, help="clients that wait for their answers (32)")
        parser.add_argument(
            "--trace", type=Path, help="CSV, also gzipped, to replay: arrival_s,tenant,prompt_tokens,output_tokens"
        )
        parser.add_argument(
            "--rate", type=_positive, default=1.0, help="how much faster than it was the trace is replayed (1)"
        )
        parser.add_argument("--seed", type=int, default=0, help="for the same requests again (0)")

    def handle(self, *args: Any, **options: Any) -> None:
        secrets = read_secrets(settings.PENSTOCK)
        if secrets is None:
            raise CommandError("There are no demo tenants to send as. Run `make up` in another terminal first.")
        if options["trace"] and not options["trace"].is_file():
            raise CommandError(f"There is no trace {options['trace']}.")
        logging.getLogger("httpx").setLevel(logging.WARNING)
        tally = Tally()
        try:
            asyncio.run(self._run(secrets, tally, options))
        except* httpx.HTTPError as group:
            error = group.exceptions[0]
            raise CommandError(
                f"{address(settings.PENSTOCK)} does not answer ({error}). Run `make up` in another terminal first."
            ) from None
        except* BadTrace as group:
            raise CommandError(str(group.exceptions[0])) from None
        self.stdout.write("\n" + tally.summary())

    async def _run(self, secrets: Secrets, tally: Tally, options: dict[str, Any]) -> None:
        base_url = address(settings.PENSTOCK)
        model, max_model_len = await _first_model(base_url, next(iter(secrets.keys.values())))
        sender = Sender(base_url, secrets.keys, tally)
        work = asyncio.create_task(self._send(sender, model, max_model_len, options))
        for signum in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(signum, work.cancel)
        try:
            await self._watch(work, sender, tally)
        finally:
            await sender.close()

    async def _send(self, sender: Sender, model: str, max_model_len: int, options: dict[str, Any]) -> None:
        random = Random(options["seed"])  # noqa: S311
        if options["trace"]:
            shots = read_trace(options["trace"], model, options["rate"], max_model_len, random)
            await sender.replay(shots, options["duration"])
            return
        until = time.monotonic() + options["duration"]
        async with asyncio.TaskGroup() as clients:
            for number in range(options["clients"]):
                tenant = TENANTS[number % len(TENANTS)]
                shots = conversations(tenant, model, Random(random.getrandbits(32)))  # noqa: S311
                clients.create_task(sender.keep_sending(shots, until))

    async def _watch(self, work: "asyncio.Task[None]", sender: Sender, tally: Tally) -> None:
        """Show the live line until the work is done: in place on a terminal, now and then in a file."""
        live = sys.stdout.isatty()
        while not work.done():
            await asyncio.wait([work], timeout=0.5 if live else QUIET_PERIOD_S)
            line = tally.line(sender.num_running)
            self.stdout.write(f"\r\033[K{line}" if live else line, ending="" if live else "\n")
            self.stdout.flush()
        with contextlib.suppress(asyncio.CancelledError):
            await work


async def _first_model(base_url: str, key: str) -> tuple[str, int]:
    """Name and context length of the first model on offer."""
    async with httpx.AsyncClient(base_url=base_url, headers={"Authorization": f"Bearer {key}"}) as client:
        answer = await client.get("/v1/models")
        models = answer.raise_for_status().json()["data"]
    if not models:
        raise CommandError("No model is offered. Register one with `manage.py add_model NAME PATH`.")
    return models[0]["id"], int(models[0].get("max_model_len") or 1024)
