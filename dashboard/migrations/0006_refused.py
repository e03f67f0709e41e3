"""Refusals for want of capacity among the sums of requests, and rules for an outage in which nothing waits."""

from django.db import migrations, models

RULES = [
    {"name": "No worker serves", "kind": "ready_workers", "threshold": 1, "severity": "critical", "hold_s": 60},
    {
        "name": "Requests are refused", "kind": "refusals", "threshold": 5, "severity": "critical", "window_s": 600,
        "hold_s": 60,
    },
]


def create_rules(apps, schema_editor):
    rule = apps.get_model("dashboard", "AlertRule")
    for values in RULES:
        rule.objects.get_or_create(name=values["name"], defaults=values)


class Migration(migrations.Migration):

    dependencies = [("dashboard", "0005_default_alert_rules")]

    operations = [
        migrations.AddField(
            model_name='requestrollup',
            name='refused',
            field=models.PositiveIntegerField(default=0, verbose_name='refused for want of capacity'),
        ),
        migrations.AlterField(
            model_name='alertrule',
            name='kind',
            field=models.CharField(choices=[('occupancy', 'Batch occupancy while requests wait'), ('queue', 'Waiting requests per ready worker'), ('ready_workers', 'Ready workers of an offered model'), ('refusals', 'Refused for want of capacity'), ('step_time', 'Step time'), ('completion', 'Completion'), ('sla_burn', 'SLA burn rate'), ('telemetry', 'Silence of telemetry'), ('throttling', 'Throttled')], max_length=16),
        ),
        migrations.AlterField(
            model_name='refusalcount',
            name='name',
            field=models.CharField(help_text='model|tenant|reason; model|tenant|priority of the turned away.', max_length=300, primary_key=True, serialize=False),
        ),
        migrations.RunPython(create_rules, migrations.RunPython.noop),
    ]
