"""From a validated body to a draft for admission: prompt to tokens, defaults, seed, priority, deadline."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from controlplane.api.caller import Caller
from controlplane.api.forwarding import count_prompt, forward_body
from controlplane.api.openai.body import ChatBody, CompletionBody, Message, Sampling
from controlplane.api.sampling import read_sampling
from inference.gateway.admission import Draft
from inference.gateway.errors import ContextLengthExceeded, InvalidRequest
from inference.gateway.served import ServedModel
from inference.tokenization import ChatTemplateFailed, ChatTemplateMissing, Tokenizer

T = TypeVar("T")
DEFAULT_COMPLETION_TOKENS = 16
"""`max_tokens` of `/v1/completions` where absent, as OpenAI has it."""
DEFAULT_CHAT_TOKENS = 512
"""The same of chat, or the rest of the context where that is less."""
INLINE_CHARACTERS = 8192
"""Longer prompts are tokenized in a thread, so that they do not hold up other clients' tokens."""
MESSAGE_CHARACTERS = 32
"""What a chat template adds to each message, about: a hundred thousand empty ones are long too."""
SMALL_SEED = 2**31
"""Seeds that nobody asked for are below this where they are forwarded: some servers read no larger ones."""
ROLES = {"developer": "system"}
"""Newer names of roles that chat templates know by the older one."""


async def draft_completion(body: CompletionBody, caller: Caller, model: ServedModel, draft_id: str) -> Draft:
    """Raises InvalidRequest, ContextLengthExceeded or Forbidden."""
    priority = caller.choose_priority(body.priority)
    prompt = _single_prompt(body.prompt)
    if model.spec.is_upstream:
        return await _draft_forwarded(body, caller, model, draft_id, prompt, body.max_tokens, priority)
    tokenizer = _tokenizer_of(model)
    if isinstance(prompt, str):
        token_ids = await _tokenize(len(prompt), lambda: tokenizer.encode(prompt), "prompt")
    else:
        token_ids = prompt
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < model.vocab_size:
            raise InvalidRequest(f"Token ids must be from 0 to {model.vocab_size - 1}.", param="prompt")
    max_tokens = body.max_tokens or _rest(model, len(token_ids), DEFAULT_COMPLETION_TOKENS)
    return _draft(body, caller, model, draft_id, "completions", len(token_ids), max_tokens, priority, token_ids)


async def draft_chat(body: ChatBody, caller: Caller, model: ServedModel, draft_id: str) -> Draft:
    """Raises InvalidRequest, ContextLengthExceeded or Forbidden."""
    priority = caller.choose_priority(body.priority)
    asked = body.max_completion_tokens or body.max_tokens
    if body.max_tokens is not None and asked != body.max_tokens:
        raise InvalidRequest("max_tokens and max_completion_tokens differ; give one.", param="max_tokens")
    messages = [_plain_message(message, i) for i, message in enumerate(body.messages)]
    if model.spec.is_upstream:
        text = "\n".join(message["content"] for message in messages)
        return await _draft_forwarded(body, caller, model, draft_id, text, asked, priority)
    tokenizer = _tokenizer_of(model)
    size = sum(len(message["content"]) + MESSAGE_CHARACTERS for message in messages)
    token_ids = await _tokenize(size, lambda: tokenizer.render_chat(messages), "messages")
    max_tokens = asked or _rest(model, len(token_ids), DEFAULT_CHAT_TOKENS)
    return _draft(body, caller, model, draft_id, "chat.completions", len(token_ids), max_tokens, priority, token_ids)


async def _draft_forwarded(
    body: CompletionBody | ChatBody,
    caller: Caller,
    model: ServedModel,
    draft_id: str,
    prompt: str | list[int],
    asked: int | None,
    priority: int,
) -> Draft:
    """A request that an upstream server gets as it came; `prompt` is what its length is counted by."""
    num_prompt = await _tokenize(len(prompt), lambda: count_prompt(body, prompt, model), "prompt")
    endpoint, default = "completions", DEFAULT_COMPLETION_TOKENS
    if isinstance(body, ChatBody):
        endpoint, default = "chat.completions", DEFAULT_CHAT_TOKENS
    max_tokens = asked or _rest(model, num_prompt, default)
    draft = _draft(body, caller, model, draft_id, endpoint, num_prompt, max_tokens, priority)
    sampling = (
        draft.sampling if body.seed is not None else replace(draft.sampling, seed=draft.sampling.seed % SMALL_SEED)
    )
    return replace(draft, sampling=sampling, forwarded=forward_body(body, sampling), estimated_prompt_tokens=num_prompt)


def _tokenizer_of(model: ServedModel) -> Tokenizer:
    """Of a model that is computed here."""
    assert model.tokenizer is not None
    return model.tokenizer


def _draft(
    body: Sampling,
    caller: Caller,
    model: ServedModel,
    draft_id: str,
    endpoint: str,
    num_prompt: int,
    max_tokens: int,
    priority: int,
    token_ids: Sequence[int] = (),
) -> Draft:
    if not num_prompt:
        param = "messages" if endpoint == "chat.completions" else "prompt"
        raise InvalidRequest("The prompt is empty.", param=param, code="empty_prompt")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options is only allowed with stream.", param="stream_options")
    return Draft(
        id=draft_id,
        endpoint=endpoint,
        model=model,
        tenant=caller.tenant,
        prompt_token_ids=token_ids,
        max_tokens=max_tokens,
        sampling=read_sampling(body, vocab_size=model.vocab_size, max_tokens=max_tokens),
        priority=priority,
        deadline_s=_deadline_s(body.deadline_ms, caller.tenant.deadlines_s.get(priority)),
        user=body.user or "",
    )


def _deadline_s(asked_ms: float | None, target_s: float | None) -> float | None:
    """Unix time of the deadline that the request names, or else of its tenant's end-to-end target."""
    patience_s = target_s if asked_ms is None else asked_ms / 1000
    return None if patience_s is None else time.time() + patience_s


async def _tokenize(num_characters: int, tokenize: Callable[[], T], param: str) -> T:
    try:
        if num_characters > INLINE_CHARACTERS:
            return await asyncio.to_thread(tokenize)
        return tokenize()
    except ChatTemplateMissing as error:
        raise InvalidRequest(str(error), param="model", code="chat_template_missing") from error
    except ChatTemplateFailed as error:
        raise InvalidRequest(str(error), param=param) from error


def _rest(model: ServedModel, num_prompt: int, cap: int) -> int:
    """The default completion length: what the context leaves, at most `cap`."""
    rest = model.max_model_len - num_prompt
    if rest < 1:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {model.max_model_len} tokens; the prompt has {num_prompt}."
        )
    return min(cap, rest)


def _single_prompt(prompt: str | list[Any]) -> str | list[int]:
    """A text or token ids; a list may hold one of either. Raises InvalidRequest for several prompts."""
    if isinstance(prompt, str):
        return prompt
    if all(isinstance(item, int) for item in prompt):
        return prompt
    if len(prompt) == 1 and isinstance(prompt[0], str | list):
        return prompt[0]
    raise InvalidRequest(
        "Several prompts in one request are not supported; send a request for each.",
        param="prompt",
        code="unsupported_value",
    )


def _plain_message(message: Message, index: int) -> dict[str, Any]:
    content = message.content
    if content is None:
        if message.role != "assistant":
            raise InvalidRequest("content must be a string or text parts.", param=f"messages[{index}].content")
        content = ""
    text = content if isinstance(content, str) else "\n".join(part.text for part in content)
    plain: dict[str, Any] = {"role": ROLES.get(message.role, message.role), "content": text}
    if message.name:
        plain["name"] = message.name
    return plain
