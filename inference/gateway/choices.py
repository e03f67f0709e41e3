"""Several answers to one request: let in together or not at all, and read as they come."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace

from inference.gateway.admission import Draft
from inference.gateway.gateway import Gateway
from inference.gateway.idempotency import IdempotencyKey
from inference.gateway.reply import Reply


async def submit_choices(gateway: Gateway, drafts: Sequence[Draft], key: IdempotencyKey | None) -> list[Reply]:
    """Let each answer's draft in; where one is refused all are withdrawn. Raises GatewayError, of the first refused.

    Each is a request of its own for queue and engine. The first one is charged for all of them, in one script: the
    tenant's limits let them all in, or none. An idempotency key stands for all of them too; the first one says whether
    it was used before, so that no other comes in under a key of another body. An answer that an earlier run under the
    key has given, while another one failed, is not charged again.
    """
    if len(drafts) == 1:
        return [await gateway.submit(drafts[0], key)]
    keys = [replace(key, digest=f"{key.digest}-{i}") if key and i else key for i in range(len(drafts))]
    first = replace(drafts[0], others=tuple(draft.id for draft in drafts[1:]))
    tasks: list[asyncio.Task[Reply]] = []
    try:
        for draft, key_of in zip((first, *drafts[1:]), keys, strict=True):
            tasks.append(asyncio.create_task(gateway.submit(draft, key_of)))
            if len(tasks) == 1:
                await tasks[0]
        replies = list(await asyncio.gather(*tasks))
        if replies[0].request.id == first.id:  # it was charged for all
            gateway.give_back(_not_entered(drafts, replies))
        return replies
    except BaseException:
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        entered = [outcome for outcome in outcomes if isinstance(outcome, Reply)]
        for reply in entered:
            reply.withdraw()
        gateway.give_back(_not_entered(drafts, entered))
        raise


def _not_entered(drafts: Sequence[Draft], replies: Sequence[Reply]) -> list[Draft]:
    """Drafts that became no request: refused, or an earlier one of the same key stands for them."""
    entered = {reply.request.id for reply in replies}
    return [draft for draft in drafts if draft.id not in entered]


async def read_choices(replies: Sequence[Reply]) -> AsyncGenerator[tuple[int, str, bool], None]:
    """Of each answer as it comes: its index, its text ("" as `Reply.read` gives it), and whether that was the last.

    Raises GatewayError where one ended without `finish`.
    """
    if len(replies) == 1:
        has_ended = False
        while not has_ended:
            text, has_ended = await _read(replies[0])
            yield 0, text, has_ended
        return
    reading = {asyncio.create_task(_read(reply)): i for i, reply in enumerate(replies)}
    try:
        while reading:
            done, _ = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                i = reading.pop(task)
                text, has_ended = task.result()
                if not has_ended:
                    reading[asyncio.create_task(_read(replies[i]))] = i
                yield i, text, has_ended
    finally:
        for task in reading:
            task.cancel()


async def _read(reply: Reply) -> tuple[str, bool]:
    """Text, and whether it is the last; looked at together, before more can arrive."""
    text = await reply.read()
    return text, reply.finish is not None


async def read_whole(replies: Sequence[Reply], check: Callable[[Reply], object]) -> list[str]:
    """The whole texts of all answers.

    Raises GatewayError as soon as one ended without `finish`, or what `check` raises of one that has ended: the others
    are not waited for then.
    """

    async def read(reply: Reply) -> str:
        text = await reply.read_all()
        check(reply)
        return text

    if len(replies) == 1:
        return [await read(replies[0])]
    return list(await asyncio.gather(*map(read, replies)))
