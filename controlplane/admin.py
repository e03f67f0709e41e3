"""Admin of accounts, groups and operators' tokens, in the theme of the rest."""
# mypy: disable-error-code="misc,type-arg,untyped-decorator"
# (the theme comes without types)

from typing import Any

from django.contrib import admin, messages
from django.contrib.auth.admin import GroupAdmin as DjangoGroupAdmin
from django.contrib.auth.admin import UserAdmin as DjangoUserAdmin
from django.contrib.auth.models import Group, User
from django.db.models import QuerySet
from django.http import HttpRequest
from unfold.admin import ModelAdmin
from unfold.decorators import action, display
from unfold.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm

from controlplane.models import OperatorToken
from controlplane.tokens import create_token, revoke_token
from scheduling.admin_base import show_key, signed_in
from scheduling.audit import record_action

admin.site.unregister(User)
admin.site.unregister(Group)

FOR_SUPERUSERS = ("is_superuser", "user_permissions")
"""Fields of an account by which somebody could rise above the group administrator."""


@admin.register(User)
class UserAdmin(DjangoUserAdmin, ModelAdmin):
    """Who may sign in: viewers, operators and administrators by their group; superusers may do everything."""

    form = UserChangeForm
    add_form = UserCreationForm
    change_password_form = AdminPasswordChangeForm
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
        record_action(actor=signed_in(request), action="user.delete", target=obj.get_username())
        super().delete_model(request, obj)

    def save_related(self, request: HttpRequest, form: Any, formsets: Any, change: bool) -> None:
        """Save, and write down what the account may now do."""
        user, names = form.instance, ("is_active", "is_staff", "is_superuser")
        before = {name: form.initial.get(name) for name in names} if change else {}
        if change:
            before["groups"] = sorted(user.groups.values_list("name", flat=True))
        super().save_related(request, form, formsets, change)
        after = {name: getattr(user, name) for name in names}
        after["groups"] = sorted(user.groups.values_list("name", flat=True))
        kind = "update" if change else "create"
        record_action(
            actor=signed_in(request), action=f"user.{kind}", target=user.get_username(), before=before, after=after
        )


def _may_touch(request: HttpRequest, user: User | None) -> bool:
    return user is None or not user.is_superuser or signed_in(request).is_superuser


@admin.register(Group)
class GroupAdmin(DjangoGroupAdmin, ModelAdmin):
    """What viewers and operators may do. Administrators may do everything; their group is filled by the system."""

    def has_add_permission(self, request: HttpRequest) -> bool:
        return signed_in(request).is_superuser

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return signed_in(request).is_superuser

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return signed_in(request).is_superuser


@admin.register(OperatorToken)
class OperatorTokenAdmin(ModelAdmin):
    """Tokens by which scripts act as a user."""

    list_display = ["name", "user", "shown", "status", "created_at", "expires_at", "last_used_at"]
    list_select_related = ["user"]
    search_fields = ["name", "user__username", "prefix"]
    search_help_text = "Name, user, or the eight characters after pso-"
    fields = ["user", "name", "expires_at"]
    actions = ["revoke"]

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
        """Only superusers make tokens that act as one."""
        users = User.objects.filter(is_active=True)
        kwargs["queryset"] = users if signed_in(request).is_superuser else users.filter(is_superuser=False)
        return super().formfield_for_foreignkey(db_field, request, **kwargs)

    def save_model(self, request: HttpRequest, obj: OperatorToken, form: Any, change: bool) -> None:
        """Make the token and show it, this once."""
        token, plaintext = create_token(
            user=obj.user, name=obj.name, expires_at=obj.expires_at, actor=signed_in(request)
        )
        obj.pk = token.pk
        messages.success(request, show_key(plaintext, str(token)))

    @action(description="Revoke: refuse calls with them", permissions=["add"])
    def revoke(self, request: HttpRequest, queryset: QuerySet[OperatorToken]) -> None:
        for token in queryset.select_related("user"):
            revoke_token(token=token, actor=signed_in(request), reason="revoked in the admin")
