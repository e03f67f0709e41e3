"""The page of alerts: what fires, what did, the rules, and where notices go; acknowledging, and changing a rule."""

from django.contrib.auth.models import User
from django.core.exceptions import ValidationError
from django.http import HttpRequest, HttpResponse, JsonResponse

from dashboard.access import SWITCH_POLICY
from dashboard.alert_form import read_rule_form
from dashboard.alerts.kinds import KINDS, SEVERITIES
from dashboard.alerts.models import Alert, AlertRule
from dashboard.alerts.services import AlertError, acknowledge, change_rule
from dashboard.filters import Filters
from dashboard.page import PAGES, render_page, viewers_only
from dashboard.selectors.alerts import AlertFilter, list_alerts, list_channels, list_rules, open_alerts
from dashboard.selectors.keyset import Cursor
from dashboard.views.commands import operators_only, reason_of, refuse

ROWS = 25
MAX_NOTE = 500


@viewers_only
def alerts(request: HttpRequest) -> HttpResponse:
    """Over all models; a script draws the parts anew while somebody looks."""
    after = Cursor.parse(Filters(request.GET).text("after"))
    past = list_alerts(AlertFilter(state=Alert.State.RESOLVED), after=after, limit=ROWS)
    context = {
        "open_alerts": open_alerts(),
        "past": past.rows,
        "next": past.next,
        "newer": after is not None,
        "rules": [(rule, KINDS[rule.kind]) for rule in list_rules()],
        "channels": list_channels(),
        "severities": SEVERITIES,
        "titles": dict(PAGES),
        "change_column": ["-Change"] if request.user.has_perm(SWITCH_POLICY) else [],
    }
    return render_page(request, "dashboard/alerts.html", context, page="alerts")


@operators_only(SWITCH_POLICY, with_reason=False)
def acknowledge_alert(request: HttpRequest, *, alert_id: int) -> JsonResponse:
    """Say that one sees to a firing alert, with a note or without."""
    note = request.POST.get("note", "").replace("\0", "").strip()
    if len(note) > MAX_NOTE:
        return refuse(400, f"A note has at most {MAX_NOTE} characters.")
    try:
        alert = acknowledge(alert_id=alert_id, note=note, actor=_actor(request))
    except Alert.DoesNotExist:
        return refuse(404, "There is no such alert; load the page again.")
    except AlertError as error:
        return refuse(409, str(error))
    return JsonResponse({"message": f"You have acknowledged {alert}."})


@operators_only(SWITCH_POLICY)
def edit_rule(request: HttpRequest, *, rule_id: int) -> JsonResponse:
    """Change a rule."""
    changes, problems = read_rule_form(request.POST)
    if problems:
        return refuse(400, next(iter(problems.values())), fields=problems)
    try:
        rule = change_rule(rule_id=rule_id, changes=changes, actor=_actor(request), reason=reason_of(request))
    except AlertRule.DoesNotExist:
        return refuse(404, "There is no such rule; load the page again.")
    except ValidationError as error:
        fields = {name: " ".join(sentences) for name, sentences in error.message_dict.items()}
        return refuse(400, next(iter(fields.values())), fields=fields)
    return JsonResponse({"message": f"{rule.name} is changed. It holds from the next look on, within seconds."})


def _actor(request: HttpRequest) -> User:
    assert isinstance(request.user, User)
    return request.user
