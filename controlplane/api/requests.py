"""Submit and poll: a request whose client does not hold a connection open."""

import asyncio
import uuid
from dataclasses import replace

import msgspec
from django.http import HttpRequest, HttpResponse
from ninja import Router

from controlplane.api.access import KeyAuth, find_gateway
from controlplane.api.caller import Caller
from controlplane.api.drafting import draft_chat, draft_completion
from controlplane.api.errors import limit_headers
from controlplane.api.idempotency import read_idempotency_key
from controlplane.api.openai.body import ChatBody, CompletionBody, read_body, read_fields
from controlplane.api.sampling import refuse_what_polling_lacks
from controlplane.api.schemas import CancelView, Problem, RequestView, Usage
from inference.gateway.errors import InvalidRequest, NotFound
from inference.gateway.gateway import Gateway
from inference.gateway.served import ServedModel
from inference.messages import Finish, InferenceRequest
from scheduling.core.request import Priority
from scheduling.fleet import RequestRecordView

KEEP_S = 3600
"""How long the answer of a submitted request can be fetched after its end."""

router = Router(tags=["requests"], auth=KeyAuth())
BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "anyOf": [
                        {"$ref": "#/components/schemas/CompletionBody"},
                        {"$ref": "#/components/schemas/ChatBody"},
                    ]
                }
            }
        },
    }
}


@router.post("/requests", response={202: RequestView}, openapi_extra=BODY, summary="Submit a request")
async def submit_request(request: HttpRequest, response: HttpResponse) -> tuple[int, RequestView]:
    """Takes the body of `/v1/completions` (with `prompt`) or of `/v1/chat/completions` (with `messages`).

    Answers 202 at once; poll the address in `Location`. The answer is kept for an hour.
    """
    gateway, caller = find_gateway(request), _caller(request)
    raw = request.body
    body = read_body(raw, ChatBody) if "messages" in read_fields(raw) else read_body(raw, CompletionBody)
    if body.stream:
        raise InvalidRequest("A submitted request cannot stream; use /v1.", param="stream")
    refuse_what_polling_lacks(body)
    model = gateway.find_model(body.model)
    request_id = f"req-{uuid.uuid4().hex}"
    if isinstance(body, ChatBody):
        draft = await draft_chat(body, caller, model, request_id)
    else:
        draft = await draft_completion(body, caller, model, request_id)
    header = request.headers.get("Idempotency-Key")
    key = None if header is None else read_idempotency_key(header.encode("latin-1", "replace"), "requests", body)
    reply = await gateway.submit(replace(draft, keep_s=KEEP_S), key)
    request_id = reply.request.id
    response["Location"] = f"/api/v1/requests/{request_id}"
    if reply.admission is not None:
        for name, value in limit_headers(reply.admission):
            response[name.decode()] = value.decode()
    record = await gateway.pipeline.send(model.queue.record(request_id))
    if record is None:
        raise NotFound("The request was lost with the queue's data; send it again.", code="request_lost")
    return 202, await _view(gateway, model, reply.request, record)


@router.get("/requests/{request_id}", response=RequestView, summary="Poll a request")
async def get_request(request: HttpRequest, request_id: str) -> RequestView:
    """State, place in the queue, and the answer as far as it is there."""
    gateway = find_gateway(request)
    model, inference, record = await _find(gateway, _caller(request), request_id)
    return await _view(gateway, model, inference, record)


@router.delete("/requests/{request_id}", response=CancelView, summary="Cancel a request")
async def cancel_request(request: HttpRequest, request_id: str) -> CancelView:
    """Takes it out of the queue, or stops it where it runs."""
    gateway = find_gateway(request)
    model, inference, _ = await _find(gateway, _caller(request), request_id)
    return CancelView(id=request_id, was=await gateway.cancel(model, inference))


def _caller(request: HttpRequest) -> Caller:
    caller: Caller = request.auth  # type: ignore[attr-defined]
    return caller


async def _find(
    gateway: Gateway, caller: Caller, request_id: str
) -> tuple[ServedModel, InferenceRequest, RequestRecordView]:
    """The record of a request of this tenant. Raises NotFound, for another tenant's request too."""
    models = gateway.models.loaded()
    records = await asyncio.gather(*(gateway.pipeline.send(model.queue.record(request_id)) for model in models))
    for model, record in zip(models, records, strict=True):
        if record is not None:
            inference = msgspec.msgpack.decode(record.body, type=InferenceRequest)
            if inference.tenant == caller.tenant.name:
                return model, inference, record
    raise NotFound("There is no such request, or it ended too long ago.", code="request_not_found")


async def _view(
    gateway: Gateway, model: ServedModel, request: InferenceRequest, record: RequestRecordView
) -> RequestView:
    view = RequestView(
        id=request.id,
        model=request.model,
        state=record.state,
        priority=Priority(request.priority).name.lower(),
        arrival_s=request.arrival_s,
        attempt=record.attempt,
        output=record.output,
    )
    if record.finish is not None:
        _show_end(view, msgspec.msgpack.decode(record.finish, type=Finish))
    elif record.state == "queued":
        await _show_wait(view, gateway, model)
    else:
        tokens = await gateway.pipeline.send(model.queue.tokens(request.id))
        view.output = await asyncio.to_thread(model.text, tokens)
    return view


async def _show_wait(view: RequestView, gateway: Gateway, model: ServedModel) -> None:
    position = await gateway.pipeline.send(model.queue.position(view.id))
    if position is None:
        return
    view.queue_position = position.overall
    per_s = gateway.status(model.name).rate.requests_per_s
    view.estimated_wait_s = round((position.overall + 1) / per_s, 3) if per_s > 0 else None


def _show_end(view: RequestView, finish: Finish) -> None:
    view.finish_reason = finish.reason
    view.usage = Usage(
        prompt_tokens=finish.prompt_tokens,
        completion_tokens=finish.completion_tokens,
        total_tokens=finish.prompt_tokens + finish.completion_tokens,
    )
    if finish.reason == "error":
        view.error = Problem(code=finish.error_code or "engine_error", message=finish.error_message)
