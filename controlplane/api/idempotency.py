"""The header `Idempotency-Key`: what counts as the same request."""

import msgspec

from controlplane.api.openai.body import ChatBody, CompletionBody
from inference.gateway.idempotency import IdempotencyKey, read_key


def read_idempotency_key(header: bytes, face: str, body: CompletionBody | ChatBody) -> IdempotencyKey:
    """The key with what the body asks for, however it is written, and streamed or whole. Raises InvalidRequest.

    `face` keeps addresses apart that take the same body.
    """
    return read_key(header, face, msgspec.structs.replace(body, stream=None, stream_options=None))
