"""Admin of accounts, groups and operators' tokens, in the theme of the rest."""
# mypy: disable-error-code="misc,type-arg,untyped-decorator"
# (the theme comes without types)

from typing import Any

from django.contrib import admin, messages
from django.contrib.auth.admin import GroupAdmin as DjangoGroupAdmin
from django.contrib.auth.admin import UserAdmin as DjangoUserAdmin
from django.contrib.auth.models import Group, User
from django.db import transaction
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from unfold.admin import ModelAdmin
from unfold.decorators import action, display
from unfold.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm

from controlplane.admin_site import record_password
from controlplane.models import OperatorToken
from controlplane.tokens import create_token, revoke_token
from scheduling.admin_base import AuditedAdmin, describe, record_deletion, show_key, signed_in
from scheduling.admin_reason import AsksWhy, reason_field, reason_of
from scheduling.audit import record_action

admin.site.unregister(User)
admin.site.unregister(Group)


class PasswordForm(AdminPasswordChangeForm):
    """The theme's, with the question why."""

    reason = reason_field(required=True)


FOR_SUPERUSERS = ("is_superuser", "user_permissions")
"""Fields of an account by which somebody could rise above the group administrator."""


@admin.register(User)
class UserAdmin(AsksWhy, DjangoUserAdmin, ModelAdmin):
    """Who may sign in: viewers, operators and administrators by their group; superusers may do everything."""

    form = UserChangeForm
    add_form = UserCreationForm
    change_password_form = PasswordForm
    change_user_password_template = "admin/auth/user/why_password.html"  # noqa: S105 - a template
    list_display = ["username", "email", "first_name", "last_name", "roles", "is_active", "is_superuser"]
    list_filter = ["groups", "is_active", "is_superuser"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[User]:
        rows: QuerySet[User] = super().get_queryset(request)
        return rows.prefetch_related("groups")

    @display(description="groups")
    def roles(self, user: User) -> str:
        return ", ".join(sorted(group.name for group in user.groups.all())) or "-"

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        """Only superusers make superusers."""
        fields = super().get_readonly_fields(request, obj)
        return fields if signed_in(request).is_superuser else (*fields, *FOR_SUPERUSERS)

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return bool(super().has_change_permission(request, obj)) and _may_touch(request, obj)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return bool(super().has_delete_permission(request, obj)) and _may_touch(request, obj)

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[User]) -> None:
        """Delete those that may be touched, each with its line in the audit trail."""
        for user in queryset:
            if _may_touch(request, user):
                self.delete_model(request, user)

    def delete_model(self, request: HttpRequest, obj: User) -> None:
        record_deletion(request, obj, _account(obj))
        super().delete_model(request, obj)

    def save_model(self, request: HttpRequest, obj: User, form: Any, change: bool) -> None:
        form.former = _account(User.objects.get(pk=obj.pk)) if change else {}
        super().save_model(request, obj, form, change)

    def save_related(self, request: HttpRequest, form: Any, formsets: Any, change: bool) -> None:
        """Save, and write down what the account is now and may do, where that is new."""
        super().save_related(request, form, formsets, change)
        user = form.instance
        if form.former == (after := _account(user)):
            return
        record_action(
            actor=signed_in(request),
            action=f"user.{'update' if change else 'create'}",
            target=user.get_username(),
            before=form.former,
            after=after,
            reason=reason_of(request),
        )

    @transaction.atomic
    def user_change_password(self, request: HttpRequest, id: str, form_url: str = "") -> HttpResponse:
        """Django's page, written into the audit trail: neither password is."""
        former = self.get_object(request, id)
        response: HttpResponse = super().user_change_password(request, id, form_url)
        user = self.get_object(request, id)
        if former is not None and user is not None and former.password != user.password:
            record_password(signed_in(request), user, reason_of(request))
        return response


def _account(user: User) -> dict[str, Any]:
    """An account as the audit trail keeps it."""
    names = ("username", "first_name", "last_name", "email", "is_active", "is_staff", "is_superuser")
    permissions = user.user_permissions.values_list("content_type__app_label", "codename")
    return {name: getattr(user, name) for name in names} | {
        "groups": sorted(user.groups.values_list("name", flat=True)),
        "user_permissions": sorted(f"{app}.{codename}" for app, codename in permissions),
    }


def _may_touch(request: HttpRequest, user: User | None) -> bool:
    return user is None or not user.is_superuser or signed_in(request).is_superuser


@admin.register(Group)
class GroupAdmin(DjangoGroupAdmin, AuditedAdmin):
    """What viewers and operators may do. Administrators may do everything; their group is filled by the system."""

    def values_of(self, row: Group) -> dict[str, Any]:
        """With its rights and whose they were."""
        members = row.user_set.values_list("username", flat=True)
        return describe({"name": row.name, "permissions": row.permissions.all()}) | {"users": sorted(members)}

    def has_add_permission(self, request: HttpRequest) -> bool:
        return signed_in(request).is_superuser

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return signed_in(request).is_superuser

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return signed_in(request).is_superuser


@admin.register(OperatorToken)
class OperatorTokenAdmin(AsksWhy, ModelAdmin):
    """Tokens by which scripts act as a user. One makes one's own; a superuser makes those of others, too."""

    list_display = ["name", "user", "shown", "status", "created_at", "expires_at", "last_used_at"]
    list_select_related = ["user"]
    search_fields = ["name", "user__username", "prefix"]
    search_help_text = "Name, user, or the eight characters after pso-"
    list_filter = [("revoked_at", admin.EmptyFieldListFilter)]
    actions = ["revoke"]

    def get_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        made = ["shown", "status", "created_at", "last_used_at", "revoked_at"] if obj else []
        return ["user", "name", *made, "expires_at"]

    @display(description="token", ordering="prefix")
    def shown(self, token: OperatorToken) -> str:
        return token.shown

    @display(description="status", label={"active": "success", "ended": "danger"})
    def status(self, token: OperatorToken) -> str:
        return "active" if token.active else "ended"

    def get_actions(self, request: HttpRequest) -> Any:
        """Tokens are revoked, and stay for the record."""
        return {name: value for name, value in super().get_actions(request).items() if name != "delete_selected"}

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def formfield_for_foreignkey(self, db_field: Any, request: HttpRequest, **kwargs: Any) -> Any:
        """What a token does is its user's doing, so nobody but a superuser makes one of somebody else's."""
        user = signed_in(request)
        users = User.objects.filter(is_active=True)
        kwargs["queryset"] = users if user.is_superuser else users.filter(pk=user.pk)
        return super().formfield_for_foreignkey(db_field, request, **kwargs)

    def save_model(self, request: HttpRequest, obj: OperatorToken, form: Any, change: bool) -> None:
        """Make the token and show it, this once."""
        given: dict[str, Any] = {"actor": signed_in(request), "reason": reason_of(request)}
        token, plaintext = create_token(user=obj.user, name=obj.name, expires_at=obj.expires_at, **given)
        obj.pk = token.pk
        messages.success(request, show_key(plaintext, str(token)))

    @action(description="Revoke: refuse calls with them", permissions=["add"])
    def revoke(self, request: HttpRequest, queryset: QuerySet[OperatorToken]) -> None:
        for token in queryset.select_related("user"):
            revoke_token(token=token, actor=signed_in(request), reason=reason_of(request))
