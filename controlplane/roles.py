"""The group administrator: every right but those over superusers, which only superusers have."""

from typing import Any

from django.contrib.auth.models import Group, Permission

ADMINISTRATOR = "administrator"
APPS = ("scheduling", "inference", "dashboard", "controlplane")
ACCOUNTS = ("user", "group")


def grant_administrators(**_: Any) -> None:
    """Give the group every permission that there is, new ones too: an administrator who lacks one helps nobody."""
    group, _created = Group.objects.get_or_create(name=ADMINISTRATOR)
    ours = Permission.objects.filter(content_type__app_label__in=APPS)
    accounts = Permission.objects.filter(content_type__app_label="auth", content_type__model__in=ACCOUNTS)
    group.permissions.add(*ours, *accounts)
