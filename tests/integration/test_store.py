"""Commands in one round trip: the replies are those of the client, whatever became of the connection."""

import pytest
import redis

from scheduling.store import Command, Script, execute, execute_many


def test_replies_come_in_order_and_as_the_client_gives_them(store: redis.Redis) -> None:
    words = [
        ("SET", "a", "ä"),
        ("INCRBYFLOAT", "b", 0.1 + 0.2),
        ("GET", "a"),
        ("SADD", "c", b"\xff", 7),
        ("SMEMBERS", "c"),
    ]
    commands = [Command(word, lambda reply: reply) for word in words]
    assert execute_many(store, commands) == [True, 0.1 + 0.2, "ä".encode(), 2, {b"\xff", b"7"}]
    assert execute_many(store, []) == []


def test_an_error_is_raised_after_all_commands_were_tried(store: redis.Redis) -> None:
    commands = [Command(words, bytes) for words in (("SET", "a", "1"), ("LPUSH", "a", "x"), ("SET", "b", "2"))]
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        execute_many(store, commands)
    assert store.get("b") == b"2"


def test_a_script_that_the_server_does_not_know_is_loaded(store: redis.Redis) -> None:
    script = Script("return 7", store.script_load("return 7"))
    store.script_flush()
    assert execute_many(store, [Command((), int, script), Command(("PING",), bool)]) == [7, True]


def test_a_connection_that_the_server_closed_is_opened_anew(store: redis.Redis) -> None:
    number: Command[int] = Command(("CLIENT", "ID"), int)
    own = execute(store, number)
    assert store.client_kill_filter(_id=str(own), skipme=False) == 1
    assert execute_many(store, [number, number]) != [own, own]
