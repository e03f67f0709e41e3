"""The rules that every installation begins with. Operators change them; one that was deleted does not come back."""

from django.db import migrations

RULES = [
    {"name": "Batches run half empty", "kind": "occupancy", "threshold": 60, "window_s": 60, "hold_s": 120},
    {"name": "Long queue", "kind": "queue", "threshold": 100, "hold_s": 60},
    {"name": "Slow steps", "kind": "step_time", "threshold": 250, "window_s": 60, "hold_s": 120},
    {
        "name": "Requests fail", "kind": "completion", "threshold": 95, "severity": "critical", "window_s": 600,
        "hold_s": 60,
    },
    # Google's SRE workbook, chapter 5, table 5-8: 2 % of the budget of 30 days in an hour, 5 % in six, 10 % in three days.
    {
        "name": "SLA budget burns fast", "kind": "sla_burn", "threshold": 14.4, "severity": "critical",
        "window_s": 3600, "short_window_s": 300, "hold_s": 0,
    },
    {
        "name": "SLA budget burns", "kind": "sla_burn", "threshold": 6, "severity": "critical",
        "window_s": 21600, "short_window_s": 1800, "hold_s": 0,
    },
    {
        "name": "SLA budget leaks", "kind": "sla_burn", "threshold": 1, "severity": "warning",
        "window_s": 259200, "short_window_s": 21600, "hold_s": 0,
    },
    {"name": "No telemetry", "kind": "telemetry", "threshold": 30, "hold_s": 30},
    {"name": "Device throttled", "kind": "throttling", "threshold": 20, "window_s": 300, "hold_s": 60},
]


def create_rules(apps, schema_editor):
    rule = apps.get_model("dashboard", "AlertRule")
    for values in RULES:
        rule.objects.get_or_create(name=values["name"], defaults=values)


class Migration(migrations.Migration):

    dependencies = [("dashboard", "0004_alerts")]

    operations = [migrations.RunPython(create_rules, migrations.RunPython.noop)]
