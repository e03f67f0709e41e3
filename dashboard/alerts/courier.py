"""Delivers notices: each at least once, tried for a day with growing pauses, a slow receiver holding up nobody else."""

import json
import logging
import threading
from collections.abc import Callable
from datetime import datetime, timedelta

from django.conf import settings
from django.db import Error as DatabaseError
from django.db import connection
from django.db.models import Exists, F, OuterRef, QuerySet
from django.utils import timezone

from dashboard.alerts.mail import mail_notice
from dashboard.alerts.models import AlertChannel, Delivery
from dashboard.alerts.webhook import DeliveryError, post_notice, sign

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 900.0
GIVE_UP_AFTER = timedelta(hours=24)
LEASE_S = 60.0
"""How long a try may take before it is tried again: a process may die with a notice in its hand."""
Clock = Callable[[], datetime]
State = Delivery.State


class Courier:
    """A thread for each channel that has something to deliver; neither evaluation nor other channels wait for one."""

    def __init__(self) -> None:
        self._threads: dict[int, threading.Thread] = {}

    def wake(self) -> None:
        """See what is due; returns at once. Raises DatabaseError."""
        for channel_id in due_channels(timezone.now()):
            busy = self._threads.get(channel_id)
            if busy is None or not busy.is_alive():
                thread = threading.Thread(target=_run, args=(channel_id,), name=f"channel-{channel_id}", daemon=True)
                self._threads[channel_id] = thread
                thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait for the threads that run."""
        for thread in self._threads.values():
            thread.join(timeout_s)


def _run(channel_id: int) -> None:
    try:
        deliver_channel(channel_id)
    except (DatabaseError, OSError) as error:
        log.warning("Notices wait: %s", error)
    finally:
        connection.close()


def due_channels(now: datetime) -> list[int]:
    """Channels with a notice to deliver now."""
    return list(_due(now).order_by().values_list("channel_id", flat=True).distinct())


def _due(now: datetime) -> QuerySet[Delivery]:
    """What may be tried now. That an alert resolved waits until that it fired was told: else it would seem to fire."""
    earlier = Delivery.objects.filter(
        channel=OuterRef("channel"),
        notice__alert=OuterRef("notice__alert"),
        state=State.WAITING,
        id__lt=OuterRef("id"),
    )
    due = Delivery.objects.filter(state=State.WAITING, next_try_at__lte=now, channel__enabled=True)
    return due.filter(~Exists(earlier))


def deliver_channel(channel_id: int, clock: Clock = timezone.now) -> int:
    """Deliver what is due by one channel, oldest first, until nothing is or a try fails; how many were delivered.

    Raises DatabaseError: what was sent and not written down is sent again, under the same id.
    """
    num = 0
    while (delivery := _claim(channel_id, clock())) is not None:
        try:
            send(delivery, clock())
        except DeliveryError as error:
            _put_off(delivery, str(error), clock())
            return num
        Delivery.objects.filter(pk=delivery.pk).update(state=State.DELIVERED, delivered_at=clock(), error="")
        num += 1
    return num


def _claim(channel_id: int, now: datetime) -> Delivery | None:
    """The next delivery, leased: another process that looks meanwhile finds it later."""
    while True:
        due = _due(now).filter(channel_id=channel_id)
        found = due.select_related("notice", "channel").order_by("id").first()
        if found is None:
            return None
        mine = Delivery.objects.filter(pk=found.pk, state=State.WAITING, next_try_at=found.next_try_at)
        if mine.update(next_try_at=now + timedelta(seconds=LEASE_S), attempts=F("attempts") + 1):
            found.attempts += 1
            return found


def send(delivery: Delivery, now: datetime) -> None:
    """One try. Raises DeliveryError."""
    channel, payload = delivery.channel, delivery.notice.payload
    if channel.kind == AlertChannel.Kind.EMAIL:
        mail_notice(channel.addresses, payload)
        return
    body = json.dumps(payload).encode()
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "Penstock",
        "Penstock-Notice": str(delivery.notice_id),
        "Penstock-Attempt": str(delivery.attempts),
    }
    if channel.secret:
        headers["Penstock-Signature"] = sign(channel.secret, int(now.timestamp()), body)
    post_notice(channel.url, body, headers, settings.PENSTOCK.webhook_networks)


def pause_s(attempts: int) -> float:
    """Seconds until the next try, after so many that failed."""
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(attempts - 1, 20))


def _put_off(delivery: Delivery, error: str, now: datetime) -> None:
    next_try_at = now + timedelta(seconds=pause_s(delivery.attempts))
    over = next_try_at > delivery.notice.created_at + GIVE_UP_AFTER
    state = State.GIVEN_UP if over else State.WAITING
    Delivery.objects.filter(pk=delivery.pk).update(state=state, error=error[:300], next_try_at=next_try_at)
    log.warning(
        "Notice %s by %s, try %d: %s%s",
        delivery.notice_id,
        delivery.channel,
        delivery.attempts,
        error,
        " It is given up." if over else "",
    )
