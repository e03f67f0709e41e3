"""The groups viewer and operator, with what they may see and do of this app."""

from django.apps import apps as installed
from django.contrib.auth.management import create_permissions
from django.db import migrations

VIEWABLE = ["tenant", "quota", "apikey", "servicelevel", "policyrevision", "operatoraction"]
OPERATOR = ["switch_policy"]


def create_groups(apps, schema_editor):
    """Permissions are made after all migrations, too late to be given to a group here: make this app's now."""
    create_permissions(installed.get_app_config("scheduling"), verbosity=0, apps=apps, using=schema_editor.connection.alias)
    Group = apps.get_model("auth", "Group")
    Permission = apps.get_model("auth", "Permission")
    mine = Permission.objects.filter(content_type__app_label="scheduling")
    views = list(mine.filter(codename__in=[f"view_{name}" for name in VIEWABLE]))
    controls = list(mine.filter(codename__in=OPERATOR))
    for name, permissions in (("viewer", views), ("operator", views + controls)):
        group, _ = Group.objects.get_or_create(name=name)
        group.permissions.add(*permissions)


class Migration(migrations.Migration):
    dependencies = [
        ("scheduling", "0001_initial"),
        ("auth", "0012_alter_user_first_name_max_length"),
        ("contenttypes", "0002_remove_content_type_name"),
    ]
    operations = [migrations.RunPython(create_groups, migrations.RunPython.noop)]
