"""What a reply missed, read from the request's record and journal in Redis."""

import asyncio

import msgspec

from inference.cancelling import finish_cancelled
from inference.gateway.pipeline import CommandPipeline
from inference.gateway.served import ServedModel
from inference.logprobs import read_logprobs
from inference.messages import Finish, InferenceRequest, SequenceUpdate
from scheduling.core.sequence import TokenLogprob


async def read_missing(
    pipeline: CommandPipeline, model: ServedModel, request: InferenceRequest
) -> SequenceUpdate | None:
    """Everything of the answer so far as one update from token 0; None where the record is gone.

    The journal is written before the reply stream, so it is never behind what the stream carried. It is read after the
    record, each in its turn: sent together, a record whose script Redis has forgotten would be read later, and tokens
    that came in between would look like lost ones. Raises RedisUnavailable.
    """
    record = await pipeline.send(model.queue.record(request.id))
    if record is None:
        return None
    journal = await pipeline.send(model.queue.tokens(request.id))
    if len(journal) < record.num_tokens:
        return None
    logprobs: list[TokenLogprob] = []
    if request.sampling.logprobs is not None:
        logprobs = await pipeline.send(read_logprobs(model.queue.keys, model.name, request.id))
        if len(logprobs) < len(journal):
            return None
    texts = await asyncio.to_thread(model.texts, request.sampling, journal)
    finish = msgspec.msgpack.decode(record.finish, type=Finish) if record.finish else None
    if finish is None and record.state == "cancelled":  # as it waited; whoever did it may not have come to say so
        finish = finish_cancelled(request, len(journal))
    return SequenceUpdate(request.id, record.attempt, 0, journal, texts, finish, logprobs[: len(journal)])
