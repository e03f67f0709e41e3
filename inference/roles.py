"""The groups viewer and operator, made whenever the database was migrated and they are missing."""

from typing import Any

from django.contrib.auth.models import Group, Permission

VIEW = {
    "scheduling": ["tenant", "quota", "apikey", "servicelevel", "policyrevision", "operatoraction"],
    "inference": ["modeldeployment", "replica", "wantedreplica", "requestrecord", "batchrecord", "historycheckpoint"],
}
CONTROL = {"scheduling": ["switch_policy"], "inference": ["control_replica"]}


def create_groups(**_: Any) -> None:
    """A viewer sees; an operator also switches policies and controls replicas.

    A group that exists keeps what an administrator made of it.
    """
    views = _permissions({app: [f"view_{name}" for name in names] for app, names in VIEW.items()})
    for name, permissions in (("viewer", views), ("operator", views + _permissions(CONTROL))):
        group, created = Group.objects.get_or_create(name=name)
        if created:
            group.permissions.set(permissions)


def _permissions(codenames: dict[str, list[str]]) -> list[Permission]:
    return [
        permission
        for app, names in codenames.items()
        for permission in Permission.objects.filter(content_type__app_label=app, codename__in=names)
    ]
