"""Operators' tokens: a signed-in user makes and revokes their own."""

from datetime import datetime, timedelta
from typing import Annotated

from django.contrib.auth.models import User
from django.core.exceptions import ValidationError
from django.http import HttpRequest
from django.utils import timezone
from ninja import Query, Router, Schema, Status
from pydantic import Field

from controlplane.api.access import SessionAuth
from controlplane.api.schemas import STORABLE
from controlplane.models import OperatorToken
from controlplane.tokens import create_token, revoke_token
from inference.gateway.errors import InvalidRequest, NotFound

router = Router(tags=["tokens"], auth=SessionAuth())
Reason = Annotated[
    str, Query(min_length=1, max_length=500, pattern=STORABLE, description="Why; kept in the audit trail.")
]


class TokenBody(Schema, extra="forbid"):
    """A token to make."""

    name: str = Field(
        min_length=1, max_length=120, pattern=STORABLE, description="What it is for; the reason in the audit trail."
    )
    days: float | None = Field(
        default=None, gt=0, le=3650, description="How long it can be used; absent: until revoked."
    )


class TokenView(Schema):
    """A token, as it may be shown."""

    id: int
    name: str
    shown: str = Field(description="Its beginning.")
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None
    active: bool


class NewTokenView(TokenView):
    """A token just made."""

    token: str = Field(description="The token itself. It cannot be read again.")


@router.get("/tokens", response=list[TokenView], summary="Your tokens")
def list_tokens(request: HttpRequest) -> list[OperatorToken]:
    """The 100 newest, revoked ones too."""
    return list(_user(request).tokens.all()[:100])


@router.post("/tokens", response={201: NewTokenView}, summary="Make a token")
def make_token(request: HttpRequest, body: TokenBody) -> Status[NewTokenView]:
    """It has your rights, whatever they are when it is used. By session and CSRF token: a token makes no tokens."""
    expires_at = None if body.days is None else timezone.now() + timedelta(days=body.days)
    try:
        token, plaintext = create_token(user=_user(request), name=body.name, expires_at=expires_at)
    except ValidationError as error:
        raise InvalidRequest(" ".join(error.messages), param="name") from error
    return Status(201, NewTokenView(**TokenView.from_orm(token).dict(), token=plaintext))


@router.delete("/tokens/{token_id}", response=TokenView, summary="Revoke a token")
def end_token(request: HttpRequest, token_id: int, reason: Reason) -> OperatorToken:
    """From then on calls with it are refused."""
    token = _user(request).tokens.filter(pk=token_id).first() if 0 < token_id < 2**63 else None
    if token is None:
        raise NotFound("You have no such token.", code="token_not_found")
    revoke_token(token=token, actor=_user(request), reason=reason)
    token.refresh_from_db()
    return token


def _user(request: HttpRequest) -> User:
    user = request.auth  # type: ignore[attr-defined]
    assert isinstance(user, User)
    return user
