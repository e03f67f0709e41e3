"""The historian: moves history from its stream in Redis into the database, each event exactly once."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import redis
from django.db import DataError, IntegrityError, transaction
from django.db.models import F
from django.utils import timezone
from redis.exceptions import ResponseError

from inference.messages import HistoryEvent
from inference.models import BatchRecord, HistoryCheckpoint, RequestRecord
from inference.records import UnusableEventError, make_row
from scheduling.keys import Keys

logger = logging.getLogger(__name__)

START = "0-0"
ROWS_PER_INSERT = 500
Row = RequestRecord | BatchRecord
Entry = tuple[bytes, dict[bytes, bytes]]


class _OvertakenError(Exception):
    """Another historian moved the checkpoint first; its rows are the ones that count."""


class Historian:
    """Reads the history stream from the id in the checkpoint row.

    Rows and checkpoint change in one transaction that begins by moving the checkpoint from the id that was read. So a
    historian that dies anywhere leaves either both or neither, and of two historians at once one rolls back. The stream
    is trimmed only after the commit, so that an outage of the database loses nothing.
    """

    def __init__(
        self,
        client: redis.Redis,
        keys: Keys,
        *,
        max_entries: int = 500,
        clock: Callable[[], float] = time.monotonic,
        observe: Callable[[HistoryEvent], None] | None = None,
    ) -> None:
        """`observe` gets every event that can be read; one that is read again after a failure twice."""
        self._observe = observe
        self._client = client
        self._stream = keys.history
        self._max_entries = max_entries
        self._clock = clock
        self._entries_decoder = msgspec.msgpack.Decoder(list[msgspec.Raw])
        self._event_decoder: msgspec.msgpack.Decoder[HistoryEvent] = msgspec.msgpack.Decoder(HistoryEvent)

    def drain(self, budget_s: float) -> int:
        """Write until the stream is empty or `budget_s` seconds are over; the number of events written."""
        end_s = self._clock() + budget_s
        num_written = self.run_once()
        num_all = num_written
        while num_written and self._clock() < end_s:
            num_written = self.run_once()
            num_all += num_written
        return num_all

    def run_once(self) -> int:
        """Write the next entries of the stream, at most `max_entries`; the number of events written.

        Raises the database's and Redis's own errors; then nothing has changed and the next call tries again.
        """
        checkpoint, _ = HistoryCheckpoint.objects.get_or_create(stream=self._stream)
        entries = self._read_after(checkpoint.last_id)
        if not entries:
            self._check_stream_went_back(checkpoint.last_id)
            return 0
        rows, num_malformed = self._decode(entries)
        last_id = entries[-1][0].decode()
        try:
            with transaction.atomic():
                self._move(checkpoint.last_id, last_id, num_events=len(rows), num_malformed=num_malformed)
                num_refused = self._insert(rows)
                if num_refused:
                    self._move(last_id, last_id, num_events=-num_refused, num_malformed=num_refused)
        except _OvertakenError:
            return 0
        self._client.xtrim(self._stream, minid=last_id, approximate=False)
        return len(rows) - num_refused

    def _read_after(self, last_id: str) -> list[Entry]:
        entries: list[Entry] = self._client.xrange(self._stream, min=f"({last_id}", count=self._max_entries)  # type: ignore[assignment]
        return entries

    def _decode(self, entries: Sequence[Entry]) -> tuple[list[Row], int]:
        """Rows, and how many entries or events were skipped because nothing can be made of them."""
        rows: list[Row] = []
        num_malformed = 0
        for entry_id, fields in entries:
            try:
                raws = self._entries_decoder.decode(fields[b"m"])
            except (KeyError, TypeError, msgspec.MsgspecError) as error:
                num_malformed += 1
                self._skip(entry_id, error)
                continue
            for raw in raws:
                try:
                    event = self._event_decoder.decode(raw)
                    rows.append(make_row(event))
                    if self._observe is not None:
                        self._observe(event)
                except (msgspec.MsgspecError, UnusableEventError) as error:
                    num_malformed += 1
                    self._skip(entry_id, error)
        return rows, num_malformed

    def _skip(self, entry_id: bytes, error: Exception) -> None:
        logger.warning("History entry %s cannot be read and is skipped: %s", entry_id.decode(), error)

    def _move(self, before: str, after: str, **counts: int) -> None:
        """Take the checkpoint from `before` to `after`, which locks its row until the transaction ends."""
        mine = HistoryCheckpoint.objects.filter(stream=self._stream, last_id=before)
        sums: dict[str, Any] = {name: F(name) + count for name, count in counts.items()}
        if not mine.update(last_id=after, updated_at=timezone.now(), **sums):
            raise _OvertakenError

    def _insert(self, rows: Sequence[Row]) -> int:
        """Insert; the number of rows that the database refused. A row that is there already stays as it is.

        The unique constraints catch what a producer sent twice because the answer to its first try was lost.
        """
        num_refused = 0
        for model in (RequestRecord, BatchRecord):
            of_model: list[Any] = [row for row in rows if isinstance(row, model)]
            for start in range(0, len(of_model), ROWS_PER_INSERT):
                num_refused += self._insert_many(model, of_model[start : start + ROWS_PER_INSERT])
        return num_refused

    def _insert_many(self, model: type[Any], rows: list[Any]) -> int:
        try:
            with transaction.atomic():
                model.objects.bulk_create(rows, ignore_conflicts=True)
        except (DataError, IntegrityError) as error:
            if len(rows) == 1:
                logger.warning("A history row is refused by the database and skipped: %s", error)
                return 1
            middle = len(rows) // 2
            return self._insert_many(model, rows[:middle]) + self._insert_many(model, rows[middle:])
        return 0

    def _check_stream_went_back(self, last_id: str) -> None:
        """Start over where the stream's ids are behind the checkpoint: Redis lost its data and its clock is behind."""
        try:
            newest = self._client.xinfo_stream(self._stream)["last-generated-id"]
        except ResponseError:
            return  # no such stream yet
        if _parse(newest.decode()) < _parse(last_id):
            logger.warning("The history stream went back from %s to %s; reading it from its start.", last_id, newest)
            HistoryCheckpoint.objects.filter(stream=self._stream, last_id=last_id).update(last_id=START)


def _parse(entry_id: str) -> tuple[int, int]:
    milliseconds, _, sequence = entry_id.partition("-")
    return int(milliseconds), int(sequence or 0)
