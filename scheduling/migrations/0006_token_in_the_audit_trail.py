from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('scheduling', '0005_time_per_output_token'),
    ]

    operations = [
        migrations.AddField(
            model_name='operatoraction',
            name='token',
            field=models.CharField(blank=True, help_text="The beginning of the operator's token that was used; empty for a session.", max_length=16),
        ),
    ]
