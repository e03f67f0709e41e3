"""The ASGI application of `/v1`: routes, authentication, and answers whole or streamed."""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace

import msgspec

from controlplane.api.caller import Caller, find_caller
from controlplane.api.drafting import draft_chat, draft_completion
from controlplane.api.errors import error_body, limit_headers
from controlplane.api.idempotency import read_idempotency_key
from controlplane.api.openai.body import ChatBody, CompletionBody, read_body
from controlplane.api.openai.exchange import Exchange, Receive, Scope, Send
from controlplane.api.openai.logprobs import TokenTrail
from controlplane.api.openai.render import (
    SIGN_OF_LIFE,
    ChatRendering,
    CompletionRendering,
    Heading,
    error_frame,
    render_end,
    render_whole,
)
from controlplane.api.sampling import split_choices
from inference.gateway.admission import Draft
from inference.gateway.choices import read_choices, read_whole, submit_choices
from inference.gateway.errors import (
    DeadlineExceeded,
    GatewayError,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    RequestEnded,
    Shed,
    ShuttingDown,
)
from inference.gateway.gateway import Gateway
from inference.gateway.reply import Reply
from inference.messages import DeploymentSpec, Finish

log = logging.getLogger(__name__)
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class OpenAIApp:
    """Answers `/v1/*`. The gateway comes with the scope's state, where the lifespan puts it."""

    def __init__(self, max_body_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._routes: dict[str, tuple[str, Callable[[Exchange, Gateway, Caller], Awaitable[None]]]] = {
            "/v1/models": ("GET", self._list_models),
            "/v1/completions": ("POST", self._complete),
            "/v1/chat/completions": ("POST", self._chat),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; every outcome has a body and a request id."""
        exchange = Exchange(scope, receive, send, uuid.uuid4().hex)
        try:
            await self._dispatch(exchange)
        except GatewayError as error:
            await exchange.refuse(error, [(b"allow", error.allowed.encode())] if isinstance(error, WrongMethod) else [])
        except Exception:
            log.exception("Request %s failed", exchange.id.decode())
            if exchange.started:
                raise
            await exchange.refuse(GatewayError("The server failed on this request."))

    async def _dispatch(self, exchange: Exchange) -> None:
        path: str = exchange.scope["path"].rstrip("/")
        gateway: Gateway = exchange.scope["state"]["gateway"]
        method, handler = self._routes.get(path, ("", None))
        if handler is None and path.startswith("/v1/models/"):
            method, handler = "GET", self._show_model
        if handler is None:
            raise NotFound(f"There is no {path[:200]}.", code="unknown_url")
        if exchange.scope["method"] != method:
            raise WrongMethod(method, path)
        await handler(exchange, gateway, find_caller(exchange.authorization, gateway.directory))

    async def _list_models(self, exchange: Exchange, gateway: Gateway, caller: Caller) -> None:
        models = [_describe(spec) for spec in gateway.directory.deployments.values()]
        await exchange.respond(200, msgspec.json.encode({"object": "list", "data": models}))

    async def _show_model(self, exchange: Exchange, gateway: Gateway, caller: Caller) -> None:
        name = exchange.scope["path"].removeprefix("/v1/models/").rstrip("/")
        spec = gateway.directory.deployments.get(name)
        if spec is None:
            raise ModelNotFound(f"The model '{name[:200]}' does not exist.", param="model")
        await exchange.respond(200, msgspec.json.encode(_describe(spec)))

    async def _complete(self, exchange: Exchange, gateway: Gateway, caller: Caller) -> None:
        body = read_body(await exchange.read_body(self._max_body_bytes), CompletionBody)
        draft = await draft_completion(body, caller, gateway.find_model(body.model), f"cmpl-{exchange.token}")
        await self._answer(exchange, gateway, body, draft, CompletionRendering)

    async def _chat(self, exchange: Exchange, gateway: Gateway, caller: Caller) -> None:
        body = read_body(await exchange.read_body(self._max_body_bytes), ChatBody)
        draft = await draft_chat(body, caller, gateway.find_model(body.model), f"chatcmpl-{exchange.token}")
        await self._answer(exchange, gateway, body, draft, ChatRendering)

    async def _answer(
        self,
        exchange: Exchange,
        gateway: Gateway,
        body: CompletionBody | ChatBody,
        draft: Draft,
        rendering: type[CompletionRendering],
    ) -> None:
        key = None
        if exchange.idempotency_key is not None:
            key = read_idempotency_key(exchange.idempotency_key, draft.endpoint, body)
        drafts = [replace(choice, reply_to=gateway.name) for choice in split_choices(draft, body)]
        replies = await submit_choices(gateway, drafts, key)
        answer = Answer(replies, body, rendering)
        watcher = asyncio.create_task(_abandon_when_gone(exchange, replies))
        try:
            await (_stream if body.stream else _whole)(exchange, answer)
        finally:
            watcher.cancel()
            for reply in replies:
                reply.abandon()


class Answer:
    """The replies to a request's choices, each with its rendering."""

    def __init__(self, replies: list[Reply], body: CompletionBody | ChatBody, kind: type[CompletionRendering]) -> None:
        request = replies[0].request
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self.heading = Heading(
            id=request.id, created=int(request.arrival_s), model=body.model, include_usage=include_usage
        )
        self.kind = kind
        self.replies = replies
        self.renders = [kind(self.heading, i, _trail(reply)) for i, reply in enumerate(replies)]

    def text(self, index: int, text: str) -> bytes:
        """A frame for text of one choice."""
        return self.renders[index].text(text, self.replies[index].mailbox.take_logprobs())

    def last(self, index: int) -> bytes:
        """The last frame of one choice. Raises GatewayError where it did not end well."""
        return self.renders[index].last(_ended_well(self.replies[index]))

    def end(self) -> bytes:
        """What follows all choices."""
        return render_end(self.heading, self.kind, [_ended_well(reply) for reply in self.replies])

    def whole(self, texts: list[str]) -> bytes:
        """All choices in one piece. Raises GatewayError where one did not end well."""
        finishes = [_ended_well(reply) for reply in self.replies]
        parts = zip(self.renders, texts, self.replies, finishes, strict=True)
        choices = [r.whole(text, reply.mailbox.take_logprobs(), finish) for r, text, reply, finish in parts]
        return render_whole(self.heading, self.kind, choices, finishes)


def _trail(reply: Reply) -> TokenTrail | None:
    sampling, tokenizer = reply.request.sampling, reply.model.tokenizer
    return None if sampling.logprobs is None or tokenizer is None else TokenTrail(tokenizer, sampling)


class WrongMethod(InvalidRequest):
    """The address takes another method."""

    code = "method_not_allowed"

    def __init__(self, allowed: str, path: str) -> None:
        super().__init__(f"Use {allowed} with {path}.")
        self.allowed = allowed


async def _abandon_when_gone(exchange: Exchange, replies: list[Reply]) -> None:
    await exchange.wait_for_disconnect()
    for reply in replies:
        reply.abandon()


async def _whole(exchange: Exchange, answer: Answer) -> None:
    texts = await read_whole(answer.replies, _ended_well)
    await exchange.respond(200, answer.whole(texts), _limits(answer.replies))


async def _stream(exchange: Exchange, answer: Answer) -> None:
    await exchange.start(200, [*STREAM_HEADERS, *_limits(answer.replies)])
    pending = b"".join(render.start() for render in answer.renders)
    num_running = len(answer.replies)
    try:
        async with contextlib.aclosing(read_choices(answer.replies)) as arriving:
            async for index, text, has_ended in arriving:
                pending += answer.text(index, text)
                if has_ended:
                    pending += answer.last(index)
                    num_running -= 1
                if num_running:
                    await exchange.send(pending or SIGN_OF_LIFE, more=True)
                    pending = b""
        pending += answer.end()
    except GatewayError as error:
        pending += error_frame(error_body(error))
    except asyncio.CancelledError:
        # The server gives up on this response; whoever still listens is told.
        with contextlib.suppress(RuntimeError, OSError):
            await exchange.send(pending + error_frame(error_body(ShuttingDown())), more=False)
        raise
    await exchange.send(pending, more=False)


def _ended_well(reply: Reply) -> Finish:
    """How the reply ended. Raises RequestEnded for an error or a cancellation, Shed or DeadlineExceeded for a drop."""
    finish = reply.finish
    assert finish is not None
    if finish.error_code == Shed.code:
        raise Shed(finish.error_message, retry_after_s=reply.retry_after_s)
    if finish.error_code == DeadlineExceeded.code:
        raise DeadlineExceeded(finish.error_message)
    if finish.reason == "error":
        raise RequestEnded(finish.error_message or "The engine failed on this request.", code=finish.error_code)
    if finish.reason == "cancelled":
        raise RequestEnded("The request was cancelled.", code="cancelled")
    return finish


def _limits(replies: list[Reply]) -> list[tuple[bytes, bytes]]:
    """As the last choice left them."""
    admission = replies[-1].admission
    return limit_headers(admission) if admission is not None else []


def _describe(spec: DeploymentSpec) -> dict[str, object]:
    return {"id": spec.name, "object": "model", "created": spec.created_s, "owned_by": "penstock"}
