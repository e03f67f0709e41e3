"""`manage.py add_model`: offers a checkpoint directory under a name."""

import json
from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path
from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError

from inference.checkpoint import CheckpointError
from inference.models import ModelDeployment
from inference.services import register_deployment

OPTIONS = {
    "mode": "mode",
    "dtype": "dtype",
    "quantization": "quantization",
    "batch_size": "max_batch_size",
    "max_model_len": "max_model_len",
    "step_tokens": "step_tokens",
    "kv_memory_mb": "kv_memory_bytes",
    "speculation": "speculation",
    "draft_tokens": "num_draft_tokens",
    "draft_model": "draft_path",
    "sizing": "sizing",
    "sizing_params": "sizing_params",
    "triggers": "triggers",
    "prefix_cache": "prefix_cache",
    "long_prefill_threshold": "long_prefill_threshold",
}


class Command(BaseCommand):
    help = "Offers a decoder-only Hugging Face checkpoint (safetensors; no remote code) to clients."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("name", help="what clients put into `model`")
        parser.add_argument("path", type=Path, help="the checkpoint's directory")
        parser.add_argument("--mode", choices=ModelDeployment.Mode.values, help="how batches form (continuous)")
        parser.add_argument("--dtype", choices=ModelDeployment.Dtype.values, help="arithmetic of the weights (auto)")
        parser.add_argument(
            "--quantization", choices=ModelDeployment.Quantization.values, help="weights in fewer bits (none)"
        )
        parser.add_argument("--batch-size", type=int, help="most sequences in a batch (16)")
        parser.add_argument("--max-model-len", type=int, help="context length (the checkpoint's own)")
        parser.add_argument("--step-tokens", type=int, help="most tokens in one engine step (2048)")
        parser.add_argument(
            "--speculation", choices=ModelDeployment.Speculation.values, help="guess tokens ahead (off)"
        )
        parser.add_argument("--draft-tokens", type=int, help="most tokens guessed ahead (4)")
        parser.add_argument(
            "--draft-model", type=_read_path, metavar="DIRECTORY", help="checkpoint that guesses (--speculation model)"
        )
        parser.add_argument(
            "--sizing", choices=ModelDeployment.Sizing.values, help="strategy that sets the batch size (fixed)"
        )
        parser.add_argument("--sizing-params", type=_read_json, metavar="JSON", help='such as {"largest": 64}')
        parser.add_argument(
            "--triggers", type=_read_json, metavar="JSON", help='what starts a batch, such as {"size": 8}'
        )
        parser.add_argument(
            "--prefix-cache", choices=ModelDeployment.PrefixCache.values, help="who shares prompts' KV blocks (on)"
        )
        parser.add_argument("--long-prefill-threshold", type=int, help="tokens of one prompt in a step (512)")
        parser.add_argument("--kv-memory-mb", type=int, help="size of the KV cache (from free memory)")

    def handle(self, *args: Any, **options: Any) -> None:
        given = {field: options[name] for name, field in OPTIONS.items() if options[name] is not None}
        if "kv_memory_bytes" in given:
            given["kv_memory_bytes"] *= 2**20
        try:
            deployment, info = register_deployment(name=options["name"], path=options["path"], **given)
        except CheckpointError as error:
            raise CommandError(str(error)) from error
        except ValidationError as error:
            raise CommandError(
                " ".join(f"{field}: {' '.join(texts)}" for field, texts in error.message_dict.items())
            ) from error
        self.stdout.write(
            f"{deployment.name}: {info.architecture}, {info.num_parameters / 1e6:.1f}M parameters, "
            f"context {deployment.max_model_len or info.max_model_len}, batches of {deployment.max_batch_size} "
            f"({deployment.mode}). Workers take it up by themselves."
        )


def _read_path(text: str) -> str:
    return str(Path(text).resolve())


def _read_json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"An object is needed, not {text!r}.")
    return value
