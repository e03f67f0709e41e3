"""History as the historian writes it, generated: requests of a few tenants, and seconds of replicas."""

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from inference.models import BatchRecord, RequestRecord

TENANTS = ("checkout", "support", "research", "nightly")
MODEL = "demo"


def make_requests(
    num: int, *, end: datetime, seconds: float, model: str = MODEL, seed: int = 1, tenants: tuple[str, ...] = TENANTS
) -> Iterator[RequestRecord]:
    """`num` requests that ended evenly within the `seconds` before `end`; 1 of 50 failed, 1 of 40 cancelled."""
    rng = random.Random(seed)
    for i in range(num):
        finished = end - timedelta(seconds=seconds * (1 - (i + 1) / num))
        tenant = rng.randrange(len(tenants))
        wait_s, first_s, tokens = rng.expovariate(1 / (0.2 + tenant)), 0.02 + rng.random() / 5, rng.randrange(8, 256)
        claimed = finished - timedelta(seconds=first_s + tokens * 0.012)
        state = "failed" if i % 50 == 7 else "cancelled" if i % 40 == 3 else "finished"
        served = state != "cancelled"
        yield RequestRecord(
            request_id=f"req-{seed:02d}{i:012x}", model=model, tenant=tenants[tenant], priority=(tenant + i % 2) % 6,
            endpoint="chat.completions" if i % 3 else "completions", state=state,
            finish_reason={"failed": "error", "cancelled": "cancelled"}.get(state, "stop" if i % 4 else "length"),
            error_code={"failed": "out_of_memory", "cancelled": "client_gone"}.get(state, ""),
            arrived_at=claimed - timedelta(seconds=wait_s), claimed_at=claimed if served else None,
            first_token_at=claimed + timedelta(seconds=first_s) if served else None, finished_at=finished,
            prompt_tokens=rng.randrange(16, 512), completion_tokens=tokens if served else 0, max_tokens=256,
            attempts=1 if served else 0, replica=f"gpu-{i % 2}" if served else "", policy="fair" if served else "",
            policy_revision=3 if served else 0,
        )  # fmt: skip


def make_batches(
    num: int, *, end: datetime, model: str = MODEL, replicas: int = 2, seed: int = 1
) -> Iterator[BatchRecord]:
    """A row per second and replica, the last at `end`."""
    rng = random.Random(seed)
    last = end.astimezone(UTC).replace(microsecond=0)
    for i in range(num):
        size = 4 + 10 * rng.random()
        yield BatchRecord(
            replica=f"gpu-{i % replicas}", model=model, second=last - timedelta(seconds=(num - 1 - i) // replicas),
            steps=80, batch_size_mean=size, batch_size_max=16, prompt_tokens=rng.randrange(900),
            output_tokens=int(80 * size), step_ms_mean=11 + rng.random(), step_ms_max=19.0,
            kv_blocks_used=int(100 * size), kv_blocks_total=2048, preemptions=int(i % 97 == 0), mode="continuous",
            policy="fair", policy_revision=3,
            telemetry_source="host", device="CPU, 2 cores", utilization_percent=80 + 10 * rng.random(),
            memory_used_bytes=3_400_000_000, memory_total_bytes=8_000_000_000, throttle_reasons=[],
        )  # fmt: skip
