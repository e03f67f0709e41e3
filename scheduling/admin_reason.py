"""The admin asks why: a field in each form that changes something, beside each bulk action, before each deletion."""
# mypy: disable-error-code="misc"
# (the theme comes without types)

from typing import TYPE_CHECKING, Any

from django import forms
from django.contrib import messages
from django.contrib.admin.utils import flatten_fieldsets
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect, QueryDict
from unfold.forms import ActionForm
from unfold.widgets import UnfoldAdminTextInputWidget

if TYPE_CHECKING:
    from unfold.admin import ModelAdmin as Base
else:
    Base = object

REASON = "reason"
MAX_REASON = 500
MISSING = f"Give a reason of at most {MAX_REASON} characters: it is kept in the audit trail. Nothing was changed."


def reason_field(*, required: bool) -> forms.CharField:
    """Why something is changed."""
    return forms.CharField(
        required=required,
        max_length=MAX_REASON,
        widget=UnfoldAdminTextInputWidget(attrs={"autocomplete": "off"}),
        help_text="Why; kept in the audit trail.",
    )


def reason_of(request: HttpRequest) -> str:
    """Without NUL, which PostgreSQL refuses."""
    return request.POST.get(REASON, "").replace("\0", "").strip()[:MAX_REASON]


class ReasonedActionForm(ActionForm):
    """A bulk action, and why."""

    reason = forms.CharField(
        label="",
        required=False,  # the confirmation of a deletion asks for it, too
        max_length=MAX_REASON,
        widget=UnfoldAdminTextInputWidget(
            attrs={
                "aria-label": "Reason, kept in the audit trail",
                "placeholder": "Why? Kept in the audit trail",
                "autocomplete": "off",
                "x-show": "action",
            }
        ),
    )


class AsksWhy(Base):
    """A reason is required where something that stands is changed or deleted; of what is new it may be given."""

    action_form = ReasonedActionForm

    def get_form(self, request: HttpRequest, obj: Any = None, change: bool = False, **kwargs: Any) -> Any:
        if not self._asks(request, obj):
            return super().get_form(request, obj, change=change, **kwargs)
        names = flatten_fieldsets(self.get_fieldsets(request, obj)) if "fields" not in kwargs else kwargs["fields"]
        kwargs["fields"] = names and [name for name in names if name != REASON]
        form = super().get_form(request, obj, change=change, **kwargs)
        return type(form)(form.__name__, (form,), {REASON: reason_field(required=obj is not None)})

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        fieldsets = super().get_fieldsets(request, obj)
        if not self._asks(request, obj) or REASON in flatten_fieldsets(fieldsets):
            return fieldsets
        return [*fieldsets, (None, {"fields": [REASON]})]

    def response_action(self, request: HttpRequest, queryset: Any) -> HttpResponse | None:
        """Without a reason nothing is done. A deletion comes here twice: to be confirmed, and confirmed."""
        chosen = request.POST.getlist("action")
        if any(chosen) and not reason_of(request) and ("delete_selected" not in chosen or "post" in request.POST):
            self.message_user(request, MISSING, messages.ERROR)
            return HttpResponseRedirect(request.get_full_path())
        response: HttpResponse | None = super().response_action(request, queryset)
        return response

    def delete_view(
        self, request: HttpRequest, object_id: str, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        """Without a reason the page asks again."""
        if request.method == "POST" and not reason_of(request):
            if self.has_delete_permission(request):
                self.message_user(request, MISSING, messages.ERROR)
            request.POST = QueryDict()  # not confirmed
        response: HttpResponse = super().delete_view(request, object_id, extra_context)
        return response

    def _asks(self, request: HttpRequest, obj: Any) -> bool:
        may = self.has_add_permission(request) if obj is None else self.has_change_permission(request, obj)
        return bool(may)
