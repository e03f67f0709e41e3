"""The page of history: series over minutes, hours and days, compared and annotated; and its export."""

from collections.abc import Iterable
from datetime import UTC, timedelta
from typing import Any

from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.utils import timezone

from dashboard.export import csv_response
from dashboard.filters import Filters
from dashboard.history_form import COMPARISONS, DEFAULT_SPAN, SPANS, choose
from dashboard.page import chosen_model, render_page, viewers_only
from dashboard.selectors.alerts import list_marks
from dashboard.selectors.history import METRICS, Period, PeriodError, metric_names, read_changes, read_series
from inference.models import Replica

MAX_REPLICAS = 200
UNITS_IN_FIGURES = ("s", "ms", "%", "bytes")
"""Which the charts write after each figure."""


@viewers_only
def history(request: HttpRequest) -> HttpResponse:
    """The frame: which model, period and metrics. A script fetches the series and draws them."""
    filters = Filters(request.GET)
    since, until = filters.window()
    span = filters.choice("span", tuple(SPANS)) or ("" if since else DEFAULT_SPAN)
    compare = filters.choice("compare", tuple(COMPARISONS))
    changes, marks, period = [], [], None
    try:
        period = choose(span=span, since=since, until=until, compare=compare, now=timezone.now()).period
        changes = read_changes(chosen_model(request), period)
        marks = list_marks(chosen_model(request), period)
    except PeriodError as error:
        filters.problems["until"] = str(error)
    replicas = list(Replica.objects.filter(model=chosen_model(request)).values_list("name", flat=True)[:MAX_REPLICAS])
    context = {
        "replicas": replicas,
        "replica": filters.choice("replica", replicas),
        "span": span,
        "spans": [(name, title) for name, (title, _) in SPANS.items()],
        "since": since,
        "until": until,
        "compare": compare,
        "comparisons": [(name, title) for name, (title, _) in COMPARISONS.items()],
        "metrics": METRICS,
        "units_in_figures": UNITS_IN_FIGURES,
        "chosen": metric_names(request.GET.getlist("metric")),
        "problems": filters.problems,
        "changes": changes,
        "marks": marks,
        "period": period,
        "resolution": {1: "by seconds", 60: "by minutes", 3600: "by hours"}[period.resolution] if period else "",
    }
    return render_page(request, "dashboard/history.html", context, page="history")


@viewers_only
def export(request: HttpRequest) -> HttpResponse | StreamingHttpResponse:
    """All metrics of the period as CSV, times in UTC; of one replica those that replicas record."""
    filters = Filters(request.GET)
    since, until = filters.window()
    model = chosen_model(request)
    try:
        period = choose(span=filters.text("span"), since=since, until=until, compare="", now=timezone.now()).period
    except PeriodError as error:
        return HttpResponse(str(error), status=400, content_type="text/plain")
    replica = filters.text("replica")
    return csv_response(_lines(model, period, replica), f"penstock-history-{period.start:%Y%m%d-%H%M}.csv")


def _lines(model: str, period: Period, replica: str) -> Iterable[Iterable[Any]]:
    metrics = {name: metric for name, metric in METRICS.items() if not replica or metric.source == "batch"}
    series = read_series(model, period, metrics, replica=replica)
    yield ["start", "model", "replica", *(f"{name} ({metric.unit})" for name, metric in metrics.items())]
    for i in range(period.num_grains):
        values = [series[name][i] for name in metrics]
        if any(value is not None for value in values):
            start = period.start + timedelta(seconds=i * period.resolution)
            yield [start.astimezone(UTC).isoformat(), model, replica, *values]
