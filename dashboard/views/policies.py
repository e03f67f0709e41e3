"""The page of policies: the one in force with its parameters, and the history of revisions."""

from django.http import HttpRequest, HttpResponse

from dashboard.guard import METRICS as GUARDS
from dashboard.history_form import SPANS
from dashboard.models import GuardedSwitch, WhatIfRun
from dashboard.page import chosen_model, render_page, viewers_only
from dashboard.selectors.comparison import compare
from dashboard.selectors.revisions import changes, find_policy, list_revisions
from dashboard.what_if import OPEN
from scheduling.core.policies import POLICIES
from scheduling.models import PolicyRevision

ROWS = 15
RUNS = 6
FIRST_CANDIDATES = ("fifo", "priority", "fair", "edf")
"""Chosen at first, beside the policy in force."""


@viewers_only
def policies(request: HttpRequest) -> HttpResponse:
    """The form holds the parameters in force; those of other policies stand at their defaults."""
    model = chosen_model(request)
    if not model:
        return render_page(request, "dashboard/policies.html", {}, page="policies")
    in_force = find_policy(model)
    before = request.GET.get("before", "")
    revisions, older = list_revisions(
        model, before=int(before) if before.isdecimal() and len(before) < 10 else None, limit=ROWS
    )
    watched = [row.revision for row in revisions] + [in_force.revision]
    guards = {guard.revision: guard for guard in GuardedSwitch.objects.filter(model=model, revision__in=watched)}
    context = {
        "in_force": in_force,
        "in_force_kind": POLICIES.get(in_force.name),
        "kinds": [_kind(name, in_force.name, in_force.params) for name in POLICIES],
        "revisions": [_revision(row, in_force.revision, guards.get(row.revision)) for row in revisions],
        "guards": GUARDS,
        "watch_default_s": 600,
        "watched": guards.get(in_force.revision),
        **_what_if(request, model, in_force.name),
        "older_than": revisions[-1].revision if older else None,
        "newer": bool(before),
    }
    return render_page(request, "dashboard/policies.html", context, page="policies")


def _kind(name: str, active: str, params: object) -> dict[str, object]:
    kind = POLICIES[name]
    values = {**kind.params, **(params if name == active and isinstance(params, dict) else {})}
    fields = [(key, spec, values[key]) for key, spec in kind.parameters.items()]
    return {"kind": kind, "active": name == active, "fields": fields}


def _what_if(request: HttpRequest, model: str, in_force: str) -> dict[str, object]:
    """The last replays of a model, and the result of the one that the address names, or of the newest."""
    runs = list(WhatIfRun.objects.filter(model=model).defer("result")[:RUNS])
    named = request.GET.get("run", "")
    shown = WhatIfRun.objects.filter(model=model)
    run = (shown.filter(pk=int(named)) if named.isdecimal() and len(named) < 19 else shown).first()
    first = [in_force, *(name for name in FIRST_CANDIDATES if name != in_force)][:4]
    return {
        "runs": runs,
        "run": run,
        "table": compare(run.result) if run and run.result else None,
        "replaying": any(one.state in OPEN for one in runs),
        "first_candidates": first,
        "policies": POLICIES,
        "spans": [(name, SPANS[name][0]) for name in ("15m", "1h", "6h")],
    }


def _revision(row: PolicyRevision, in_force: int, guard: GuardedSwitch | None) -> dict[str, object]:
    same = row.name == row.previous_name
    acks = [(name, ack) for name, ack in row.acknowledgements.items() if isinstance(ack, dict)]
    return {
        "row": row,
        "guard": guard,
        "in_force": row.revision == in_force,
        "same": same,
        "changes": changes(row.previous_params if same else {}, row.params),
        "acks": acks,
        "num_ok": sum(bool(ack.get("ok")) for _, ack in acks),
    }
