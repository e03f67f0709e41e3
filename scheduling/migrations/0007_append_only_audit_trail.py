"""The database itself refuses to change or delete rows of the audit trail.

An account that is deleted leaves its rows: `actor_id`, and nothing else, may become NULL. The name stays.
"""

from django.db import migrations

TABLE = 'scheduling_operatoraction'
COLUMNS = 'id, actor_name, "action", target, "before", "after", reason, address, token, created_at'
MESSAGE = 'Rows of the audit trail are never changed or deleted.'
EVENTS = {
    f'{TABLE}_kept': f'BEFORE UPDATE OF {COLUMNS} ON {TABLE} FOR EACH ROW',
    f'{TABLE}_actor': f'BEFORE UPDATE OF actor_id ON {TABLE} FOR EACH ROW WHEN (NEW.actor_id IS NOT NULL)',
    f'{TABLE}_undeleted': f'BEFORE DELETE ON {TABLE} FOR EACH ROW',
}
FUNCTION = f"""
CREATE OR REPLACE FUNCTION {TABLE}_refuse() RETURNS trigger LANGUAGE plpgsql
AS $$ BEGIN RAISE EXCEPTION '{MESSAGE}'; END $$
"""


def make_triggers(apps, schema_editor):
    is_postgres = schema_editor.connection.vendor == 'postgresql'
    if is_postgres:
        schema_editor.execute(FUNCTION)
    refuse = f'EXECUTE FUNCTION {TABLE}_refuse()' if is_postgres else f"BEGIN SELECT RAISE(ABORT, '{MESSAGE}'); END"
    for name, event in EVENTS.items():
        schema_editor.execute(f'CREATE TRIGGER {name} {event} {refuse}')


def drop_triggers(apps, schema_editor):
    is_postgres = schema_editor.connection.vendor == 'postgresql'
    for name in EVENTS:
        schema_editor.execute(f'DROP TRIGGER {name}' + (f' ON {TABLE}' if is_postgres else ''))
    if is_postgres:
        schema_editor.execute(f'DROP FUNCTION {TABLE}_refuse()')


class Migration(migrations.Migration):

    dependencies = [
        ('scheduling', '0006_token_in_the_audit_trail'),
    ]

    operations = [migrations.RunPython(make_triggers, drop_triggers)]
