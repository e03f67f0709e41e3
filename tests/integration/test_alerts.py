"""Alerts from a reading to a receiver: fired, resolved, acknowledged, delivered at least once, over restarts."""

import hashlib
import hmac
import json
import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from django.apps import apps
from django.core.exceptions import ValidationError
from django.core.mail import EmailMessage
from pytest_django.fixtures import Settings

from controlplane.config import Config
from dashboard.alerts import courier
from dashboard.alerts.courier import GIVE_UP_AFTER, Courier, deliver_channel, due_channels
from dashboard.alerts.models import Alert, AlertChannel, AlertRule, Delivery, Notice
from dashboard.alerts.reader import read_all
from dashboard.alerts.services import prune_alerts, send_again
from dashboard.alerts.watch import MAX_OPEN, watch_alerts
from dashboard.rollups import roll_up
from inference.messages import DeploymentSpec, Telemetry
from inference.models import BatchRecord, Replica, RequestRecord
from scheduling.keys import Keys
from scheduling.models import ServiceLevel
from tests.fleet_data import FleetWriter
from tests.history_data import make_batches, make_requests
from tests.integration.test_redis_tls import make_certificate

pytestmark = pytest.mark.django_db
PATIENCE_S = 60.0


class SteppedClock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now

    def tick(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> SteppedClock:
    return SteppedClock()


@pytest.fixture
def fleet(store: redis.Redis, keys: Keys, installation: Config) -> FleetWriter:
    writer = FleetWriter(store, keys)
    writer.deploy()
    AlertRule.objects.all().delete()
    return writer


def make_rule(**values: Any) -> AlertRule:
    known: dict[str, Any] = {"name": "Long queue", "kind": "queue", "threshold": 3, "hold_s": 20, "clear_s": 10}
    return AlertRule.objects.create(**(known | values))


def watch(clock: SteppedClock) -> int:
    return watch_alerts(clock=clock)


def fill(fleet: FleetWriter, num: int = 5) -> None:
    for i in range(num):
        fleet.enqueue(f"tenant-{i}")


class Receiver:
    """A real HTTP server that keeps what it is posted, and answers with the statuses it is given, 200 at last."""

    def __init__(self) -> None:
        receiver = self
        self.posts: list[tuple[dict[str, str], bytes]] = []
        self.statuses: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.gate.wait(PATIENCE_S)
                receiver.posts.append(({k.lower(): v for k, v in self.headers.items()} | {"path": self.path}, body))
                self.send_response(receiver.statuses.pop(0) if receiver.statuses else 200)
                self.send_header("Location", "http://127.0.0.1/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Silence."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook?team=7"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def stop(self) -> None:
        self.gate.set()
        self.server.shutdown()
        self.thread.join(PATIENCE_S)
        self.server.server_close()

    @property
    def notices(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.posts]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.stop()


@pytest.fixture
def loopback(installation: Config, settings: Settings) -> None:
    values = settings.PENSTOCK.model_dump() | {"webhook_networks": [ip_network("127.0.0.0/8")]}
    settings.PENSTOCK = Config.model_construct(**values)


@pytest.fixture
def channel(receiver: Receiver, loopback: None) -> AlertChannel:
    return AlertChannel.objects.create(name="pager", url=receiver.url, secret="hush")


def fire(fleet: FleetWriter, clock: SteppedClock) -> Alert:
    """An alert that fires at once."""
    make_rule(hold_s=0)
    fill(fleet)
    assert watch(clock) == 1
    return Alert.objects.get()


# From a reading to an alert


def test_a_long_queue_is_pending_then_fires_once_and_resolves_when_it_was_short_for_a_while(
    fleet: FleetWriter, clock: SteppedClock, store: redis.Redis, keys: Keys
) -> None:
    make_rule()
    fill(fleet)
    assert watch(clock) == 0
    assert (Alert.objects.get().state, Notice.objects.count()) == ("pending", 0)
    clock.tick(20)
    assert watch(clock) == 1
    clock.tick(5)
    assert watch(clock) == 0
    alert = Alert.objects.get()
    assert (alert.state, alert.value, alert.fired_at) == ("firing", 5, clock.now - timedelta(seconds=5))
    assert "no ready worker" in alert.reason
    assert json.loads(store.get(keys.alerts) or b"") == [["Long queue", "warning", 1]]
    for request in fleet.claim(5):
        fleet.finish(request)
    assert watch(clock) == 0
    clock.tick(10)
    assert watch(clock) == 1
    alert.refresh_from_db()
    assert (alert.state, alert.ending) == ("resolved", "Back to 0 requests, within the threshold of 3.")
    assert list(Notice.objects.order_by("created_at").values_list("event", flat=True)) == ["firing", "resolved"]
    assert json.loads(store.get(keys.alerts) or b"") == [["Long queue", "warning", 0]]


def test_what_never_held_leaves_no_trace(fleet: FleetWriter, clock: SteppedClock) -> None:
    make_rule(threshold=4)
    fill(fleet)
    watch(clock)
    fleet.claim(3)
    clock.tick(5)
    assert watch(clock) == 0
    assert not Alert.objects.exists()


def test_two_looks_at_once_make_one_alert(fleet: FleetWriter, clock: SteppedClock) -> None:
    make_rule(hold_s=0)
    fill(fleet)

    def read_slowly(rules: Any, now: datetime) -> Any:
        readings = read_all(rules, now)
        watch_alerts(clock=clock)  # another process was faster
        return readings

    watch_alerts(read_slowly, clock)
    assert (Alert.objects.count(), Notice.objects.count()) == (1, 1)


def test_while_redis_is_away_an_alert_about_its_queue_stands(
    fleet: FleetWriter, clock: SteppedClock, settings: Settings
) -> None:
    alert = fire(fleet, clock)
    values = settings.PENSTOCK.model_dump() | {"redis_url": "unix:///nowhere/redis.sock"}
    settings.PENSTOCK = Config.model_construct(**values)
    clock.tick(500)
    assert watch(clock) == 0
    alert.refresh_from_db()
    assert (alert.state, alert.clear_at) == ("firing", None)


@pytest.mark.parametrize(("end", "said"), [("off", "switched off"), ("delete", "deleted")])
def test_a_rule_that_is_switched_off_or_deleted_resolves_what_it_fired(
    fleet: FleetWriter, clock: SteppedClock, end: str, said: str
) -> None:
    alert = fire(fleet, clock)
    rule = AlertRule.objects.get()
    if end == "off":
        rule.enabled = False
        rule.save()
    else:
        rule.delete()
    assert watch(clock) == 1
    alert.refresh_from_db()
    assert alert.state == "resolved"
    assert said in alert.ending
    assert alert.rule_name == "Long queue"


def test_a_rule_of_one_model_takes_the_place_of_the_rule_of_all(fleet: FleetWriter, clock: SteppedClock) -> None:
    other = FleetWriter(fleet.client, fleet.keys, model="other")
    other.deploy()
    fill(fleet)
    fill(other)
    make_rule(hold_s=0)
    make_rule(name="Longer queue", model="demo", threshold=50, hold_s=0)
    make_rule(name="Grave queue", threshold=4, severity="critical", hold_s=0)
    watch(clock)
    found = sorted(Alert.objects.values_list("rule_name", "model"))
    assert found == [("Grave queue", "demo"), ("Grave queue", "other"), ("Long queue", "other")]


def test_alerts_of_one_rule_are_bounded_and_the_worst_come_first(
    fleet: FleetWriter, clock: SteppedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dashboard.alerts.watch.MAX_OPEN", 2)
    assert MAX_OPEN > 2
    for num, name in ((4, "a"), (9, "b"), (6, "c")):
        writer = FleetWriter(fleet.client, fleet.keys, model=name)
        writer.deploy()
        fill(writer, num)
    make_rule(hold_s=0)
    for _ in range(2):
        watch(clock)
    assert sorted(Alert.objects.values_list("model", flat=True)) == ["b", "c"]


def test_every_default_rule_can_be_used_and_judges_what_was_recorded(fleet: FleetWriter, clock: SteppedClock) -> None:
    migration = import_module("dashboard.migrations.0005_default_alert_rules")
    for _ in range(2):
        migration.create_rules(apps, None)
    rules = list(AlertRule.objects.all())
    assert len(rules) == 9
    for rule in rules:
        rule.full_clean()
    now = clock()
    ServiceLevel.objects.create(priority=0, ttft_ms=1)
    rows = list(make_requests(400, end=now, seconds=250, tenants=("acme",)))
    for i, row in enumerate(rows):
        row.priority = 0
        if i % 4 == 0:
            row.state = "failed"
    RequestRecord.objects.bulk_create(rows)
    seconds = list(make_batches(430, end=now + timedelta(seconds=130), replicas=1))
    for second in seconds:
        second.max_batch_size, second.batch_size_mean, second.step_ms_mean = 16, 4, 300.0
        second.throttle_reasons = ["thermal"]
    BatchRecord.objects.bulk_create(seconds)
    roll_up(60)
    fill(fleet, 105)
    hung = Telemetry(source="nvml", device="H100", stale_s=99.0, throttle_reasons=["thermal"])
    fleet.publish(fleet.status(telemetry=hung))
    for _ in range(13):
        fleet.publish(fleet.status(telemetry=hung))
        watch(clock)
        clock.tick(10)
    fired = dict(Alert.objects.filter(state="firing").values_list("rule_name", "subject"))
    assert fired == {
        "Batches run half empty": "",
        "Long queue": "",
        "Slow steps": "",
        "Requests fail": "",
        "SLA budget burns fast": "acme",
        "SLA budget burns": "acme",
        "SLA budget leaks": "acme",
        "No telemetry": "gpu-0",
        "Device throttled": "gpu-0",
    }


def test_a_power_cap_is_no_throttling_and_a_worker_that_fell_silent_is_told_until_it_is_forgotten(
    fleet: FleetWriter, clock: SteppedClock
) -> None:
    make_rule(name="Throttled", kind="throttling", threshold=20, window_s=60, hold_s=0)
    make_rule(name="Silent", kind="telemetry", threshold=30, hold_s=0, clear_s=0)
    rows = list(make_batches(30, end=clock(), replicas=1))
    for row in rows:
        row.throttle_reasons = ["power cap"]
    BatchRecord.objects.bulk_create(rows)
    Replica.objects.create(name="gpu-7", model="demo", state="lost", last_seen_at=clock() - timedelta(minutes=2))
    Replica.objects.create(name="gpu-8", model="demo", state="stopped", last_seen_at=clock() - timedelta(minutes=2))
    watch(clock)
    assert Alert.objects.get().subject == "gpu-7"
    assert "The worker fell silent" in Alert.objects.get().reason
    clock.tick(3600)
    watch(clock)
    assert Alert.objects.get().state == "resolved"


def test_a_worker_that_forwards_to_another_server_owes_no_telemetry(fleet: FleetWriter, clock: SteppedClock) -> None:
    make_rule(name="Silent", kind="telemetry", threshold=30, hold_s=0)
    status = msgspec.structs.replace(fleet.status(), telemetry=None, started_s=clock.now.timestamp() - 99)
    fleet.publish(status)
    spec = DeploymentSpec(name="demo", path="", backend="openai", upstream_url="http://127.0.0.1:1/v1")
    fleet.client.hset(fleet.keys.deployments, "demo", msgspec.json.encode(spec))
    assert watch(clock) == 0
    fleet.deploy()
    assert watch(clock) == 1
    assert "told nothing of its device" in Alert.objects.get().reason


def test_old_alerts_go_with_their_notices_and_open_ones_stay(fleet: FleetWriter, clock: SteppedClock) -> None:
    alert = fire(fleet, clock)
    clock.tick(86_400 * 10)
    assert prune_alerts(days=5, now=clock()) == 0
    AlertRule.objects.all().delete()
    watch(clock)
    clock.tick(86_400 * 10)
    assert prune_alerts(days=5, now=clock()) == 1
    assert not Notice.objects.filter(alert_id=alert.pk).exists()


# From an alert to a receiver


def test_a_notice_arrives_signed_and_the_receiver_can_check_it(
    fleet: FleetWriter, clock: SteppedClock, channel: AlertChannel, receiver: Receiver
) -> None:
    alert = fire(fleet, clock)
    assert deliver_channel(channel.pk, clock) == 1
    ((headers, body),) = receiver.posts
    told = json.loads(body)
    assert (told["event"], told["alert"]["id"], told["alert"]["value"]) == ("firing", alert.pk, 5)
    assert told["text"] == alert.reason
    assert told["link"].endswith("/alerts/")
    assert headers["penstock-notice"] == told["id"] == str(Notice.objects.get().pk)
    assert (headers["path"], headers["content-type"]) == ("/hook?team=7", "application/json")
    time_s, digest = (part.split("=")[1] for part in headers["penstock-signature"].split(","))
    assert digest == hmac.new(b"hush", f"{time_s}.".encode() + body, hashlib.sha256).hexdigest()
    assert int(time_s) == int(clock.now.timestamp())
    assert deliver_channel(channel.pk, clock) == 0
    delivery = Delivery.objects.get()
    assert (delivery.state, delivery.attempts, delivery.delivered_at) == ("delivered", 1, clock.now)


def test_without_a_secret_nothing_is_signed(
    fleet: FleetWriter, clock: SteppedClock, channel: AlertChannel, receiver: Receiver
) -> None:
    AlertChannel.objects.update(secret="")
    fire(fleet, clock)
    deliver_channel(channel.pk, clock)
    assert "penstock-signature" not in receiver.posts[0][0]


def test_a_receiver_that_fails_is_tried_again_with_growing_pauses_under_the_same_id(
    fleet: FleetWriter, clock: SteppedClock, channel: AlertChannel, receiver: Receiver
) -> None:
    receiver.statuses = [500, 307, 404]
    fire(fleet, clock)
    for pause, said in ((5, "status 500"), (10, "redirect (307), which is not followed"), (20, "status 404")):
        assert deliver_channel(channel.pk, clock) == 0
        waiting = Delivery.objects.get()
        assert (waiting.state, waiting.next_try_at) == ("waiting", clock.now + timedelta(seconds=pause))
        assert said in waiting.error
        clock.tick(pause - 1)
        assert due_channels(clock.now) == []
        clock.tick(1)
    assert deliver_channel(channel.pk, clock) == 1
    assert [post[0]["penstock-attempt"] for post in receiver.posts] == ["1", "2", "3", "4"]
    assert len({body for _, body in receiver.posts}) == 1


def test_a_notice_is_given_up_after_a_day_said_and_can_be_sent_again(
    fleet: FleetWriter, clock: SteppedClock, channel: AlertChannel, receiver: Receiver
) -> None:
    receiver.statuses = [503]
    fire(fleet, clock)
    clock.tick(GIVE_UP_AFTER.total_seconds())
    deliver_channel(channel.pk, clock)
    assert Delivery.objects.get().state == "given up"
    assert due_channels(clock.now + GIVE_UP_AFTER) == []
    send_again(Delivery.objects.get())
    assert deliver_channel(channel.pk, clock) == 1


def test_a_receiver_that_comes_back_hears_first_that_an_alert_fired_and_then_that_it_resolved(
    fleet: FleetWriter, clock: SteppedClock, channel: AlertChannel, receiver: Receiver
) -> None:
    receiver.statuses = [503]
    fire(fleet, clock)
    deliver_channel(channel.pk, clock)
    AlertRule.objects.all().delete()
    watch(clock)
    assert (due_channels(clock.now), deliver_channel(channel.pk, clock)) == ([], 0)
    clock.tick(5)
    assert deliver_channel(channel.pk, clock) == 2
    assert [notice["event"] for notice in receiver.notices] == ["firing", "firing", "resolved"]


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_a_webhook_by_https_is_called_where_its_certificate_can_be_checked(
    fleet: FleetWriter,
    clock: SteppedClock,
    channel: AlertChannel,
    receiver: Receiver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    certificate = make_certificate(tmp_path, "hook")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, tmp_path / "hook.key")
    receiver.server.socket = context.wrap_socket(receiver.server.socket, server_side=True)
    AlertChannel.objects.update(url=receiver.url.replace("http:", "https:"))
    fire(fleet, clock)
    assert deliver_channel(channel.pk, clock) == 0
    assert "SSLCertVerificationError" in Delivery.objects.get().error
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    clock.tick(5)
    assert deliver_channel(channel.pk, clock) == 1
    assert [notice["event"] for notice in receiver.notices] == ["firing"]


def test_what_a_process_had_in_its_hand_when_it_died_is_sent_again_by_the_next(
    fleet: FleetWriter,
    clock: SteppedClock,
    channel: AlertChannel,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fire(fleet, clock)
    send: Callable[..., None] = courier.send

    def die(*args: Any) -> None:
        send(*args)
        raise SystemExit  # killed between the receiver's answer and its own note of it

    with monkeypatch.context() as patch:
        patch.setattr(courier, "send", die)
        with pytest.raises(SystemExit):
            deliver_channel(channel.pk, clock)
    assert due_channels(clock.now) == []
    clock.tick(courier.LEASE_S)
    assert due_channels(clock.now) == [channel.pk]
    assert deliver_channel(channel.pk, clock) == 1
    first, second = receiver.notices
    assert first == second


def test_a_channel_gets_what_is_grave_enough_for_it_and_none_while_it_is_off(
    fleet: FleetWriter, clock: SteppedClock, channel: AlertChannel
) -> None:
    AlertChannel.objects.create(name="only the worst", url=channel.url, min_severity="critical")
    AlertChannel.objects.create(name="off", url=channel.url, enabled=False)
    fire(fleet, clock)
    assert [delivery.channel.name for delivery in Delivery.objects.all()] == ["pager"]
    AlertChannel.objects.filter(pk=channel.pk).update(enabled=False)
    assert (due_channels(clock.now), deliver_channel(channel.pk, clock)) == ([], 0)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/", "http://localhost:9/", "http://[::1]:9/", "http://0.0.0.0:9/"])
def test_a_webhook_does_not_reach_into_the_network_that_it_is_called_from(
    fleet: FleetWriter, clock: SteppedClock, url: str
) -> None:
    inside = AlertChannel.objects.create(name="inside", url=url)
    inside.full_clean()
    fire(fleet, clock)
    assert deliver_channel(inside.pk, clock) == 0
    assert "no public address. Name its network in PENSTOCK_WEBHOOK_NETWORKS" in Delivery.objects.get().error


def test_a_receiver_that_does_not_answer_and_one_that_is_not_there_are_said(
    fleet: FleetWriter, clock: SteppedClock, channel: AlertChannel, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver.gate.clear()
    fire(fleet, clock)
    with monkeypatch.context() as patch:
        patch.setattr("dashboard.alerts.webhook.TIMEOUT_S", 0.2)
        assert deliver_channel(channel.pk, clock) == 0
    assert "did not take it in time" in Delivery.objects.get().error
    receiver.gate.set()
    AlertChannel.objects.filter(pk=channel.pk).update(url="http://127.0.0.1:1/")
    clock.tick(5)
    deliver_channel(channel.pk, clock)
    assert "127.0.0.1 did not take it (ConnectionRefusedError)" in Delivery.objects.get().error


def test_a_receiver_whose_answer_drips_is_cut_off(
    fleet: FleetWriter, clock: SteppedClock, channel: AlertChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dashboard.alerts.webhook.TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            pace = threading.Event()
            connection, _ = server.accept()
            with connection, suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                for _ in range(400):
                    connection.sendall(b"z")
                    pace.wait(0.05)

        dripping = threading.Thread(target=drip)
        dripping.start()
        AlertChannel.objects.update(url=f"http://127.0.0.1:{server.getsockname()[1]}/")
        fire(fleet, clock)
        assert deliver_channel(channel.pk, clock) == 0
        dripping.join(PATIENCE_S)
    assert "did not take it in time" in Delivery.objects.get().error


@pytest.mark.django_db(transaction=True)
def test_a_slow_receiver_holds_up_neither_the_next_look_nor_another_channel(
    fleet: FleetWriter, clock: SteppedClock, channel: AlertChannel, receiver: Receiver
) -> None:
    swift = Receiver()
    AlertChannel.objects.create(name="swift", url=swift.url)
    receiver.gate.clear()
    fire(fleet, clock)
    by_threads = Courier()
    by_threads.wake()
    tick = threading.Event()
    for _ in range(int(PATIENCE_S / 0.05)):
        if swift.posts:
            break
        tick.wait(0.05)
    assert [notice["event"] for notice in swift.notices] == ["firing"]
    assert receiver.posts == []
    AlertRule.objects.all().delete()
    assert watch(clock) == 1
    receiver.gate.set()
    by_threads.join(PATIENCE_S)
    by_threads.wake()
    by_threads.join(PATIENCE_S)
    assert [notice["event"] for notice in receiver.notices] == ["firing", "resolved"]
    assert set(Delivery.objects.values_list("state", flat=True)) == {"delivered"}
    swift.stop()


def test_an_e_mail_says_what_is_wrong_and_its_id_tells_doubles_apart(
    fleet: FleetWriter, clock: SteppedClock, settings: Settings, mailoutbox: list[EmailMessage]
) -> None:
    by_mail = AlertChannel(name="mail", kind="email", recipients="ops@example.org,\nboss@example.org")
    with pytest.raises(ValidationError, match="PENSTOCK_EMAIL_HOST"):
        by_mail.full_clean()
    settings.EMAIL_HOST = "mail.example.org"
    by_mail.full_clean()
    by_mail.save()
    alert = fire(fleet, clock)
    assert deliver_channel(by_mail.pk, clock) == 1
    (mail,) = mailoutbox
    assert mail.to == ["ops@example.org", "boss@example.org"]
    assert mail.subject == "[Penstock] firing: Long queue, demo (warning)"
    assert alert.reason in mail.body
    assert "Value: 5 requests, threshold 3" in mail.body
    assert mail.extra_headers["Message-ID"] == f"<{Notice.objects.get().pk}@penstock>"


def test_a_mail_server_that_is_gone_is_tried_again(fleet: FleetWriter, clock: SteppedClock, settings: Settings) -> None:
    settings.EMAIL_BACKEND = "django.core.mail.backends.smtp.EmailBackend"
    settings.EMAIL_HOST, settings.EMAIL_PORT = "127.0.0.1", 1
    by_mail = AlertChannel.objects.create(name="mail", kind="email", recipients="ops@example.org")
    fire(fleet, clock)
    assert deliver_channel(by_mail.pk, clock) == 0
    assert "mail server did not take it (ConnectionRefusedError)" in Delivery.objects.get().error
