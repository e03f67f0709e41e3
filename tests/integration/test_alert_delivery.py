"""Notices of alerts from a row to a receiver: signed, at least once and in order, over failures and restarts."""

import hashlib
import hmac
import json
import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import redis
from django.contrib.auth.models import User
from django.core.exceptions import ValidationError
from django.core.mail import EmailMessage
from pytest_django.fixtures import Settings

from controlplane.config import Config
from dashboard.alerts import courier
from dashboard.alerts.courier import GIVE_UP_AFTER, Courier, deliver_channel, due_channels
from dashboard.alerts.models import AlertChannel, AlertRule, Delivery, Notice
from dashboard.alerts.services import send_again
from scheduling.keys import Keys
from scheduling.models import OperatorAction
from tests.fleet_data import FleetWriter
from tests.integration.alerting import PATIENCE_S, Receiver, SteppedClock, fire, watch
from tests.integration.test_redis_tls import make_certificate

pytestmark = pytest.mark.django_db


@pytest.fixture
def clock() -> SteppedClock:
    return SteppedClock()


@pytest.fixture
def fleet(store: redis.Redis, keys: Keys, installation: Config) -> FleetWriter:
    writer = FleetWriter(store, keys)
    writer.deploy()
    AlertRule.objects.all().delete()
    return writer


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.stop()


@pytest.fixture
def loopback(installation: Config, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Receivers of this machine may be called, and take as long as a starved machine needs."""
    values = settings.PENSTOCK.model_dump() | {"webhook_networks": [ip_network("127.0.0.0/8")]}
    settings.PENSTOCK = Config.model_construct(**values)
    monkeypatch.setattr("dashboard.alerts.webhook.TIMEOUT_S", PATIENCE_S)


@pytest.fixture
def channel(receiver: Receiver, loopback: None) -> AlertChannel:
    return AlertChannel.objects.create(name="pager", url=receiver.url, secret="hush")


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
    send_again(delivery=Delivery.objects.get(), actor=User.objects.create_user("ada"), reason="the receiver is back")
    retried = OperatorAction.objects.get(action="delivery.retry")
    assert (retried.before, retried.after) == ({"state": "given up"}, {"state": "waiting"})
    assert (retried.actor_name, retried.reason) == ("ada", "the receiver is back")
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
