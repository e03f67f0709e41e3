"""`manage.py add_upstream`: offers what an OpenAI-compatible server serves under a name."""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError

from inference.models import ModelDeployment
from inference.services import register_upstream

OPTIONS = {
    "model": "upstream_model",
    "key_variable": "upstream_key",
    "concurrency": "max_batch_size",
    "sizing": "sizing",
    "max_model_len": "max_model_len",
    "first_token_s": "upstream_first_token_s",
    "gap_s": "upstream_gap_s",
}


class Command(BaseCommand):
    help = "Offers a model that another server computes: vLLM, SGLang, llama.cpp, Ollama, LM Studio."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("name", help="what clients put into `model`")
        parser.add_argument("url", help="the server's base address, such as http://127.0.0.1:11434/v1")
        parser.add_argument("--model", help="the model's name on that server (the same)")
        parser.add_argument("--key-variable", metavar="NAME_API_KEY", help="environment variable with the server's key")
        parser.add_argument("--concurrency", type=int, help="requests at once to begin with (4)")
        parser.add_argument("--least", type=int, help="never fewer at once (1)")
        parser.add_argument("--most", type=int, help="never more at once (256)")
        parser.add_argument(
            "--sizing", choices=ModelDeployment.Sizing.values, help="what moves that number (gradient: by latency)"
        )
        parser.add_argument("--max-model-len", type=int, help="context length to admit by (the server's own alone)")
        parser.add_argument("--tokenizer", type=Path, help="directory with tokenizer.json, to count prompts exactly")
        parser.add_argument("--first-token-s", type=float, help="patience for the first token, in seconds (120)")
        parser.add_argument("--gap-s", type=float, help="patience between two tokens, in seconds (30)")

    def handle(self, *args: Any, **options: Any) -> None:
        given = {field: options[name] for name, field in OPTIONS.items() if options[name] is not None}
        bounds = {"smallest": options["least"], "largest": options["most"]}
        if any(value is not None for value in bounds.values()):
            given["sizing_params"] = {name: value for name, value in bounds.items() if value is not None}
        if options["tokenizer"] is not None:
            given["path"] = str(options["tokenizer"].resolve())
        try:
            deployment = register_upstream(name=options["name"], url=options["url"], **given)
        except ValidationError as error:
            raise CommandError(
                " ".join(f"{field}: {' '.join(texts)}" for field, texts in error.message_dict.items())
            ) from error
        self.stdout.write(
            f"{deployment.name}: {deployment.upstream_model or deployment.name} at {deployment.upstream_url}, "
            f"{deployment.max_batch_size} requests at once to begin with ({deployment.sizing}). "
            "Workers take it up by themselves."
        )
