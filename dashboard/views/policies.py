"""The page of policies: the one in force with its parameters, and the history of revisions."""

from django.http import HttpRequest, HttpResponse

from dashboard.page import chosen_model, render_page, viewers_only
from dashboard.selectors.revisions import changes, find_policy, list_revisions
from scheduling.core.policies import POLICIES
from scheduling.models import PolicyRevision

ROWS = 15


@viewers_only
def policies(request: HttpRequest) -> HttpResponse:
    """The form holds the parameters in force; those of other policies stand at their defaults."""
    model = chosen_model(request)
    if not model:
        return render_page(request, "dashboard/policies.html", {}, page="policies")
    in_force = find_policy(model)
    before = request.GET.get("before", "")
    revisions, older = list_revisions(model, before=int(before) if before.isdecimal() else None, limit=ROWS)
    context = {
        "in_force": in_force,
        "in_force_kind": POLICIES.get(in_force.name),
        "kinds": [_kind(name, in_force.name, in_force.params) for name in POLICIES],
        "revisions": [_revision(row, in_force.revision) for row in revisions],
        "older_than": revisions[-1].revision if older else None,
        "newer": bool(before),
    }
    return render_page(request, "dashboard/policies.html", context, page="policies")


def _kind(name: str, active: str, params: object) -> dict[str, object]:
    kind = POLICIES[name]
    values = {**kind.params, **(params if name == active and isinstance(params, dict) else {})}
    fields = [(key, spec, values[key]) for key, spec in kind.parameters.items()]
    return {"kind": kind, "active": name == active, "fields": fields}


def _revision(row: PolicyRevision, in_force: int) -> dict[str, object]:
    same = row.name == row.previous_name
    acks = [(name, ack) for name, ack in row.acknowledgements.items() if isinstance(ack, dict)]
    return {
        "row": row,
        "in_force": row.revision == in_force,
        "same": same,
        "changes": changes(row.previous_params if same else {}, row.params),
        "acks": acks,
        "num_ok": sum(bool(ack.get("ok")) for _, ack in acks),
    }
