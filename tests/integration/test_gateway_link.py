"""A web process's connection to Redis: replies belong to their calls, whatever happened to the calls before."""

import asyncio

import pytest
import redis.asyncio

from inference.gateway.link import Link


async def test_replies_come_in_order_and_as_the_client_gives_them(astore: redis.asyncio.Redis) -> None:
    words = [("SET", "a", "-c-"), ("APPEND", "a", "ä".encode()), ("LPUSH", "a", 1), ("GET", "a"), ("TIME",)]
    link = Link(astore)
    done, length, refused, text, time = await link.run(words)
    assert (done, length, text) == (True, 5, "-c-ä".encode())
    assert isinstance(refused, redis.ResponseError)
    assert isinstance(time, tuple)  # which the server does not know


async def test_every_kind_of_word_is_sent_as_the_client_sends_it(astore: redis.asyncio.Redis) -> None:
    words = ("RPUSH", "ours", "text", "ä", b"\x00\xff", 7, 0.1 + 0.2, -1e22)
    await Link(astore).run([words])
    await astore.rpush("theirs", *words[2:])
    assert await astore.lrange("ours", 0, -1) == await astore.lrange("theirs", 0, -1)


async def test_who_gives_up_leaves_no_reply_to_the_next_call(astore: redis.asyncio.Redis) -> None:
    link = Link(astore)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await link.run([("ECHO", "old"), ("BLPOP", "nothing", 0), ("ECHO", "old")])
    assert await link.run([("ECHO", "new")]) == [b"new"]


async def test_a_connection_that_the_server_closed_is_opened_anew(astore: redis.asyncio.Redis) -> None:
    link = Link(astore)
    [own] = await link.run([("CLIENT", "ID")])
    assert await astore.client_kill_filter(_id=own) == 1
    while True:  # until word of it has come; then nobody notices
        try:
            [other] = await link.run([("CLIENT", "ID")])
            break
        except redis.ConnectionError:
            continue
    assert other != own
