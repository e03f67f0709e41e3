"""`/v1/files` and `/v1/batches`: OpenAI's offline work; answered by Django, since they read forms and the database."""

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

from django.core.exceptions import SuspiciousOperation
from django.db import Error as DatabaseError
from django.db.models import Model, QuerySet
from django.http import FileResponse, HttpRequest, HttpResponse, HttpResponseBase, JsonResponse
from django.http.multipartparser import MultiPartParserError
from django.views.decorators.csrf import csrf_exempt

from controlplane.api.access import find_gateway
from controlplane.api.caller import find_caller
from controlplane.api.errors import error_body, error_headers, status_of
from controlplane.api.openai.body import read_fields
from controlplane.models import Batch, StoredFile
from controlplane.offline.batches import cancel_batch, create_batch, find_batch
from controlplane.offline.files import content_path, delete_file, find_file, store_file
from inference.gateway.errors import GatewayError, InvalidRequest, NotFound, Unavailable

log = logging.getLogger(__name__)
View = Callable[..., HttpResponseBase]
MAX_PAGE = 100
MAX_METADATA = 16


class _WrongMethodError(GatewayError):
    def __init__(self, method: str | None) -> None:
        super().__init__(f"{method} does not go with this address.", code="method_not_allowed")


def _for_tenants(*methods: str) -> Callable[[View], View]:
    """A view that gets the tenant's name; errors are answered as `/v1` does."""

    def decorate(view: View) -> View:
        @csrf_exempt
        @wraps(view)
        def answer(request: HttpRequest, **arguments: str) -> HttpResponseBase:
            try:
                gateway = find_gateway(request)
                caller = find_caller(request.headers.get("Authorization", ""), gateway.directory)
                if request.method not in methods:
                    raise _WrongMethodError(request.method)
                return view(request, caller.tenant.name, **arguments)
            except GatewayError as error:
                return _refuse(error)
            except (MultiPartParserError, SuspiciousOperation) as error:
                return _refuse(InvalidRequest(f"The form cannot be read: {error}"))
            except (DatabaseError, OSError) as error:
                log.warning("Offline work cannot be reached: %s", error)
                return _refuse(Unavailable("Files and batches cannot be reached at the moment."))
            except Exception:
                log.exception("%s %s failed", request.method, request.path)
                return _refuse(GatewayError("The server failed on this request."))

        return answer

    return decorate


def _refuse(error: GatewayError) -> HttpResponse:
    headers = {name.decode(): value.decode() for name, value in error_headers(error)}
    return HttpResponse(error_body(error), status=status_of(error), content_type="application/json", headers=headers)


@_for_tenants("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
def unknown_url(request: HttpRequest, tenant: str, *, rest: str) -> HttpResponseBase:
    """Every other address below these."""
    raise NotFound(f"There is no /v1/{rest[:200]}.", code="unknown_url")


@_for_tenants("GET", "POST")
def files(request: HttpRequest, tenant: str) -> HttpResponseBase:
    """List files, or take one."""
    if request.method == "GET":
        found = StoredFile.objects.filter(tenant=tenant)
        purpose = request.GET.get("purpose", "").replace("\0", "")
        return _page(request, found.filter(purpose=purpose[:32]) if purpose else found, show_file)
    upload = request.FILES.get("file")
    if upload is None or not upload.name:
        raise InvalidRequest("Send the file as a form's field `file`.", param="file")
    if request.POST.get("purpose") != "batch":
        raise InvalidRequest("purpose must be batch.", param="purpose")
    file = store_file(tenant=tenant, filename=upload.name, purpose="batch", content=upload.read())
    return JsonResponse(show_file(file))


@_for_tenants("GET", "DELETE")
def one_file(request: HttpRequest, tenant: str, *, file_id: str) -> HttpResponseBase:
    """Describe a file, or delete it."""
    file = find_file(tenant, file_id)
    if request.method == "DELETE":
        delete_file(file)
        return JsonResponse({"id": file_id, "object": "file", "deleted": True})
    return JsonResponse(show_file(file))


@_for_tenants("GET")
def file_content(request: HttpRequest, tenant: str, *, file_id: str) -> HttpResponseBase:
    """The content, as it was sent or made."""
    path = content_path(find_file(tenant, file_id).id)
    try:
        return FileResponse(path.open("rb"), content_type="application/octet-stream")
    except FileNotFoundError:
        raise NotFound("The file's content is gone.", code="file_not_found") from None


@_for_tenants("GET", "POST")
def batches(request: HttpRequest, tenant: str) -> HttpResponseBase:
    """List batches, or make one."""
    if request.method == "GET":
        return _page(request, Batch.objects.filter(tenant=tenant), show_batch)
    fields = read_fields(request.body)
    texts = {name: fields.get(name) for name in ("input_file_id", "endpoint", "completion_window")}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise InvalidRequest(f"{name} must be a text.", param=name)
    batch = create_batch(
        tenant=tenant,
        input_file_id=str(texts["input_file_id"]),
        endpoint=str(texts["endpoint"]),
        window=str(texts["completion_window"]),
        metadata=_metadata(fields.get("metadata")),
    )
    return JsonResponse(show_batch(batch))


@_for_tenants("GET")
def one_batch(request: HttpRequest, tenant: str, *, batch_id: str) -> HttpResponseBase:
    """How far a batch is."""
    return JsonResponse(show_batch(find_batch(tenant, batch_id)))


@_for_tenants("POST")
def cancel(request: HttpRequest, tenant: str, *, batch_id: str) -> HttpResponseBase:
    """Stop a batch; what is done stays."""
    return JsonResponse(show_batch(cancel_batch(find_batch(tenant, batch_id))))


def _metadata(given: Any) -> dict[str, str]:
    if given is None:
        return {}
    texts = isinstance(given, dict) and all(_is_text(n, 64) and _is_text(v, 512) for n, v in given.items())
    if not texts or len(given) > MAX_METADATA:
        raise InvalidRequest(f"metadata has at most {MAX_METADATA} short texts.", param="metadata")
    return dict(given)


def _is_text(value: Any, length: int) -> bool:
    return isinstance(value, str) and len(value) <= length and "\0" not in value


def _page(request: HttpRequest, rows: QuerySet[Any], show: Callable[[Any], dict[str, Any]]) -> HttpResponse:
    """Newest first; `after` is the id of the last one that the client has."""
    limit = request.GET.get("limit", "20")
    if not limit.isdecimal() or not 1 <= int(limit[:6]) <= 10_000:
        raise InvalidRequest("limit must be a number from 1.", param="limit")
    count = min(MAX_PAGE, int(limit[:6]))
    if after := request.GET.get("after", "").replace("\0", ""):
        last: Model | None = rows.filter(pk=after[:64]).first()
        if last is None:
            raise InvalidRequest("after names nothing that is here.", param="after")
        moment = last.created_at  # type: ignore[attr-defined]
        rows = rows.filter(created_at__lt=moment) | rows.filter(created_at=moment, pk__lt=last.pk)
    found = list(rows[: count + 1])
    data = [show(row) for row in found[:count]]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return JsonResponse({"object": "list", "data": data, **ends, "has_more": len(found) > count})


def show_file(file: StoredFile) -> dict[str, Any]:
    """OpenAI's file object."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": int(file.created_at.timestamp()),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
    }


def show_batch(batch: Batch) -> dict[str, Any]:
    """OpenAI's batch object."""
    moments = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": {"object": "list", "data": batch.errors} if batch.errors else None,
        "input_file_id": batch.input_file_id,
        "completion_window": "24h",
        "status": batch.status,
        "output_file_id": batch.output_file_id or None,
        "error_file_id": batch.error_file_id or None,
        "created_at": int(batch.created_at.timestamp()),
        "expires_at": int(batch.expires_at.timestamp()),
        **{f"{name}_at": batch.moments.get(name) for name in moments},
        "request_counts": _counts(batch),
        "metadata": batch.metadata or None,
    }


def _counts(batch: Batch) -> dict[str, int]:
    if batch.status in (Batch.Status.IN_PROGRESS, Batch.Status.FINALIZING, Batch.Status.CANCELLING):
        completed, failed = (batch.lines.filter(state=state).count() for state in ("completed", "failed"))
    else:
        completed, failed = batch.num_completed, batch.num_failed
    return {"total": batch.num_total, "completed": completed, "failed": failed}
