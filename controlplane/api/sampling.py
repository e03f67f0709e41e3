"""How a request's body wants its tokens chosen, and how many answers it wants."""

import secrets
from dataclasses import replace

from controlplane.api.openai.body import ChatBody, CompletionBody, Sampling
from inference.gateway.admission import Draft
from inference.gateway.errors import InvalidRequest
from scheduling.core.sequence import SamplingParams


def read_sampling(body: Sampling, *, vocab_size: int, max_tokens: int) -> SamplingParams:
    """Raises InvalidRequest that names the option."""
    bias = tuple(sorted((body.logit_bias or {}).items()))
    for token_id, _ in bias:
        _check_token(token_id, f"logit_bias.{token_id}", vocab_size)
    for i, token_id in enumerate(body.stop_token_ids or ()):
        _check_token(token_id, f"stop_token_ids[{i}]", vocab_size)
    if (body.min_tokens or 0) > max_tokens:
        raise InvalidRequest(f"min_tokens is more than the {max_tokens} tokens of the answer.", param="min_tokens")
    return SamplingParams(
        temperature=_given(body.temperature, 1.0),
        top_p=_given(body.top_p, 1.0),
        seed=secrets.randbits(63) if body.seed is None else body.seed % 2**63,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        ignore_eos=bool(body.ignore_eos),
        top_k=max(0, body.top_k or 0),
        min_p=_given(body.min_p, 0.0),
        repetition_penalty=_given(body.repetition_penalty, 1.0),
        presence_penalty=_given(body.presence_penalty, 0.0),
        frequency_penalty=_given(body.frequency_penalty, 0.0),
        logit_bias=bias,
        min_tokens=body.min_tokens or 0,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        logprobs=_count_logprobs(body),
    )


def split_choices(draft: Draft, body: Sampling) -> list[Draft]:
    """A draft for each of the `n` answers, each with its own seed. Raises InvalidRequest for a `best_of` beside `n`."""
    _check_best_of(body)
    num = body.n or 1
    others = [
        replace(draft, id=f"{draft.id}-{i}", sampling=replace(draft.sampling, seed=(draft.sampling.seed + i) % 2**63))
        for i in range(1, num)
    ]
    return [draft, *others]


def refuse_what_polling_lacks(body: Sampling) -> None:
    """Raise InvalidRequest for options whose answer a submitted request cannot show."""
    _check_best_of(body)
    for name, asked in (("n", (body.n or 1) > 1), ("logprobs", _count_logprobs(body) is not None)):
        if asked:
            raise InvalidRequest(
                f"A submitted request has no {name}; use /v1.", param=name, code="unsupported_parameter"
            )


def _check_best_of(body: Sampling) -> None:
    if body.best_of not in (None, body.n or 1):
        raise InvalidRequest(
            "The option best_of is not supported; n answers are all returned.",
            param="best_of",
            code="unsupported_parameter",
        )


def _given(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _check_token(token_id: int, param: str, vocab_size: int) -> None:
    if token_id >= vocab_size:
        raise InvalidRequest(f"Token ids must be from 0 to {vocab_size - 1} (at {param}).", param=param)


def _count_logprobs(body: Sampling) -> int | None:
    """How many likely tokens to report beside each token; None for no log probabilities at all."""
    if isinstance(body, CompletionBody):
        if body.logprobs is True:
            raise InvalidRequest("logprobs is a number here: of likely tokens beside each token.", param="logprobs")
        return None if body.logprobs is False else body.logprobs
    assert isinstance(body, ChatBody)
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidRequest("top_logprobs is only allowed with logprobs.", param="top_logprobs")
    return None
