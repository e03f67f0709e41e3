"""The admin's form of an upstream server's model."""

from typing import Any

from django import forms

from inference.models import ModelDeployment
from inference.services import FIRST_CONCURRENCY

FIELDS = [
    "name",
    "upstream_url",
    "upstream_model",
    "upstream_key",
    "max_batch_size",
    "sizing",
    "sizing_params",
    "upstream_first_token_s",
    "upstream_gap_s",
    "max_model_len",
    "path",
    "enabled",
]


class UpstreamForm(forms.ModelForm):  # type: ignore[type-arg]  # generic for the checker alone
    """What a checkpoint's deployment has beside these fields means nothing here."""

    class Meta:
        model = ModelDeployment
        fields = FIELDS
        labels = {
            "upstream_url": "Server's address",
            "upstream_model": "Model's name there",
            "max_batch_size": "Requests at once",
            "sizing": "What moves that number",
            "path": "Tokenizer",
        }
        help_texts = {
            "max_batch_size": "With the server, to begin with.",
            "path": "Directory with the model's tokenizer.json, on the web machines: prompts are then counted exactly. "
            "Empty: their length is guessed until the server says.",
            "max_model_len": "Prompt and completion tokens that are admitted; 0 leaves that to the server.",
        }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.instance.pk is None:
            self.instance.backend = ModelDeployment.Backend.OPENAI
            self.initial = {
                "max_batch_size": FIRST_CONCURRENCY,
                "sizing": ModelDeployment.Sizing.GRADIENT,
                **{name: value for name, value in self.initial.items() if name not in ("max_batch_size", "sizing")},
            }
        elif "name" in self.fields:  # a page that is only read has none
            self.fields["name"].disabled = True  # clients ask for it, and history knows it
        if "upstream_url" in self.fields:
            self.fields["upstream_url"].required = True
