"""Why a request is not served. Each class has a machine-readable code; HTTP status is chosen by the API."""

from typing import Any


class GatewayError(Exception):
    """The request could not be served."""

    code = "internal_error"
    retry_after_s: float | None = None

    def __init__(
        self,
        message: str = "",
        *,
        param: str | None = None,
        code: str = "",
        retry_after_s: float | None = None,
        admission: Any = None,
    ) -> None:
        super().__init__(message or type(self).__doc__)
        self.message = message or (type(self).__doc__ or "")
        self.param = param
        self.code = code or type(self).code
        self.retry_after_s = retry_after_s if retry_after_s is not None else type(self).retry_after_s
        self.admission = admission
        """What the tenant's limits answered (`scheduling.limits.Admission`), where they were asked."""


class InvalidRequest(GatewayError):
    """The request is malformed."""

    code = "invalid_value"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and completion do not fit the model's context."""

    code = "context_length_exceeded"


class InvalidKey(GatewayError):
    """The API key is missing, unknown or revoked."""

    code = "invalid_api_key"


class Forbidden(GatewayError):
    """This key may not do that."""

    code = "permission_denied"


class NotFound(GatewayError):
    """There is no such thing."""

    code = "not_found"


class ModelNotFound(NotFound):
    """There is no such model."""

    code = "model_not_found"


class IdempotencyKeyReused(GatewayError):
    """This Idempotency-Key was used with another request; a key belongs to one address and body."""

    code = "idempotency_key_reused"


class RateLimited(GatewayError):
    """A limit of the tenant is reached."""

    code = "rate_limit_exceeded"


class Unavailable(GatewayError):
    """The service cannot take the request now."""

    code = "unavailable"
    retry_after_s = 1.0


class ModelUnavailable(Unavailable):
    """The model cannot be served at the moment."""

    code = "model_unavailable"
    retry_after_s = 5.0


class QueueFull(Unavailable):
    """The queue is full."""

    code = "queue_full"


class Overloaded(Unavailable):
    """The service sheds requests of this priority."""

    code = "overloaded"


class Shed(Unavailable):
    """The request waited, and had to go for one of higher priority."""

    code = "shed"
    retry_after_s = 5.0


class RedisUnavailable(Unavailable):
    """The queue cannot be reached."""

    code = "redis_unavailable"


class NoReplica(Unavailable):
    """No worker serves the model."""

    code = "no_replica"
    retry_after_s = 10.0


class ShuttingDown(Unavailable):
    """This server process is shutting down; send the request again."""

    code = "server_shutting_down"


class RequestLost(GatewayError):
    """The request was lost with the queue's data; send it again."""

    code = "request_lost"


class RequestEnded(GatewayError):
    """The request ended without an answer."""

    code = "engine_error"


class DeadlineExceeded(GatewayError):
    """The request's deadline passed before it ran."""

    code = "deadline_exceeded"


class ClientGone(GatewayError):
    """The client has closed the connection."""

    code = "client_closed_request"
