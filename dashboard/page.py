"""What every page of the operator shares: who may see it, its frame, the chosen model, times in the reader's zone."""

import logging
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any
from urllib.parse import unquote

from django.contrib.auth.decorators import login_required, permission_required
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import render
from django.utils import timezone
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET
from redis.exceptions import RedisError

from dashboard.access import CONTROL_REPLICA, SWITCH_POLICY, USE_ADMIN, VIEW
from dashboard.selectors.alerts import count_firing
from dashboard.zone import reader_zone
from inference.models import ModelDeployment
from scheduling.connection import live_keys, live_redis

log = logging.getLogger(__name__)

MODEL_COOKIE = "penstock_model"
PAGES = (
    ("dashboard", "Live"),
    ("requests", "Requests"),
    ("policies", "Policies"),
    ("fleet", "Fleet"),
    ("tenants", "Tenants"),
    ("offline", "Offline"),
    ("history", "History"),
    ("alerts", "Alerts"),
    ("audit", "Audit"),
)
"""URL names and titles, in the order of the navigation."""
OWN_PAGES = {"tokens": "API tokens"}
"""Reached by one's name."""

View = Callable[..., HttpResponseBase]


def viewers_only(view: View) -> View:
    """GET by a signed-in user who may see the dashboard, in the time zone of the reader."""

    @login_required
    @permission_required(VIEW, raise_exception=True)
    @never_cache
    @require_GET
    @wraps(view)
    def guarded(request: HttpRequest, **arguments: str) -> HttpResponseBase:
        with timezone.override(reader_zone(request)):
            return view(request, **arguments)

    return guarded


def render_page(request: HttpRequest, template: str, context: Mapping[str, Any], *, page: str) -> HttpResponse:
    """A page in the common frame; `page` is its URL name in PAGES."""
    can_switch, can_control = request.user.has_perm(SWITCH_POLICY), request.user.has_perm(CONTROL_REPLICA)
    frame = {
        "page": page,
        "pages": PAGES,
        "page_title": {**OWN_PAGES, **dict(PAGES)}[page],
        "models": _models_of(request),
        "model": chosen_model(request),
        "can_switch": can_switch,
        "can_control": can_control,
        "role": _role_of(request, can_operate=can_switch or can_control),
        "alerts": count_firing(),
        "zone": timezone.get_current_timezone_name(),
        "now": timezone.now(),
    }
    return render(request, template, {**frame, **context})


def _role_of(request: HttpRequest, *, can_operate: bool) -> str:
    """As the groups are named, whatever gave the rights."""
    if request.user.has_perm(USE_ADMIN):
        return "administrator"
    return "operator" if can_operate else "viewer"


def list_models() -> list[str]:
    """Models there are, deployed ones of the database and those that the queue's store knows."""
    names = set(ModelDeployment.objects.values_list("name", flat=True))
    try:
        names |= {name.decode() for name in live_redis().hkeys(live_keys().deployments)}  # type: ignore[union-attr]
    except (RedisError, OSError) as error:
        log.warning("Redis does not answer (%s); pages offer the database's models.", error)
    return sorted(names)


def chosen_model(request: HttpRequest) -> str:
    """The model that the address names, else the one chosen last in this browser, else the first; "" without any."""
    names = _models_of(request)
    for wanted in (request.GET.get("model"), unquote(request.COOKIES.get(MODEL_COOKIE, ""))):
        if wanted in names:
            return str(wanted)
    return names[0] if names else ""


def _models_of(request: HttpRequest) -> list[str]:
    """`list_models`, asked once for a page."""
    names: list[str] | None = request.__dict__.get("penstock_models")
    if names is None:
        names = request.__dict__["penstock_models"] = list_models()
    return names
