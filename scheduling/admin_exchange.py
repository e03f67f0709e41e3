"""Export and import of tenants in the admin: a file is tried first, and what it would change is shown."""
# mypy: disable-error-code="misc,untyped-decorator"
# (the theme comes without types)

import base64
import binascii
from typing import Any

from django import forms
from django.contrib import messages
from django.core.exceptions import PermissionDenied, ValidationError
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.utils import timezone
from unfold.decorators import action
from unfold.widgets import UnfoldAdminFileFieldWidget, UnfoldAdminTextareaWidget

from scheduling.admin_base import AuditedAdmin, signed_in
from scheduling.tenant_files import FIELDS, MAX_BYTES, FileError, read_current, write_csv, write_json
from scheduling.tenant_import import Plan, StalePlanError, apply_plan, plan_import

MAX_SHOWN = 200
"""Tenants, and problems, that a page lists."""


class ImportForm(forms.Form):
    """The file to try."""

    file = forms.FileField(widget=UnfoldAdminFileFieldWidget, help_text=f"CSV or JSON, at most {MAX_BYTES:,} bytes.")


class ConfirmForm(forms.Form):
    """What was shown, to be done, and why."""

    content = forms.CharField(widget=forms.HiddenInput)
    digest = forms.CharField(widget=forms.HiddenInput)
    reason = forms.CharField(
        max_length=500, widget=UnfoldAdminTextareaWidget(attrs={"rows": 2}), help_text="Kept in the audit trail."
    )


class ExchangeAdmin(AuditedAdmin):
    """Adds the buttons above the list of tenants."""

    actions_list = ["export_csv", "export_json", "import_file"]

    def has_exchange_permission(self, request: HttpRequest) -> bool:
        """Whoever may make and change tenants."""
        return bool(self.has_add_permission(request) and self.has_change_permission(request))

    @action(description="Export CSV", url_path="export-csv", permissions=["view"], icon="download")
    def export_csv(self, request: HttpRequest) -> HttpResponse:
        """All tenants with quotas and targets; no keys."""
        return _download(write_csv(read_current()), "csv", "text/csv; charset=utf-8")

    @action(description="Export JSON", url_path="export-json", permissions=["view"], icon="download")
    def export_json(self, request: HttpRequest) -> HttpResponse:
        """The same, as one JSON object."""
        return _download(write_json(read_current()), "json", "application/json")

    @action(description="Import…", url_path="import", permissions=["exchange"], icon="upload")
    def import_file(self, request: HttpRequest) -> HttpResponse:
        """Ask for a file, show what it would change, and do that once it is confirmed."""
        if not self.has_exchange_permission(request):
            raise PermissionDenied
        if request.method != "POST":
            return self._page(request, form=ImportForm())
        return self._confirm(request) if "digest" in request.POST else self._try(request)

    def _try(self, request: HttpRequest) -> HttpResponse:
        form = ImportForm(request.POST, request.FILES)
        if not form.is_valid():
            return self._page(request, form=form)
        upload = form.cleaned_data["file"]
        try:
            content = upload.read(MAX_BYTES + 1)
            plan = plan_import(content)
        except FileError as error:
            form.add_error("file", str(error))
            return self._page(request, form=form)
        return self._show(request, content, plan)

    def _confirm(self, request: HttpRequest) -> HttpResponse:
        form = ConfirmForm(request.POST)
        try:
            content = base64.b64decode(request.POST.get("content", ""), validate=True)
            plan = plan_import(content)
        except (binascii.Error, ValueError) as error:
            return self._page(request, form=ImportForm(), failure=str(error))
        if not form.is_valid():
            return self._show(request, content, plan, form)
        try:
            apply_plan(
                content, form.cleaned_data["digest"], actor=signed_in(request), reason=form.cleaned_data["reason"]
            )
        except StalePlanError:
            failure = "The tenants have changed since this was shown. This is what the file would change now."
            return self._show(request, content, plan, failure=failure)
        except ValidationError as error:
            return self._show(request, content, plan, failure=" ".join(error.messages))
        num_new = sum(change.is_new for change in plan.changes)
        done = f"{num_new} tenants made, {len(plan.changes) - num_new} changed, {plan.num_same} as they were."
        self.message_user(request, done, messages.SUCCESS)
        return redirect("admin:scheduling_tenant_changelist")

    def _show(
        self, request: HttpRequest, content: bytes, plan: Plan, form: ConfirmForm | None = None, failure: str = ""
    ) -> HttpResponse:
        first = {"content": base64.b64encode(content).decode(), "digest": plan.digest}
        return self._page(request, plan=plan, confirm=form or ConfirmForm(initial=first), failure=failure)

    def _page(self, request: HttpRequest, **context: Any) -> HttpResponse:
        plan: Plan | None = context.get("plan")
        frame = {
            **self.admin_site.each_context(request),
            "opts": self.model._meta,
            "title": "Import tenants",
            "fields": FIELDS,
            "most": MAX_SHOWN,
            "changes": plan.changes[:MAX_SHOWN] if plan else [],
            "problems": plan.problems[:MAX_SHOWN] if plan else [],
            **context,
        }
        return render(request, "admin/scheduling/tenant/import.html", frame)


def _download(text: str, ending: str, kind: str) -> HttpResponse:
    name = f"penstock-tenants-{timezone.now():%Y%m%d-%H%M}.{ending}"
    return HttpResponse(text, content_type=kind, headers={"Content-Disposition": f'attachment; filename="{name}"'})
