"""Log records: JSON with the request's id, lines for people, and one sentence where beat has many tracebacks."""

import json
import logging

import pytest
import redis
from kombu.exceptions import OperationalError

from inference.logs import JsonFormatter, LineFormatter, OutageFilter, current_request


def make_record(message: str, *args: object, error: BaseException | None = None, **extra: object) -> logging.LogRecord:
    info = None if error is None else (type(error), error, error.__traceback__)
    record = logging.LogRecord("penstock.test", logging.ERROR, __file__, 1, message, args, info)
    record.__dict__.update(extra)
    return record


def outage() -> BaseException:
    """As beat sees it: kombu's error around redis-py's around the socket's."""
    try:
        try:
            try:
                raise ConnectionRefusedError(111, "Connection refused")
            except OSError as refused:
                raise redis.ConnectionError("Error 111 connecting") from refused
        except redis.ConnectionError as lost:
            raise OperationalError("Couldn't apply scheduled task sweep") from lost
    except OperationalError as error:
        return error


def test_a_json_line_has_the_request_what_the_caller_adds_and_the_traceback() -> None:
    token = current_request.set("req_7")
    try:
        line = JsonFormatter("penstock-web").format(
            make_record("%d\nlines", 2, error=ValueError("bad"), tenant="acme", path={1})
        )
    finally:
        current_request.reset(token)
    fields = json.loads(line)
    assert "\n" not in line
    assert (fields["message"], fields["level"], fields["logger"]) == ("2\nlines", "ERROR", "penstock.test")
    assert (fields["request_id"], fields["service"], fields["tenant"]) == ("req_7", "penstock-web", "acme")
    assert "ValueError: bad" in fields["exception"]
    assert "request_id" not in json.loads(JsonFormatter().format(make_record("x")))


def test_a_line_ends_with_the_request_it_is_about() -> None:
    token = current_request.set("req_7")
    try:
        assert LineFormatter().format(make_record("late")).endswith("ERROR penstock.test: late [req_7]")
    finally:
        current_request.reset(token)
    assert LineFormatter().format(make_record("late")).endswith("late")


def test_an_outage_of_redis_is_one_sentence_for_all_tasks() -> None:
    told = OutageFilter("Periodic tasks wait")
    first = make_record("Message Error: %s\n%s", "x", ["stack"], error=outage())
    assert told.filter(first)
    text = LineFormatter().format(first)
    assert text.endswith("Periodic tasks wait, since Redis does not answer: [Errno 111] Connection refused")
    assert "\n" not in text
    assert not told.filter(make_record("Message Error: %s\n%s", "y", ["stack"], error=outage()))


@pytest.mark.parametrize("error", [None, ValueError("a bug")])
def test_what_is_no_outage_keeps_its_traceback(error: BaseException | None) -> None:
    record = make_record("odd", error=error)
    assert OutageFilter("Periodic tasks wait").filter(record) is True
    assert bool(record.exc_info) is (error is not None)
