"""How pages write times and numbers: in the reader's zone, every number with its unit."""

from datetime import datetime
from typing import Any

from django.template import Context, Library
from django.template.loader import render_to_string
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString, mark_safe

from dashboard.alerts.judging import span as alert_span
from dashboard.guard import COUNTS
from dashboard.guard import METRICS as GUARDS
from dashboard.models import GuardedSwitch
from dashboard.wording import NONE, duration
from scheduling.wording import say_value

register = Library()
register.filter("duration", duration)
register.filter("shown", say_value)


@register.filter
def moment(when: datetime | None) -> SafeString | str:
    """A time, as briefly as it is clear; the whole of it on hover."""
    if when is None:
        return NONE
    local, now = timezone.localtime(when), timezone.localtime()
    brief = "%H:%M:%S" if local.date() == now.date() else "%b %d %H:%M" if local.year == now.year else "%Y-%m-%d %H:%M"
    whole = f"{local:%Y-%m-%d %H:%M:%S} {timezone.get_current_timezone_name()}"
    return format_html('<time datetime="{}" title="{}">{}</time>', when.isoformat(), whole, local.strftime(brief))


@register.filter
def span(seconds: int) -> str:
    """Whole seconds of a setting, in the largest unit that fits."""
    return "at once" if seconds == 0 else alert_span(seconds)


@register.filter
def number(value: float | str | None) -> str:
    """With separators of thousands; fractions only where there are any."""
    if value is None or value == "":  # what a template makes of a missing attribute
        return NONE
    known = float(value)
    return f"{known:,.0f}" if known.is_integer() else f"{known:,.2f}".rstrip("0").rstrip(".")


@register.filter
def percent(share: float | None) -> str:
    """A share (0 to 1) as percent; near the whole with as many digits as tell it from the whole."""
    if share is None:
        return NONE
    digits = 0 if share < 0.9 or share == 1 else 1 if share < 0.999 else 2
    return f"{min(share * 100, 99.99) if share < 1 else share * 100:.{digits}f} %"


@register.filter
def item(values: Any, key: Any) -> Any:
    """`values[key]`, None where there is none."""
    return values.get(key) if hasattr(values, "get") else None


@register.filter
def pairs(values: Any) -> list[tuple[Any, Any]]:
    """Names and values, for a loop; none of nothing."""
    return list(values.items()) if values else []


@register.filter
def counted(unit: str, num: float) -> str:
    """A unit as it stands after a number: `1 worker`, `2 workers`."""
    return unit[:-1] if num == 1 and len(unit) > 2 and unit.endswith("s") else unit


@register.filter
def words(name: str) -> str:
    """`in_progress` as people write it."""
    return name.replace("_", " ")


@register.simple_block_tag(end_name="endrows")
def rows(content: str, title: str, *columns: Any, **options: str) -> SafeString:
    """A table that scrolls within the page, named by the element whose id is `title` (or by the option `label`).

    A column is its heading: `#` before it aligns numbers, `-` keeps it for who listens. Lists of columns are joined on.
    Options: `id`, `css`, `hidden`.
    """
    names = [name for column in columns for name in (column if isinstance(column, list) else [column])]
    shown = [{"title": str(name).lstrip("#-"), "num": name[:1] == "#", "hidden": name[:1] == "-"} for name in names]
    context = {"content": content, "title": title, "columns": shown, **options}
    return mark_safe(render_to_string("dashboard/parts/rows.html", context))  # noqa: S308


@register.simple_tag(takes_context=True)
def query_with(context: Context, name: str, value: Any) -> str:
    """The address's query with one field set."""
    fields = context["request"].GET.copy()
    fields[name] = str(value)
    return f"?{fields.urlencode()}"


@register.simple_tag(takes_context=True)
def query_without(context: Context, *names: str) -> str:
    """The address's query without some fields."""
    fields = context["request"].GET.copy()
    for name in names:
        fields.pop(name, None)
    return f"?{fields.urlencode()}"


@register.filter
def budget(left: float) -> str:
    """What is left of an error budget, a share; how often it was spent where it is far overdrawn."""
    if left < -1:
        return f"spent {1 - left:.0f}×"  # noqa: RUF001
    return f"{left * 100:.0f} % left" if left >= 0 else f"{-left * 100:.0f} % over"


@register.filter
def guard_bound(guard: GuardedSwitch) -> str:
    """What a guard watches, and the worst it may be."""
    metric = GUARDS.get(guard.metric)
    if metric is None:
        return f"{guard.metric} against {guard.threshold:g}"
    return f"{metric.title} {'not below' if metric.falls else 'not above'} {guard.threshold:g} {metric.unit}"


@register.filter
def guard_rows(guard: GuardedSwitch) -> list[tuple[str, str, str]]:
    """The figures of before and after, with titles and units."""
    names = [name for name in (*COUNTS, *GUARDS) if name in guard.after or name in guard.before]
    return [
        (
            COUNTS.get(name) or GUARDS[name].title,
            _guard_figure(name, guard.before.get(name)),
            _guard_figure(name, guard.after.get(name)),
        )
        for name in names
    ]


def _guard_figure(name: str, value: float | None) -> str:
    if value is None or name in COUNTS:
        return number(value)
    return duration(value) if GUARDS[name].unit == "s" else f"{number(value)} {GUARDS[name].unit}"


@register.filter
def hundred(share: float) -> str:
    """A share as part of 100, for a picture."""
    return f"{min(1.0, max(0.0, share)) * 100:.2f}"


@register.filter
def figure(value: Any, kind: str) -> str:
    """A figure of a comparison with its unit."""
    if kind == "both":
        return f"{duration(value[0])} · {percent(value[1])}"
    if value is None:
        return NONE
    if kind == "seconds":
        return duration(value)
    if kind == "share":
        return percent(value)
    return f"{value:,.0f} tokens/s" if kind == "rate" else f"{value:.3f}"
