"""The pages of requests: what was recorded, by filters, and the life of one."""

from django.http import Http404, HttpRequest, HttpResponse
from redis.exceptions import RedisError

from dashboard.filters import Filters
from dashboard.page import chosen_model, list_models, render_page, viewers_only
from dashboard.selectors.keyset import Cursor
from dashboard.selectors.life import Life, find_life
from dashboard.selectors.requests import MAX_COUNTED, RequestFilter, count_requests, search_requests
from scheduling.core.request import Priority
from scheduling.models import Tenant

ROWS = 50
STATES = ("finished", "failed", "cancelled")
PRIORITIES = tuple(level.name.lower() for level in Priority)
MAX_TENANTS = 500
COLUMNS = (
    "Ended", "Request", "State", "Tenant", "Priority", "Model", "#Prompt", "#Output", "#TTFT", "#End to end",
    "Replica", "Policy",
)  # fmt: skip
"""The model's where requests of several are shown."""


@viewers_only
def requests(request: HttpRequest) -> HttpResponse:
    """Requests that ended, latest first; those that run or wait stand above, fetched by a script."""
    filters = Filters(request.GET)
    wanted = _read(filters, "" if request.GET.get("all") else chosen_model(request))
    after = Cursor.parse(filters.text("after"))
    page = search_requests(wanted, after=after, limit=ROWS)
    num = count_requests(wanted)
    context = {
        "columns": [title for title in COLUMNS if title != "Model" or not wanted.model],
        "rows": page.rows,
        "next": page.next,
        "newer": after is not None,
        "num": f"more than {MAX_COUNTED:,}" if num > MAX_COUNTED else f"{num:,}",
        "filters": wanted,
        "priority": filters.text("priority"),
        "problems": filters.problems,
        "states": STATES,
        "priorities": PRIORITIES,
        "tenants": Tenant.objects.values_list("name", flat=True)[:MAX_TENANTS],
        "filtered": any(request.GET.get(name) for name in ("id", "tenant", "priority", "state", "since", "until")),
        "max_waiting_shown": 20,
    }
    return render_page(request, "dashboard/requests.html", context, page="requests")


@viewers_only
def life(request: HttpRequest, *, request_id: str) -> HttpResponse:
    """One request's timeline; while it has not ended, a script draws it anew."""
    found: Life | None = None
    away = False
    try:
        found = find_life(request_id, list_models())
    except (RedisError, OSError):
        away = True
    if found is None and not away:
        raise Http404
    context = {"life": found, "request_id": request_id, "away": away}
    return render_page(request, "dashboard/request.html", context, page="requests")


def _read(filters: Filters, model: str) -> RequestFilter:
    since, until = filters.window()
    priority = filters.choice("priority", PRIORITIES)
    return RequestFilter(
        request_id=filters.text("id", 64),
        model=model,
        tenant=filters.text("tenant", 63),
        priority=PRIORITIES.index(priority) if priority else None,
        state=filters.choice("state", STATES),
        since=since,
        until=until,
    )
