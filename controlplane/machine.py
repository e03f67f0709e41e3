"""Makes the gpu workers of this machine what the plan says: starts, drains and stops them, and reports what runs."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from socket import gethostname
from typing import Any

import msgspec
import redis.asyncio
from redis.exceptions import RedisError

from controlplane.config import Config
from controlplane.devices import read_devices
from controlplane.processes import ProcessSpec, gpu_process, own_replicas
from controlplane.supervisor import Launched, Supervisor
from inference.plan import MACHINE_KEEP_S, Device, Machine, Plan, RunningReplica, decode_plan
from inference.reconcile import STABLE_S, Action, Forget, Start, Stop, Wanted, pause_s, reconcile, wanted_here
from scheduling.keys import Keys

logger = logging.getLogger(__name__)

TICK_S = 0.25
TALK_S = 0.5
DEVICES_S = 5.0
DRIVER_PATIENCE_S = 5.0
"""How long the first workers wait for the driver to say which GPUs there are."""
HOLD_S = 10.0
"""A supervisor that is silent for so long loses its machine's name to another."""
FAREWELL_S = 4.5
"""How long a worker may take to end beyond its drain before it is killed."""
OLD_PLAN_S = 60.0
"""A plan older than the one in force counts only when it has stood for so long: a Redis that came back with old data
has the database's plan again within seconds."""


@dataclass(slots=True)
class _Entry:
    """A gpu worker of this machine: what it was started as, and how that goes."""

    wanted: Wanted
    state: str
    since_s: float
    launched: Launched | None = None
    exit_status: int | None = None
    """What its process ended with; None where nobody heard."""
    until_s: float | None = None
    drain_s: float | None = None
    detail: str = ""
    num_failures: int = 0

    def report(self) -> RunningReplica:
        return RunningReplica(
            name=self.wanted.name,
            model=self.wanted.model,
            device=self.wanted.device,
            own=self.wanted.own,
            state=self.state,  # type: ignore[arg-type]  # set below alone
            generation=self.wanted.generation,
            pid=self.launched.pid if self.launched else 0,
            since_s=round(self.since_s, 3),
            until_s=None if self.until_s is None else round(self.until_s, 3),
            drain_s=self.drain_s,
            detail=self.detail,
            num_failures=self.num_failures,
        )


class MachineKeeper:
    """One for each supervisor that runs gpu workers. While Redis is away the last plan stands."""

    def __init__(
        self,
        config: Config,
        supervisor: Supervisor,
        client: redis.asyncio.Redis,
        *,
        devices: Callable[[Config], list[Device]] = read_devices,
        make_process: Callable[[Config, Wanted], ProcessSpec] = gpu_process,
    ) -> None:
        """`devices` asks driver and system, and may block; `make_process` says how a replica is started."""
        self._config = config
        self._supervisor = supervisor
        self._client = client
        self._keys = Keys(config.key_prefix)
        self._read_devices = devices
        self._make_process = make_process
        self._own = own_replicas(config)
        self._entries: dict[str, _Entry] = {}
        self._plan = Plan()
        self._older_since_s: float | None = None
        self._holder = f"{gethostname()}:{config.var.resolve()}"
        self._holds = False
        self._detail = ""
        self._devices: list[Device] = []
        self._started_s = time.time()
        self._is_away = False
        self._stopping = False

    @property
    def wants_any(self) -> bool:
        """Whether any gpu worker should run here."""
        return bool(self._wanted())

    async def run(self) -> None:
        """Reconcile until stopped."""
        if self._config.num_gpu_processes > 1:
            await self._spread()
        look = asyncio.create_task(self._follow_devices())
        due_s = 0.0
        try:
            while not self._stopping:
                is_due = time.monotonic() >= due_s
                if is_due:
                    due_s = time.monotonic() + TALK_S
                    await self._talk(self._listen)
                before = self._reports()
                try:
                    await self._step()
                except Exception:  # a defect here must not leave the workers that run without a supervisor
                    logger.exception("The plan could not be followed; the next look tries again")
                if self._holds and (is_due or self._reports() != before):
                    await self._talk(self._report)
                await asyncio.sleep(TICK_S)
        finally:
            look.cancel()

    async def _spread(self) -> None:
        """Give the workers of the settings a GPU each, as far as there are any; a silent driver is not awaited."""
        reading = asyncio.to_thread(self._read_devices, self._config)
        try:
            self._own = own_replicas(self._config, await asyncio.wait_for(reading, DRIVER_PATIENCE_S))
        except Exception:  # the driver's doing; each worker then takes the device of the settings
            logger.exception("The devices of this machine cannot be read")

    def stop(self) -> None:
        """End `run` soon. A cancellation alone does not: it can be lost in Redis's client."""
        self._stopping = True

    async def leave(self) -> None:
        """Say that this machine goes away in good order."""
        if not self._holds:
            return
        name = self._config.machine_name
        try:
            await self._client.zrem(self._keys.machines, name)
            await self._client.delete(self._keys.machine(name), self._keys.machine_holder(name))
        except (RedisError, OSError) as error:
            logger.warning("The machine's end could not be reported: %s", error)

    async def _talk(self, words: Callable[[], Awaitable[None]]) -> None:
        """Listen or report, where Redis answers."""
        try:
            await words()
        except (RedisError, OSError, msgspec.MsgspecError) as error:
            if not self._is_away:
                logger.warning("The plan cannot be read (%s); the last one stands.", error)
            self._is_away = True
        except Exception:  # as in `run`
            logger.exception("What was read or reported made no sense; the next look tries again")
        else:
            self._is_away = False

    async def _listen(self) -> None:
        fields: Any = await self._client.hgetall(self._keys.plan)
        self._adopt(decode_plan(fields))
        await self._hold()

    def _adopt(self, plan: Plan | None) -> None:
        """Take up a plan; a lost one leaves the last in force."""
        if plan is None:
            return
        if plan.revision < self._plan.revision:
            self._older_since_s = self._older_since_s or time.monotonic()
            if time.monotonic() - self._older_since_s < OLD_PLAN_S:
                return
        self._older_since_s = None
        self._plan = plan

    async def _hold(self) -> None:
        """Find out whether this supervisor alone goes by the machine's name."""
        key = self._keys.machine_holder(self._config.machine_name)
        taken = await self._client.set(key, self._holder, nx=True, px=int(1000 * HOLD_S))
        holder: Any = None if taken else await self._client.get(key)
        self._holds = bool(taken) or holder == self._holder.encode()
        if self._holds:
            await self._client.pexpire(key, int(1000 * HOLD_S))
            self._detail = ""
        elif not self._detail and holder is not None:
            self._detail = (
                f"{holder.decode()} goes by the name {self._config.machine_name} too; replicas that operators add are "
                "started there. Give this one a PENSTOCK_MACHINE of its own."
            )
            self._supervisor.say(self._detail)

    def _reports(self) -> list[RunningReplica]:
        """What runs, and what of the settings an operator has stopped."""
        wanted = self._wanted()
        stopped = [
            RunningReplica(name=own.name, model=own.model, device=own.device, own=True, state="stopped")
            for own in self._own
            if own.name not in self._entries and own.name not in wanted
        ]
        return [*(entry.report() for entry in self._entries.values()), *stopped]

    async def _report(self) -> None:
        config, now_s = self._config, time.time()
        machine = Machine(
            name=config.machine_name,
            host=gethostname(),
            pid=os.getpid(),
            time_s=round(now_s, 3),
            started_s=round(self._started_s, 3),
            revision=self._plan.revision,
            orchestrated=config.orchestrated,
            drain_s=config.drain_s,
            devices=self._devices,
            replicas=self._reports(),
        )
        async with self._client.pipeline(transaction=True) as pipe:
            pipe.set(self._keys.machine(machine.name), msgspec.msgpack.encode(machine), px=int(1000 * MACHINE_KEEP_S))
            pipe.zadd(self._keys.machines, {machine.name: now_s})
            pipe.zremrangebyscore(self._keys.machines, "-inf", now_s - MACHINE_KEEP_S)
            await pipe.execute()

    def _wanted(self) -> dict[str, Wanted]:
        plan = self._plan
        if not self._holds:  # another supervisor goes by this name: what operators add is its
            own = {replica.name for replica in self._own}
            plan = Plan(revision=plan.revision, replicas={n: p for n, p in plan.replicas.items() if n in own})
        config = self._config
        return wanted_here(plan, machine=config.machine_name, own=self._own, orchestrated=config.orchestrated)

    async def _step(self) -> None:
        """One look: what the plan and the processes call for."""
        for entry in list(self._entries.values()):
            if entry.state != "waiting" and not (entry.launched and entry.launched.pid):
                self._ended(entry)
        for entry in self._entries.values():
            if entry.state == "stopping" and time.time() >= (entry.until_s or 0.0) and entry.launched is not None:
                self._supervisor.say(f"{entry.wanted.name} does not end; it is killed, and its requests come back.")
                entry.launched.kill()
                entry.until_s = time.time() + FAREWELL_S
        running = {name: entry.report() for name, entry in self._entries.items()}
        actions = reconcile(self._wanted(), running, self._plan, now_s=time.time())
        await self._carry_out(actions)

    async def _carry_out(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Start(wanted):
                    await self._start(wanted)
                case Stop(name, drain_s):
                    self._stop(self._entries[name], drain_s)
                case Forget(name):
                    del self._entries[name]

    async def _start(self, wanted: Wanted) -> None:
        former = self._entries.get(wanted.name)
        entry = _Entry(wanted, "running", time.time(), num_failures=former.num_failures if former else 0)
        self._entries[wanted.name] = entry

        def hear(status: int) -> None:
            entry.exit_status = status

        entry.launched = await self._supervisor.launch(self._make_process(self._config, wanted), hear)

    def _stop(self, entry: _Entry, drain_s: float | None) -> None:
        drain_s = self._config.drain_s if drain_s is None else drain_s
        entry.until_s = time.time() + drain_s + FAREWELL_S
        if entry.state != "stopping":
            entry.since_s = time.time()
        entry.state, entry.drain_s = "stopping", drain_s
        if entry.launched is not None:
            entry.launched.terminate()

    def _ended(self, entry: _Entry) -> None:
        """Its process is no more: as it was told to, or not.

        That is seen by its absence: circus may drop a process that dies in the middle of a look without a word.
        """
        entry.launched = None
        if entry.state == "stopping":
            del self._entries[entry.wanted.name]
            return
        age_s = time.time() - entry.since_s
        if age_s >= STABLE_S:
            entry.num_failures = 0
        with_status = "" if entry.exit_status is None else f" with {entry.exit_status}"
        self._fail(entry, f"Its process ended{with_status} after {age_s:.0f} s")

    def _fail(self, entry: _Entry, what: str) -> None:
        entry.num_failures += 1
        pause = pause_s(entry.num_failures)
        entry.state, entry.since_s, entry.until_s = "waiting", time.time(), time.time() + pause
        times = f", {entry.num_failures} times in a row" if entry.num_failures > 1 else ""
        entry.detail = f"{what}{times}; it is started again {f'in {pause:g} s' if pause else 'at once'}."
        self._supervisor.say(f"{entry.wanted.name}: {entry.detail}")

    async def _follow_devices(self) -> None:
        """Ask for devices and their free memory every few seconds, beside everything else."""
        while True:
            try:
                self._devices = await asyncio.to_thread(self._read_devices, self._config)
            except Exception:  # the driver's doing; what was seen last stands
                logger.exception("The devices of this machine cannot be read")
            await asyncio.sleep(DEVICES_S)


@asynccontextmanager
async def keep_machine(
    config: Config, supervisor: Supervisor, *, make_process: Callable[[Config, Wanted], ProcessSpec] = gpu_process
) -> AsyncIterator[MachineKeeper]:
    """Follow the plan as long as this lasts."""
    client = redis.asyncio.Redis.from_url(config.redis, socket_timeout=5, socket_connect_timeout=5)
    keeper = MachineKeeper(config, supervisor, client, make_process=make_process)
    task = asyncio.create_task(keeper.run())
    try:
        yield keeper
    finally:
        keeper.stop()
        await task
        await keeper.leave()
        await client.aclose()
