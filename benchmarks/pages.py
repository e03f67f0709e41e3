"""How long the operator's pages take over a million requests and a million seconds of replicas, and by which plans.

    DATABASE_URL=postgres://user@host/empty python -m benchmarks.pages

fills the database, which has to be empty (or filled by this before), and asks each page and its API five times.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.stack import RedisServer

ROWS = 1_000_000
LIMIT_MS = 300
BENCH = "bench"
"""Who asks; made once the database is filled."""
HEAD = """
WITH made AS (
  SELECT i, now() - interval '30 days' + i * interval '30 days' / {rows} AS at,
         (i * 7919 % 4) AS t, (i * 104729 % 6) AS p, (i * 31 % 1000) AS r FROM generate_series(1::bigint, {rows}) AS i)
"""
REQUESTS = (
    HEAD
    + """
INSERT INTO inference_requestrecord (request_id, model, tenant, priority, endpoint, state, finish_reason, error_code,
  arrived_at, claimed_at, first_token_at, finished_at, prompt_tokens, completion_tokens, max_tokens, attempts, replica,
  policy, policy_revision, "user", timeline)
SELECT 'req-' || md5(i::text), 'demo', (ARRAY['checkout','support','research','nightly'])[t + 1], p, 'completions',
  CASE WHEN r < 10 THEN 'failed' WHEN r < 30 THEN 'cancelled' ELSE 'finished' END, 'stop', '',
  at - interval '4 s', at - interval '3 s', at - interval '2 s', at, 100, 64, 256, 1, 'gpu-' || i % 4, 'fair', 3, '',
  '{{"marks": [[1000, "started", 0]], "tokens": [[2000, 32], [2050, 32]], "span_ms": 50}}'
FROM made"""
)
OFFLINE = """
INSERT INTO controlplane_batch (id, tenant, endpoint, input_file_id, output_file_id, error_file_id, status, num_total,
  num_completed, num_failed, metadata, errors, moments, created_at, expires_at)
SELECT 'batch_' || i, (ARRAY['checkout','support','research','nightly'])[i % 4 + 1], '/v1/completions', 'file', '', '',
  CASE WHEN i % 250 = 0 THEN 'in_progress' ELSE 'completed' END, 1000, 1000, 0, '{}', '[]', '{}',
  now() - i * interval '1 hour', now() FROM generate_series(1, 20000) AS i;
INSERT INTO controlplane_batchline (batch_id, number, custom_id, body, state, num_shed, status_code, answer)
SELECT 'batch_' || b * 250, i, i::text, '{}', CASE WHEN i % 3 = 0 THEN 'completed' ELSE 'pending' END, 0, 0, ''
FROM generate_series(1, 80) AS b, generate_series(1, 1000) AS i;
"""
"""Tenants' batches, the lines of those that go on among them."""
BATCHES = (
    HEAD
    + """
INSERT INTO inference_batchrecord ({names}) SELECT {values} FROM made"""
)
GRAINS = """
INSERT INTO dashboard_requestrollup (resolution, start, model, tenant, priority, finished, failed, cancelled, refused,
  judged, met, allowed, prompt_tokens, completion_tokens)
SELECT {grain}, date_trunc('hour', now()) - i * interval '{grain} s', 'demo', t, p, 20, 1, 1, 0, 20, 19, 0.2, 2000, 1200
FROM generate_series(0, {num}) AS i, unnest(ARRAY['checkout','support','research','nightly']) AS t,
  generate_series(1, 2) AS p;
INSERT INTO dashboard_refusalrollup (resolution, start, model, tenant, reason, num)
SELECT {grain}, date_trunc('hour', now()) - i * interval '{grain} s', 'demo', t, r, 3
FROM generate_series(0, {num}) AS i,
  unnest(ARRAY['checkout','support','research','nightly']) AS t, unnest(ARRAY['queue_full','overloaded']) AS r;
INSERT INTO dashboard_latencyrollup (resolution, start, model, queue, ttft, tpot, e2e)
SELECT {grain}, date_trunc('hour', now()) - i * interval '{grain} s', 'demo', b, b, b, b
FROM generate_series(0, {num}) AS i, (SELECT '{buckets}'::jsonb AS b) AS one;
INSERT INTO dashboard_batchrollup (resolution, start, model, replica, seconds, steps, sequence_steps, step_ms,
  batch_size_max, step_ms_max, prompt_tokens, output_tokens, preemptions, kv_used, utilization, utilization_told,
  memory, memory_told, power, power_told, temperature_max, throttled)
SELECT {grain}, date_trunc('hour', now()) - i * interval '{grain} s', 'demo', 'gpu-' || r, 60, 900, 9000, 9000, 16, 20,
  600, 4000, 0, 30, 3000, 60, 60, 60, 60, 60, 60, 0 FROM generate_series(0, {num}) AS i, generate_series(0, 3) AS r;
"""


def main() -> None:
    """Fill, ask, print; `--json FILE` keeps the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not os.environ.get("DATABASE_URL", "").startswith("postgres"):
        sys.exit("Name an empty PostgreSQL database in DATABASE_URL; this fills it.")
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
    folder = Path(tempfile.mkdtemp(prefix="psp-"))
    server = RedisServer(folder)  # a page that finds none waits for it a while
    server.start()
    os.environ["REDIS_URL"] = server.url
    try:
        run(options.rows, options.json)
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def run(rows: int, report: Path | None) -> None:
    """The same on a server of Redis that answers."""
    import django

    django.setup()
    from django.core.management import call_command

    call_command("migrate", verbosity=0)
    fill(rows)
    figures = measure()
    if report:
        report.write_text(json.dumps(figures, indent=2))


def fill(rows: int) -> None:
    """Make the rows inside the database; much faster than to send them."""
    from django.contrib.auth.models import User
    from django.db import connection

    from inference.messages import LATENCY_BUCKETS_S
    from inference.models import RequestRecord

    if User.objects.filter(username=BENCH).exists():
        print("This database was filled before.")
        return
    if RequestRecord.objects.exists():
        sys.exit("This database is not empty.")
    began = time.perf_counter()
    buckets = json.dumps([5] * (len(LATENCY_BUCKETS_S) + 1))
    with connection.cursor() as cursor:
        cursor.execute(REQUESTS.format(rows=rows))
        names, values = zip(*batch_columns(), strict=True)
        cursor.execute(BATCHES.format(rows=rows, names=", ".join(names), values=", ".join(values)))
        for grain, num in ((60, 43_200), (3600, 17_520)):
            cursor.execute(GRAINS.format(grain=grain, num=num, buckets=buckets))
        cursor.execute(OFFLINE)
        cursor.execute("ANALYZE")
    User.objects.create_superuser(BENCH)
    print(f"{rows:,} requests and {rows:,} seconds of replicas made in {time.perf_counter() - began:.0f} s")


def batch_columns() -> Iterator[tuple[str, str]]:
    """Column and expression of a made BatchRecord; whatever else the table has gets its default."""
    from inference.models import BatchRecord

    made = {
        "replica": "'gpu-' || i % 4",
        "model": "'demo'",
        "second": f"date_trunc('second', now()) - ({ROWS} - i) / 4 * interval '1 s'",
        "steps": "80",
        "batch_size_mean": "8 + r / 250.0",
        "output_tokens": "640",
        "mode": "'continuous'",
        "utilization_percent": "80",
        "kv_blocks_total": "2048",
        "kv_blocks_used": "900",
    }
    for field in BatchRecord._meta.concrete_fields:
        if field.primary_key:
            continue
        kind = field.get_internal_type()
        empty = {"CharField": "''", "TextField": "''"}.get(kind, "NULL" if field.null else "0")
        if kind == "JSONField":
            empty = "'{}'::jsonb" if field.default is dict else "'[]'::jsonb"
        yield str(field.column), made.get(field.name, empty)


def measure() -> dict[str, Any]:
    """Each address five times; prints the median and the slowest, and the plans of the searches."""
    from django.contrib.auth.models import User
    from django.test import Client

    from dashboard.selectors.requests import RequestFilter, search_requests
    from inference.models import RequestRecord

    client = Client(SERVER_NAME="localhost")
    client.force_login(User.objects.get(username=BENCH))
    middle = search_requests(RequestFilter(tenant="support"), limit=200).next
    one = RequestRecord.objects.filter(tenant="nightly").order_by("-finished_at")[1000]
    addresses = [
        "/requests/?all=1", f"/requests/?all=1&tenant=support&after={middle}", "/requests/?all=1&state=failed",
        "/requests/?all=1&tenant=research&state=failed&priority=2", "/requests/?all=1&id=req-abc",
        "/requests/?all=1&id=req-nothing", "/requests/?all=1&since=2020-01-01T00:00&until=2020-01-02T00:00",
        "/requests/?all=1&tenant=nobody", f"/requests/{one.request_id}/", "/history/", "/tenants/",
        "/offline/", "/offline/?tenant=support&status=completed", "/tokens/", "/alerts/",
        "/audit/", "/policies/", "/fleet/", "/",
        "/api/v1/operator/requests?limit=200&state=cancelled&priority=5",
        *(f"/api/v1/operator/history?model=demo&span={span}&compare=previous{EVERY}" for span in SPANS),
        "/api/v1/operator/batches?limit=200", f"/api/v1/operator/requests/{one.request_id}",
        "/api/v1/operator/tenants", "/history/export/?model=demo&span=30d",
    ]  # fmt: skip
    figures = {}
    once(client, addresses[0])  # loads templates and opens the connection
    for address in addresses:
        times = sorted(once(client, address) for _ in range(5))
        figures[address] = {"median_ms": round(statistics.median(times), 1), "slowest_ms": round(times[-1], 1)}
        sign = "" if times[-1] < LIMIT_MS else f"  over {LIMIT_MS} ms"
        print(f"{statistics.median(times):8.1f} ms, slowest {times[-1]:7.1f} ms{sign}  {address[:100]}")
    explain()
    return figures


SPANS = ("15m", "1h", "6h", "24h", "7d", "30d")
EVERY = "".join(f"&metric={name}" for name in ("output_tokens", "completions", "ttft_p99", "queue_p50", "attainment"))


def once(client: Any, address: str) -> float:
    """Milliseconds of one request, read to its end."""
    began = time.perf_counter()
    answer = client.get(address)
    assert answer.status_code == 200, (address, answer.status_code, getattr(answer, "content", b"")[:500])
    body = b"".join(answer.streaming_content) if answer.streaming else answer.content
    assert body
    return 1000 * (time.perf_counter() - began)


def explain() -> None:
    """The plans of the searches, as PostgreSQL ran them."""
    from dashboard.selectors import requests as log
    from dashboard.selectors.keyset import Cursor
    from dashboard.selectors.requests import RequestFilter

    page = log.search_requests(RequestFilter(tenant="support"), limit=200).next
    assert isinstance(page, Cursor)
    for wanted in (RequestFilter(tenant="support"), RequestFilter(state="failed", tenant="research", priority=2)):
        rows = log._matching(wanted).filter(finished_at__lte=page.at).order_by("-finished_at", "-id")[:51]
        print(f"\n{wanted}\n{rows.explain(analyze=True)}")


if __name__ == "__main__":
    main()
