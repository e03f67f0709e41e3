"""A guard knows its revision by the row, whose number may still grow."""

import django.db.models.deletion
from django.db import migrations, models


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
    ]
