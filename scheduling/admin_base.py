"""What the admin pages share: changes that are audited and told to every process, and tables that are only read."""
# mypy: disable-error-code="misc,untyped-decorator"
# (the theme comes without types)

from collections.abc import Iterable, Mapping
from typing import Any, cast

from django.contrib.auth.models import Permission, User
from django.db import transaction
from django.db.models import Model, QuerySet
from django.forms import BaseModelForm, ModelChoiceField
from django.http import HttpRequest
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin
from unfold.paginator import InfinitePaginator

from scheduling.admin_reason import REASON, AsksWhy, reason_of
from scheduling.audit import record_action
from scheduling.services import config_changed
from scheduling.wording import say_value

UNTOLD = ("digest", "password")
"""Fields that the audit trail, which viewers read, does not hold."""


def signed_in(request: HttpRequest) -> User:
    """Who uses the page; the admin lets nobody else in."""
    return cast(User, request.user)


def name_target(row: Model) -> str:
    """What the audit trail calls a row: a name that does not change, where it has one."""
    if isinstance(row, Permission):
        return f"{row.content_type.app_label}.{row.codename}"
    return str(getattr(row, "audit_name", row))[:200]


def describe(values: Mapping[str, Any]) -> dict[str, Any]:
    """Form values as the audit trail keeps them."""
    return {name: _told(value) for name, value in values.items()}


def values_of(row: Model) -> dict[str, Any]:
    """A row as the audit trail keeps it when it is deleted; without what opens doors."""
    names = [field.name for field in row._meta.concrete_fields if not field.primary_key]
    return describe({name: getattr(row, name) for name in names if name not in UNTOLD})


def record_form(request: HttpRequest, form: "BaseModelForm[Any]", *, target: str, created: bool) -> None:
    """Write down what a saved form changed, in the transaction of the page."""
    kind = form.instance._meta.model_name
    names = [name for name in (form.cleaned_data if created else form.changed_data) if name != REASON]
    after = describe({name: form.cleaned_data.get(name) for name in names if name != form.instance._meta.pk.name})
    before = {} if created else describe({name: _former(form, name) for name in after})
    action = f"{kind}.{'create' if created else 'update'}"
    record_action(
        actor=signed_in(request), action=action, target=target, before=before, after=after, reason=reason_of(request)
    )


def record_deletion(request: HttpRequest, row: Model, values: Mapping[str, Any]) -> None:
    """Write down that a row goes, and what it held."""
    record_action(
        actor=signed_in(request),
        action=f"{row._meta.model_name}.delete",
        target=name_target(row),
        before=values,
        reason=reason_of(request),
    )


class AuditedAdmin(AsksWhy, ModelAdmin):
    """Every change is written to the audit trail and reaches all processes within a second."""

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        super().save_model(request, obj, form, change)
        if not change or set(form.changed_data) - {REASON}:
            record_form(request, form, target=name_target(obj), created=not change)
            config_changed()

    def delete_model(self, request: HttpRequest, obj: Any) -> None:
        self._record_deletion(request, [obj])
        super().delete_model(request, obj)

    @transaction.atomic  # unlike a page, an action is none: the news must not go out before the rows are gone
    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        self._record_deletion(request, queryset)
        super().delete_queryset(request, queryset)

    def values_of(self, row: Any) -> dict[str, Any]:
        """What the audit trail keeps of a row that is deleted."""
        return values_of(row)

    def _record_deletion(self, request: HttpRequest, rows: Iterable[Any]) -> None:
        for row in rows:
            record_deletion(request, row, self.values_of(row))
        config_changed()


class ReadOnlyAdmin(AsksWhy, ModelAdmin):
    """A table that the system writes and people read. Rows may be many: none are counted."""

    paginator = InfinitePaginator
    show_full_result_count = False
    list_per_page = 50

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


def show_values(values: Mapping[str, Any]) -> SafeString | str:
    """A small JSON object, one `name value` after the other."""
    if not values:
        return "-"
    return format_html_join(", ", "{} <strong>{}</strong>", ((name, _short(value)) for name, value in values.items()))


def show_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> SafeString | str:
    """`name old → new` of what differs."""
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if not changed:
        return "-"
    parts = ((name, _short(before.get(name)), _short(after.get(name))) for name in changed)
    if before:
        return format_html_join(", ", "{} {} → <strong>{}</strong>", parts)
    return format_html_join(", ", "{0} <strong>{2}</strong>", parts)


def show_key(plaintext: str, owner: str) -> SafeString:
    """The message that shows a key, this once."""
    return format_html(
        "The key of {}: <code style='user-select: all'>{}</code> Copy it now; it cannot be shown again.",
        owner,
        plaintext,
    )


def _told(value: Any) -> Any:
    if isinstance(value, Model):
        return name_target(value)
    if isinstance(value, QuerySet | list | tuple):
        return sorted(map(name_target, value)) if all(isinstance(one, Model) for one in value) else list(value)
    return value


def _former(form: "BaseModelForm[Any]", name: str) -> Any:
    """What a field held before; a form knows of a row that it pointed to only the key."""
    value, field = form.initial.get(name), form.fields.get(name)
    if not isinstance(field, ModelChoiceField) or value is None or isinstance(value, list):
        return value
    pointed_to = form.instance._meta.get_field(name).related_model
    return pointed_to._default_manager.filter(pk=value).first()


def _short(value: Any) -> str:
    text = say_value(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
