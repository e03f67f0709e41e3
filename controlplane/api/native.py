"""The native API: its application, who may call it, and how its errors look."""

import logging
from typing import Any

import msgspec
from django.http import HttpRequest, HttpResponse
from ninja import NinjaAPI
from ninja.errors import AuthenticationError, AuthorizationError, HttpError, ValidationError
from ninja.openapi.schema import OpenAPISchema

from controlplane.api import control, fleet, operators, replicas, requests, tokens
from controlplane.api.errors import error_body, error_headers, status_of
from controlplane.api.openai.body import ChatBody, CompletionBody
from inference.gateway.errors import Forbidden, GatewayError, InvalidKey, InvalidRequest, NotFound
from scheduling.core.policies import InvalidPolicyParameter, PolicyError
from scheduling.core.sizing.strategies import SizingError, UnknownSizing

log = logging.getLogger(__name__)


class NativeAPI(NinjaAPI):
    """Adds the bodies that are validated outside of ninja to the documentation."""

    def get_openapi_schema(self, **options: Any) -> OpenAPISchema:
        """The document at `/api/openapi.json`."""
        document = super().get_openapi_schema(**options)
        _, components = msgspec.json.schema_components(
            [CompletionBody, ChatBody], ref_template="#/components/schemas/{name}"
        )
        document["components"]["schemas"].update(components)
        return document


api = NativeAPI(
    title="Penstock",
    version="1",
    description="Submit and poll requests, read queues, replicas and policies, switch a policy, steer replicas. "
    "OpenAI's dialect is at `/v1`.",
    docs_url="/docs",
    urls_namespace="native",
)
api.add_router("/v1", requests.router)
api.add_router("/v1", fleet.router)
api.add_router("/v1", control.router)
api.add_router("/v1", replicas.router)
api.add_router("/v1", operators.router)
api.add_router("/v1", tokens.router)


def _respond(request: HttpRequest, error: GatewayError) -> HttpResponse:
    headers = {name.decode(): value.decode() for name, value in error_headers(error)}
    return HttpResponse(error_body(error), status=status_of(error), content_type="application/json", headers=headers)


def unknown_url(request: HttpRequest, rest: str) -> HttpResponse:
    """A view for every other address under `/api/`."""
    return _respond(request, NotFound(f"There is no /api/{rest[:200]}.", code="unknown_url"))


@api.exception_handler(GatewayError)
def _gateway_error(request: HttpRequest, error: GatewayError) -> HttpResponse:
    return _respond(request, error)


@api.exception_handler(ValidationError)
def _validation_error(request: HttpRequest, error: ValidationError) -> HttpResponse:
    first = error.errors[0]
    param = ".".join(str(part) for part in first["loc"][1:])
    return _respond(request, InvalidRequest(f"{first['msg']} (at {param}).", param=param))


@api.exception_handler(PolicyError)
def _policy_error(request: HttpRequest, error: PolicyError) -> HttpResponse:
    parameter = error.parameter if isinstance(error, InvalidPolicyParameter) else ""
    param = f"params.{parameter[:100]}" if parameter else "name"
    return _respond(request, InvalidRequest(str(error), param=param, code="invalid_policy"))


@api.exception_handler(SizingError)
def _sizing_error(request: HttpRequest, error: SizingError) -> HttpResponse:
    param = "sizing" if isinstance(error, UnknownSizing) else "params"
    return _respond(request, InvalidRequest(str(error), param=param, code="invalid_sizing"))


@api.exception_handler(HttpError)
def _http_error(request: HttpRequest, error: HttpError) -> HttpResponse:
    if isinstance(error, AuthenticationError):
        return _respond(request, InvalidKey("Send an API key as a bearer token, or sign in."))
    if isinstance(error, AuthorizationError) or error.status_code == 403:
        return _respond(request, Forbidden(error.message))
    if error.status_code == 404:
        return _respond(request, NotFound(error.message))
    return _respond(request, InvalidRequest(error.message))


@api.exception_handler(Exception)
def _unexpected(request: HttpRequest, error: Exception) -> HttpResponse:
    log.exception("%s %s failed", request.method, request.path, exc_info=error)
    return _respond(request, GatewayError("The server failed on this request."))
