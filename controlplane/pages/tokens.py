"""The page of one's own API tokens: made, shown once, revoked."""

from datetime import timedelta

from django.contrib.auth.models import User
from django.core.exceptions import ValidationError
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.utils import timezone

from controlplane.models import MAX_ACTIVE
from controlplane.tokens import create_token, revoke_token
from dashboard.access import VIEW
from dashboard.page import render_page, viewers_only
from dashboard.views.commands import operators_only, reason_of, refuse

MAX_LISTED = 100
SPANS = (("30", "30 days"), ("90", "90 days"), ("365", "a year"), ("1", "a day"), ("", "until it is revoked"))
"""How long a token can be used: days, in words."""


@viewers_only
def tokens(request: HttpRequest) -> HttpResponse:
    """The newest, revoked ones too."""
    rows = list(_user(request).tokens.all()[:MAX_LISTED])
    context = {"tokens": rows, "spans": SPANS, "most": MAX_ACTIVE, "num_active": sum(row.active for row in rows)}
    return render_page(request, "dashboard/tokens.html", context, page="tokens")


@operators_only(VIEW, with_reason=False)
def make(request: HttpRequest) -> JsonResponse:
    """A token with the rights of whoever asks; its plain text is in this answer and nowhere else."""
    name, days = request.POST.get("name", "").replace("\0", "").strip(), request.POST.get("days", "")
    if days not in dict(SPANS):
        return refuse(400, "Choose how long the token can be used.", fields={"days": "Choose one of the list."})
    expires_at = timezone.now() + timedelta(days=int(days)) if days else None
    try:
        token, plaintext = create_token(user=_user(request), name=name, expires_at=expires_at)
    except ValidationError as error:
        fields = {name: " ".join(texts) for name, texts in error.message_dict.items() if name != "__all__"}
        return refuse(400, "Say what the token is for." if "name" in fields else " ".join(error.messages), fields)
    return JsonResponse({"token": plaintext, "name": token.name, "message": f"The token {token.name} was made."})


@operators_only(VIEW)
def revoke(request: HttpRequest, *, token_id: int) -> JsonResponse:
    """Refuse calls with one of one's own tokens from now on."""
    token = _user(request).tokens.filter(pk=token_id).first() if token_id < 2**63 else None
    if token is None:
        return refuse(404, "You have no such token.")
    revoke_token(token=token, actor=_user(request), reason=reason_of(request))
    return JsonResponse({"message": f"The token {token.name} was revoked."})


def _user(request: HttpRequest) -> User:
    assert isinstance(request.user, User)
    return request.user
