from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('inference', '0012_upstream_servers'),
    ]

    operations = [
        migrations.AlterField(
            model_name='modeldeployment',
            name='path',
            field=models.CharField(blank=True, help_text="Directory of the checkpoint, at the same path for gpu workers, web and ops. Of an upstream server's model the tokenizer at most is read, to count prompts exactly; empty: their length is guessed until the server says.", max_length=1024),
        ),
    ]
