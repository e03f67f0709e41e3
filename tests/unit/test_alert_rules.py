"""Alert rules judged by readings, and alerts moved by what is seen: tables for each kind, holding, resolving."""

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboard.alerts.address import AddressError, check_url, may_connect
from dashboard.alerts.courier import GIVE_UP_AFTER, LONGEST_PAUSE_S, pause_s
from dashboard.alerts.judging import Finding, judge_rule, span
from dashboard.alerts.kinds import KINDS, Rule, find_problems
from dashboard.alerts.lifecycle import GAP_S, Standing, advance
from dashboard.alerts.readings import BatchSums, Live, QueueNow, Readings, ReplicaNow, RequestSums
from dashboard.alerts.webhook import sign

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def live(depth: int = 0, ready: int = 1, **fields: Any) -> Live:
    states = ["ready"] * ready or ["paused"]
    known: dict[str, Any] = {"model": "demo", "silent_s": 0.0}
    replicas = {f"gpu-{i}": ReplicaNow(state=state, **(known | fields)) for i, state in enumerate(states)}
    return Live(queues={"demo": QueueNow(depth=depth)}, replicas=replicas)


def batch(**fields: Any) -> BatchSums:
    known: dict[str, Any] = {"sequence_steps": 300.0, "slot_steps": 1000.0, "step_ms": 1000.0, "throttled": 0}
    return BatchSums(seconds=60, steps=100, **(known | fields))


def ran(window_s: int = 60, **fields: Any) -> dict[int, dict[tuple[str, str], BatchSums]]:
    return {window_s: {("demo", "gpu-0"): batch(**fields)}}


def ended(finished: int, failed: int) -> dict[int, dict[tuple[str, str], RequestSums]]:
    return {600: {("demo", "acme"): requests(finished=finished, failed=failed)}}


def requests(**fields: Any) -> RequestSums:
    known: dict[str, Any] = {"finished": 0, "failed": 0, "judged": 0, "met": 0, "allowed": 0.0}
    return RequestSums(**(known | fields))


def judged(num: int, missed: int, objective: float = 0.99) -> RequestSums:
    return requests(finished=num, judged=num, met=num - missed, allowed=num * (1 - objective))


def judge(kind: str, readings: Readings, **changes: Any) -> Finding:
    found = judge_rule(Rule(kind=kind, threshold=KINDS[kind].threshold, **changes), readings)
    assert found is not None
    (finding,) = found
    return finding


@pytest.mark.parametrize(
    ("readings", "value", "breached", "said"),
    [
        (
            Readings(live=live(5), batches=ran()),
            30,
            True,
            "30 % full over the last 1 min while 5 requests wait. Look on",
        ),
        (Readings(live=live(1), batches=ran(sequence_steps=600)), 60, False, ""),
        (Readings(live=live(1), batches=ran(sequence_steps=599)), 59.9, True, "while 1 request waits"),
        (Readings(live=live(0), batches=ran()), 30, False, "No request waits"),
        (Readings(live=live(9)), 0, True, "Batches were 0 % full"),
        (Readings(live=live(5, kv_usage=0.97), batches=ran()), 30, True, "KV cache is full"),
    ],
)
def test_occupancy_counts_while_requests_wait(readings: Readings, value: float, breached: bool, said: str) -> None:
    finding = judge("occupancy", readings, window_s=60)
    assert (round(finding.value, 1), finding.breached) == (value, breached)
    assert said in finding.reason


def test_occupancy_says_which_workers_take_nothing_and_leaves_a_model_without_any_to_the_queue() -> None:
    some = live(5, ready=1)
    paused = ReplicaNow(model="demo", state="paused", silent_s=0)
    both = Live(queues=some.queues, replicas={**some.replicas, "gpu-9": paused})
    assert "1 of 2 workers take no requests" in judge("occupancy", Readings(live=both), window_s=60).reason
    none = Readings(live=live(5, ready=0), batches=ran())
    assert judge_rule(Rule(kind="occupancy", threshold=60, window_s=60), none) == []


@pytest.mark.parametrize(
    ("depth", "ready", "value", "breached", "said"),
    [
        (100, 1, 100, False, ""),
        (101, 1, 101, True, "101 requests wait for 1 ready worker. Add replicas"),
        (201, 2, 100.5, True, "2 ready workers, 100 each"),
        (200, 2, 100, False, ""),
        (150, 0, 150, True, "no ready worker. Start, resume"),
        (0, 0, 0, False, ""),
    ],
)
def test_a_queue_is_long_by_its_ready_workers(depth: int, ready: int, value: float, breached: bool, said: str) -> None:
    finding = judge("queue", Readings(live=live(depth, ready)))
    assert (finding.value, finding.breached) == (value, breached)
    assert said in finding.reason


@pytest.mark.parametrize(("ready", "breached"), [(0, True), (1, False), (2, False)])
def test_a_model_that_is_offered_has_a_ready_worker_also_while_nothing_waits(ready: int, breached: bool) -> None:
    finding = judge("ready_workers", Readings(live=live(0, ready)))
    assert (finding.value, finding.breached) == (ready, breached)
    assert ("demo is offered and has no ready workers (1 paused). Start" in finding.reason) == breached


@pytest.mark.parametrize(
    ("finished", "refused", "breached"), [(95, 5, False), (94, 6, True), (0, 20, True), (0, 19, None)]
)
def test_refusals_for_want_of_capacity_are_of_all_that_came(finished: int, refused: int, breached: bool | None) -> None:
    sums = RequestSums(finished=finished, refused=refused)
    readings = Readings(requests={600: {("demo", "acme"): sums}})
    found = judge_rule(Rule(kind="refusals", threshold=5, window_s=600), readings)
    assert [finding.breached for finding in found or []] == ([] if breached is None else [breached])
    assert ("were refused for want of capacity" in str(found)) == bool(breached)


@pytest.mark.parametrize(("step_ms", "breached"), [(25_000.0, False), (25_100.0, True)])
def test_steps_are_slow_by_their_mean_over_all_replicas(step_ms: float, breached: bool) -> None:
    finding = judge("step_time", Readings(batches=ran(step_ms=step_ms)), window_s=60)
    assert (finding.value, finding.breached) == (step_ms / 100, breached)
    two = {60: {("demo", "gpu-0"): batch(step_ms=40_000.0), ("demo", "gpu-1"): batch(step_ms=10_000.0)}}
    assert judge("step_time", Readings(batches=two), window_s=60).value == 250


@pytest.mark.parametrize(
    ("finished", "failed", "breached"), [(95, 5, False), (94, 6, True), (0, 20, True), (100, 0, False)]
)
def test_completion_is_of_those_that_ended(finished: int, failed: int, breached: bool) -> None:
    finding = judge("completion", Readings(requests=ended(finished, failed)), window_s=600)
    assert (finding.value, finding.breached) == (100 * finished / (finished + failed), breached)
    assert (f"{failed} failed" in finding.reason) == breached


def test_few_requests_tell_nothing_of_completion() -> None:
    assert judge_rule(Rule(kind="completion", threshold=95, window_s=600), Readings(requests=ended(0, 19))) == []


@pytest.mark.parametrize(
    ("long", "short", "rate", "breached"),
    [
        (judged(1000, 150), judged(100, 15), 15, True),
        (judged(1000, 144), judged(100, 50), 14.4, False),
        (judged(1000, 150), judged(100, 14), 15, False),
        (judged(1000, 150), None, 15, False),
        (judged(1000, 15, 0.999), judged(100, 2, 0.999), 15, True),
        (judged(1000, 0), judged(100, 0), 0, False),
    ],
)
def test_an_sla_burns_when_both_windows_are_over_the_threshold(
    long: RequestSums, short: RequestSums | None, rate: float, breached: bool
) -> None:
    windows = {3600: {("demo", "acme"): long}, 300: {("demo", "acme"): short} if short else {}}
    finding = judge("sla_burn", Readings(requests=windows), window_s=3600, short_window_s=300)
    assert finding.key == ("demo", "acme")
    assert (round(finding.value, 6), finding.breached) == (rate, breached)
    assert ("30 days of it last 2 days" in finding.reason) == breached


def test_few_judged_requests_and_requests_without_a_level_burn_nothing() -> None:
    rule = Rule(kind="sla_burn", threshold=14.4, window_s=3600, short_window_s=300)
    for sums in (judged(19, 19), requests(finished=500)):
        windows = {3600: {("demo", "acme"): sums}, 300: {("demo", "acme"): sums}}
        assert judge_rule(rule, Readings(requests=windows)) == []


@pytest.mark.parametrize(
    ("state", "silent_s", "breached"),
    [("ready", 30, False), ("ready", 31, True), ("paused", 90, True), ("lost", 45, True)],
)
def test_silence_of_telemetry_is_told_of_each_worker(state: str, silent_s: float, breached: bool) -> None:
    replica = ReplicaNow(model="demo", state=state, silent_s=silent_s, why_silent="The driver answered last.")
    finding = judge("telemetry", Readings(live=Live(replicas={"gpu-0": replica})))
    assert (finding.key, finding.value, finding.breached) == (("demo", "gpu-0"), silent_s, breached)
    assert ("look at its host" in finding.reason) == (state == "lost")


@pytest.mark.parametrize("state", ["starting", "stopped", "failed"])
def test_a_worker_that_starts_or_has_said_good_bye_owes_no_telemetry(state: str) -> None:
    replicas = {"gpu-0": ReplicaNow(model="demo", state=state, silent_s=999)}
    assert judge_rule(Rule(kind="telemetry", threshold=30), Readings(live=Live(replicas=replicas))) == []


@pytest.mark.parametrize(("throttled", "breached"), [(12, False), (13, True)])
def test_throttling_is_a_share_of_the_seconds(throttled: int, breached: bool) -> None:
    readings = Readings(live=live(throttle_reasons=("thermal",)), batches=ran(300, throttled=throttled))
    finding = judge("throttling", readings, window_s=300)
    assert (round(finding.value), finding.breached) == (round(throttled / 0.6), breached)
    assert ("now: thermal" in finding.reason) == breached


@pytest.mark.parametrize("kind", ["occupancy", "queue", "ready_workers", "telemetry"])
def test_while_redis_is_away_nothing_is_said_of_what_it_holds(kind: str) -> None:
    assert judge_rule(Rule(kind=kind, threshold=1, window_s=60), Readings(batches=ran())) is None


def test_a_rule_of_one_model_judges_no_other() -> None:
    readings = Readings(live=live(500))
    assert judge_rule(Rule(kind="queue", threshold=1, model="other"), readings) == []
    assert len(judge_rule(Rule(kind="queue", threshold=1, model="demo"), readings) or []) == 1


def play(seen: Sequence[bool], *, hold_s: int, clear_s: int, period_s: float = 10.0) -> list[str]:
    """What changes, look by look."""
    rule = Rule(kind="queue", threshold=1, hold_s=hold_s, clear_s=clear_s)
    standing: Standing | None = None
    changes: list[str] = []
    for i, breached in enumerate(seen):
        standing, change = advance(standing, breached, rule, NOW + timedelta(seconds=i * period_s))
        changes.append(change)
    return changes


@pytest.mark.parametrize(
    ("seen", "hold_s", "clear_s", "changes"),
    [
        ("1", 0, 0, ["firing"]),
        ("1111", 20, 0, ["pending", "", "firing", ""]),
        ("1101", 20, 0, ["pending", "", "dropped", "pending"]),
        ("10", 0, 0, ["firing", "resolved"]),
        ("1000", 0, 20, ["firing", "", "", "resolved"]),
        ("10010001", 0, 20, ["firing", "", "", "", "", "", "resolved", "firing"]),
        ("000", 0, 0, ["", "", ""]),
    ],
)
def test_an_alert_fires_after_its_hold_time_and_resolves_when_all_was_well_for_a_while(
    seen: str, hold_s: int, clear_s: int, changes: list[str]
) -> None:
    assert play([mark == "1" for mark in seen], hold_s=hold_s, clear_s=clear_s) == changes


def test_holding_begins_anew_where_nothing_was_seen_for_long() -> None:
    rule = Rule(kind="queue", threshold=1, hold_s=120)
    pending = Standing(firing=False, started_at=NOW, seen_at=NOW)
    soon, late = NOW + timedelta(seconds=GAP_S), NOW + timedelta(seconds=3600)
    assert advance(pending, True, rule, soon)[0] == Standing(firing=False, started_at=NOW, seen_at=soon)
    assert advance(pending, True, rule, late) == (Standing(firing=False, started_at=late, seen_at=late), "")


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 60), st.integers(0, 60))
def test_firings_and_resolutions_alternate(seen: list[bool], hold_s: int, clear_s: int) -> None:
    told = [change for change in play(seen, hold_s=hold_s, clear_s=clear_s) if change in ("firing", "resolved")]
    assert told == ["firing", "resolved"] * (len(told) // 2) + ["firing"] * (len(told) % 2)


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"kind": "beauty"}, "kind", "one of occupancy"),
        ({"threshold": -1}, "threshold", "from 0 to 100 %"),
        ({"threshold": float("nan")}, "threshold", "from 0 to 100 %"),
        ({"window_s": 5}, "window_s", "15 to 900 seconds"),
        ({"short_window_s": 60}, "short_window_s", "not used by this kind"),
        ({"hold_s": 90_000}, "hold_s", "0 to 86,400"),
        ({"severity": "dire"}, "severity", "one of info"),
        ({"kind": "sla_burn", "window_s": 3600, "short_window_s": 3600}, "short_window_s", "shorter than the window"),
        ({"kind": "queue", "window_s": 60}, "window_s", "not used"),
    ],
)
def test_what_a_rule_cannot_be_is_said_at_its_field(changes: dict[str, Any], field: str, said: str) -> None:
    known: dict[str, Any] = {"kind": "occupancy", "threshold": 60, "window_s": 60}
    assert find_problems(Rule(**known)) == {}
    assert said in find_problems(Rule(**(known | changes)))[field]


@pytest.mark.parametrize(
    "url",
    [
        "", "ftp://example.org/", "https://", "https://user:secret@example.org/", "javascript:alert(1)", "http://a b/",
        "http://[::1", "http://example.org:99999/", "http://exämple.org/", "http://a/\r\nHost: b",
    ],
)  # fmt: skip
def test_an_address_that_is_no_plain_web_address_is_refused(url: str) -> None:
    with pytest.raises(AddressError):
        check_url(url)


def test_a_web_address_is_taken_apart() -> None:
    target = check_url("https://hooks.example.org:8443/in/1?key=2#part")
    assert (target.netloc, target.path) == ("hooks.example.org:8443", "/in/1?key=2")
    assert check_url("http://[::1]").netloc == "[::1]"


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        ("93.184.216.34", True), ("2606:2800:220:1:248:1893:25c8:1946", True), ("127.0.0.1", False), ("::1", False),
        ("10.1.2.3", False), ("192.168.1.1", False), ("169.254.169.254", False), ("fe80::1", False), ("0.0.0.0", False),
        ("::ffff:127.0.0.1", False), ("::ffff:10.0.0.1", False), ("224.0.0.1", False), ("100.64.0.1", False),
        ("64:ff9b::a9fe:a9fe", False), ("2002:7f00:1::", False), ("fd00::1", False), ("172.20.0.9", True),
        ("::ffff:172.20.0.9", True), ("fec0::1", False), ("64:ff9b:1::a9fe:a9fe", False), ("64:ff9b:1:ffff::1", False),
    ],
)  # fmt: skip
def test_only_public_addresses_and_named_networks_are_connected_to(address: str, allowed: bool) -> None:
    assert may_connect(ipaddress.ip_address(address), [ipaddress.ip_network("172.20.0.0/16")]) == allowed


def test_pauses_double_up_to_a_quarter_of_an_hour_and_a_day_holds_many() -> None:
    assert [pause_s(n) for n in (1, 2, 3, 8, 9, 1000)] == [5, 10, 20, 640, LONGEST_PAUSE_S, LONGEST_PAUSE_S]
    assert GIVE_UP_AFTER.total_seconds() / LONGEST_PAUSE_S > 90


def test_a_signature_is_of_time_and_body() -> None:
    """The digest is openssl's: printf '1700000000.{}' | openssl dgst -sha256 -hmac key."""
    assert sign("key", 1_700_000_000, b"{}") == (
        "t=1700000000,v1=9d713ed406bb7076d4123f0dc2c39d2df5c654ed4b0cd56b52c8b4c940bd63ae"
    )


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(45, "45 s"), (60, "1 min"), (90, "90 s"), (300, "5 min"), (3600, "1 h"), (5400, "90 min"), (259_200, "3 days")],
)
def test_spans_are_worded_in_the_unit_that_fits(seconds: int, said: str) -> None:
    assert span(seconds) == said
