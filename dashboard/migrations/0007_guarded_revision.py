"""A guard knows its revision by the row, whose number may still grow."""

import django.db.models.deletion
from django.db import migrations, models


def find_rows(apps, schema_editor):
    """What is watched while the system is updated goes on being watched."""
    guards, revisions = apps.get_model("dashboard", "GuardedSwitch"), apps.get_model("scheduling", "PolicyRevision")
    for guard in guards.objects.filter(state="watching", row=None):
        guard.row = revisions.objects.filter(model=guard.model, revision=guard.revision).first()
        guard.save(update_fields=["row"])


class Migration(migrations.Migration):

    dependencies = [
        ('dashboard', '0006_refused'),
        ('scheduling', '0005_time_per_output_token'),
    ]

    operations = [
        migrations.AddField(
            model_name='guardedswitch',
            name='row',
            field=models.ForeignKey(help_text='The revision itself: its number grows where Redis is ahead of the database.', null=True, on_delete=django.db.models.deletion.SET_NULL, related_name='+', to='scheduling.policyrevision'),
        ),
        migrations.RunPython(find_rows, migrations.RunPython.noop),
    ]
