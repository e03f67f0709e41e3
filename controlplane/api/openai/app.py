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
from controlplane.api.openai.render import SIGN_OF_LIFE, ChatRendering, CompletionRendering, error_frame
from inference.gateway.admission import Draft
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
        reply = await gateway.submit(replace(draft, reply_to=gateway.name), key)
        request = reply.request
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        render = rendering(id=request.id, created=int(request.arrival_s), model=body.model, include_usage=include_usage)
        watcher = asyncio.create_task(_abandon_when_gone(exchange, reply))
        try:
            await (_stream if body.stream else _whole)(exchange, reply, render)
        finally:
            watcher.cancel()
            reply.abandon()


class WrongMethod(InvalidRequest):
    """The address takes another method."""

    code = "method_not_allowed"

    def __init__(self, allowed: str, path: str) -> None:
        super().__init__(f"Use {allowed} with {path}.")
        self.allowed = allowed


async def _abandon_when_gone(exchange: Exchange, reply: Reply) -> None:
    await exchange.wait_for_disconnect()
    reply.abandon()


async def _whole(exchange: Exchange, reply: Reply, render: CompletionRendering) -> None:
    text = await reply.read_all()
    finish = _ended_well(reply)
    await exchange.respond(200, render.whole(text, finish), _limits(reply))


async def _stream(exchange: Exchange, reply: Reply, render: CompletionRendering) -> None:
    await exchange.start(200, [*STREAM_HEADERS, *_limits(reply)])
    pending = render.start()
    try:
        while True:
            text = await reply.read()
            pending += render.text(text) if text else b""
            if reply.finish is not None:  # and with it `read` took all that was left
                break
            await exchange.send(pending or SIGN_OF_LIFE, more=True)
            pending = b""
        pending += render.end(_ended_well(reply))
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


def _limits(reply: Reply) -> list[tuple[bytes, bytes]]:
    return limit_headers(reply.admission) if reply.admission is not None else []


def _describe(spec: DeploymentSpec) -> dict[str, object]:
    return {"id": spec.name, "object": "model", "created": spec.created_s, "owned_by": "penstock"}
