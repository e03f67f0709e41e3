"""What the groups viewer and operator may see and do of this app."""

from django.apps import apps as installed
from django.contrib.auth.management import create_permissions
from django.db import migrations

VIEWABLE = ["modeldeployment", "replica", "requestrecord", "batchrecord"]
OPERATOR = ["control_replica"]


def add_permissions(apps, schema_editor):
    """As in the scheduling app, whose migration made the groups."""
    create_permissions(installed.get_app_config("inference"), verbosity=0, apps=apps, using=schema_editor.connection.alias)
    Group = apps.get_model("auth", "Group")
    Permission = apps.get_model("auth", "Permission")
    mine = Permission.objects.filter(content_type__app_label="inference")
    views = list(mine.filter(codename__in=[f"view_{name}" for name in VIEWABLE]))
    controls = list(mine.filter(codename__in=OPERATOR))
    Group.objects.get(name="viewer").permissions.add(*views)
    Group.objects.get(name="operator").permissions.add(*views, *controls)


class Migration(migrations.Migration):
    dependencies = [("inference", "0001_initial"), ("scheduling", "0002_groups")]
    operations = [migrations.RunPython(add_permissions, migrations.RunPython.noop)]
