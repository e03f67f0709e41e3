"""Request bodies of OpenAI's dialect: typed, bounded, and nothing unknown or unsupported ever ignored."""

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from inference.gateway.errors import InvalidRequest

MAX_STOPS = 4
MAX_DEADLINE_MS = 7 * 24 * 3600 * 1000

MAX_STOP_CHARACTERS = 256
"""Of one stop string: a token that may begin one is held back, so this bounds what is held back."""

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_BIASED_TOKENS = 1024
MAX_STOP_TOKENS = 64

Tokens = Annotated[int, Meta(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
NumLogprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
Stop = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a stream carries beside its text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters that both endpoints take. Null is the default everywhere."""

    model: Annotated[str, Meta(min_length=1, max_length=256)]
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    ignore_eos: bool | None = None
    user: Annotated[str, Meta(max_length=512)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | str | None = None
    deadline_ms: Annotated[float, Meta(gt=0, le=MAX_DEADLINE_MS)] | None = None
    """Milliseconds from now in which the answer should be complete; policies order by it."""
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    best_of: int | None = None
    """Nothing but `n` is supported."""
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Meta(max_length=MAX_BIASED_TOKENS)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    """This and what follows have vLLM's names and meaning; 0 and -1 are all tokens."""
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None


class CompletionBody(Sampling, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `/v1/completions`."""

    prompt: str | list[int | str | list[int]]
    logprobs: NumLogprobs | bool | None = None


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a message's content; only text is supported."""

    type: Literal["text"]
    text: str


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One message. What an answer carries as null may be sent back so."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    name: Annotated[str, Meta(max_length=256)] | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: None = None


class ChatBody(Sampling, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None


HARMLESS: dict[str, tuple[Any, ...]] = {
    "echo": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "store": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "suffix": ("",),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "prompt_cache_key": (),
    "safety_identifier": (),
}
"""Options that are not supported, each with the values (null besides) that ask for nothing and are accepted."""

T = TypeVar("T", CompletionBody, ChatBody)
_DECODERS: dict[type, Any] = {kind: msgspec.json.Decoder(kind) for kind in (CompletionBody, ChatBody)}
NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What the decoder raises for bytes that are no JSON: malformed, no UTF-8, nested too deep."""
_WHERE = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`")


def read_body(raw: bytes | bytearray, kind: type[T]) -> T:
    """Decode and validate a body. Raises InvalidRequest whose `param` names the culprit."""
    try:
        body: T = _DECODERS[kind].decode(raw)
    except msgspec.ValidationError:
        body = _read_closely(raw, kind)
    except NOT_JSON as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from error
    return body


def read_fields(raw: bytes | bytearray) -> dict[str, Any]:
    """A body's fields, not validated. Raises InvalidRequest where it is no JSON object."""
    try:
        fields = msgspec.json.decode(raw)
    except NOT_JSON as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise InvalidRequest("The body must be a JSON object.", code="invalid_type")
    return fields


def _read_closely(raw: bytes | bytearray, kind: type[T]) -> T:
    """Take out options that ask for nothing, and say what is wrong with the rest."""
    fields = read_fields(raw)
    known = kind.__struct_fields__
    for name in [name for name in fields if name not in known]:
        if name not in HARMLESS:
            raise InvalidRequest(
                f"Unrecognized request argument: {name[:100]}.", param=name[:100], code="unknown_parameter"
            )
        if not _asks_for_nothing(fields.pop(name), HARMLESS[name]):
            raise InvalidRequest(f"The option {name} is not supported.", param=name, code="unsupported_parameter")
    try:
        return msgspec.convert(fields, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error


def _asks_for_nothing(value: Any, harmless: tuple[Any, ...]) -> bool:
    # By type too: 0 equals False, but `logprobs: 0` asks for something.
    return value is None or any(type(value) is type(h) and value == h for h in harmless)


def _invalid(message: str) -> InvalidRequest:
    where = _WHERE.search(message)
    param = where.group(1) if where else None
    missing = re.search(r"missing required field `([^`]*)`", message)
    unknown = re.search(r"contains unknown field `([^`]*)`", message)
    if missing or unknown:
        name = (missing or unknown).group(1)  # type: ignore[union-attr]
        param = f"{param}.{name}" if param else name
    code = "missing_required_parameter" if missing else "unknown_parameter" if unknown else "invalid_value"
    sentence = _WHERE.sub("", message)
    return InvalidRequest(f"{sentence} (at {param})." if param else f"{sentence}.", param=param, code=code)
