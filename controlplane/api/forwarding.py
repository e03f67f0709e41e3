"""What a request for an upstream server's model is made of: its messages or prompt as they came, and how long it is."""

from typing import Any

import msgspec

from controlplane.api.openai.body import ChatBody, CompletionBody
from inference.gateway.errors import InvalidRequest
from inference.gateway.served import ServedModel
from scheduling.core.sequence import SamplingParams

BYTES_PER_TOKEN = 4
"""Of English text in common vocabularies, about; the upstream's own count corrects the guess."""
MESSAGE_TOKENS = 4
"""What a chat template adds to each message, about."""
NOT_FORWARDED = frozenset(
    {
        "model", "max_tokens", "max_completion_tokens", "seed", "stream", "stream_options", "n", "best_of",
        "user", "priority", "deadline_ms", "logprobs", "top_logprobs",
    }
)  # fmt: skip
"""Fields that the worker sets itself, or that concern nobody but this gateway."""


def forward_body(body: CompletionBody | ChatBody, sampling: SamplingParams) -> bytes:
    """The JSON object that the upstream is sent, without what the worker adds to it.

    Raises InvalidRequest for log probabilities: they are kept by token ids, which an upstream does not give.
    """
    if sampling.logprobs is not None:
        raise InvalidRequest(
            f"The model '{body.model}' is served by another server, through which there are no log probabilities.",
            param="logprobs",
            code="unsupported_parameter",
        )
    return msgspec.json.encode({name: value for name, value in _given(body).items() if name not in NOT_FORWARDED})


def count_prompt(body: CompletionBody | ChatBody, prompt: str | list[int], model: ServedModel) -> int:
    """Tokens of a prompt (of a chat: `prompt` is its text), exact where the model's tokenizer is at hand."""
    if not isinstance(prompt, str):
        return len(prompt)
    num_messages = len(body.messages) if isinstance(body, ChatBody) else 0
    if model.tokenizer is not None:
        num = len(model.tokenizer.encode(prompt, add_special_tokens=not num_messages))
    else:
        num = -(-len(prompt.encode("utf-8", "replace")) // BYTES_PER_TOKEN)
    return num + MESSAGE_TOKENS * num_messages


def _given(value: Any) -> Any:
    """A body's fields without those that are null, all the way down: servers differ in what they take null for."""
    if isinstance(value, msgspec.Struct):
        pairs = ((name, getattr(value, name)) for name in value.__struct_fields__)
        return {name: _given(item) for name, item in pairs if item is not None}
    if isinstance(value, list):
        return [_given(item) for item in value]
    return value
