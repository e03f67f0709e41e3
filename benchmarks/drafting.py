"""What a small draft model brings, by how often it is right; ratios of one process, the same answers each time.

Run as `python -m benchmarks.drafting [--checkpoint var/models/demo] [--layers 54] [--tokens 64] [--json FILE]`. The
large model is the demo model with so many layers behind its own that add nothing, so that it says the same at many
times the cost; the draft models are the demo model itself, and the same with noise on its weights.
"""

import argparse
import json
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers

from benchmarks.sampling import run
from inference.demo.corpus import conversation
from inference.engine.draft import DraftModel
from inference.engine.runner import ModelRunner
from inference.messages import DeploymentSpec
from inference.tokenization import Tokenizer
from scheduling.core.sequence import SamplingParams, Sequence
from scheduling.core.speculation import Speculation

NOISE = (0.0, 0.1, 0.5)
"""On the draft model's weights, of their spread."""
BATCHES = (1, 4, 16)
NUM_DRAFT_TOKENS = 4
ROUNDS = 2
KINDS = {"greedy": 0.0, "temperature 0.8": 0.8}


def deepen(checkpoint: Path, layers: int, out: Path) -> Path:
    """A checkpoint that says what this one says, with so many more layers, which add zeros to what passes."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    weights = model.state_dict()
    config, num_own = model.config, model.config.num_hidden_layers
    config.update({"num_hidden_layers": num_own + layers})
    deeper: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    deeper.load_state_dict(weights, strict=False)
    for layer in deeper.model.layers[num_own:]:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            torch.nn.init.zeros_(linear.weight)
    deeper.save_pretrained(out)
    return out


def disturb(checkpoint: Path, noise: float, out: Path) -> Path:
    """The checkpoint with noise on its matrices."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * parameter.std() * noise)
    model.save_pretrained(out)
    return out


def make_batch(tokenizer: Tokenizer, size: int, num_tokens: int, temperature: float) -> list[Sequence]:
    """Requests that begin like conversations of the demo model's corpus."""
    rng, batch = Random(5), []
    for i in range(size):
        prompt = tokenizer.encode("\n".join(message["content"] for message in conversation(rng)))[:48]
        params = SamplingParams(temperature=temperature, seed=i, ignore_eos=True)
        batch.append(
            Sequence(
                id=str(i), attempt=1, tenant="t", priority=3, arrival_s=0.0, tokens=prompt,
                num_prompt_tokens=len(prompt), max_tokens=num_tokens, sampling=params,
            )
        )  # fmt: skip
    return batch


def measure(checkpoint: Path, layers: int, num_tokens: int) -> list[dict[str, Any]]:
    """Decode time without drafts over that with them, and how many guesses of a step were right."""
    tokenizer, rows = Tokenizer.load(checkpoint), []
    with tempfile.TemporaryDirectory() as folder:
        large = deepen(checkpoint, layers, Path(folder) / "large")
        runner = ModelRunner(DeploymentSpec(name="large", path=str(large)), num_blocks=400, num_host_blocks=0)
        print(runner.describe())
        for noise in NOISE:
            small = disturb(checkpoint, noise, Path(folder) / f"small-{noise}")
            draft = ModelRunner(DeploymentSpec(name="small", path=str(small)), num_blocks=400, num_host_blocks=0)
            for size in BATCHES:
                for kind, temperature in KINDS.items():
                    row = _compare(runner, draft, tokenizer, size, num_tokens, temperature)
                    rows.append({"noise": noise, "batch": size, "kind": kind, **row})
                    print(
                        f"noise {noise:4.2f}, batch {size:2d}, {kind:15s}: {row['speedup']:4.2f} times as fast; "
                        f"{row['accepted_percent']:3.0f} % of {row['drafted']} guesses right; {row['state']}",
                        flush=True,
                    )
    return rows


def _compare(
    runner: ModelRunner, draft: ModelRunner, tokenizer: Tokenizer, size: int, num_tokens: int, temperature: float
) -> dict[str, Any]:
    plain_s = guessed_s = 0.0
    for _ in range(ROUNDS):
        plain, guessed = (make_batch(tokenizer, size, num_tokens, temperature) for _ in range(2))
        speculation = Speculation(NUM_DRAFT_TOKENS, DraftModel(draft))
        plain_s += run(runner, plain)
        guessed_s += run(runner, guessed, speculation)
        if [s.tokens for s in plain] != [s.tokens for s in guessed]:
            raise RuntimeError("Drafts changed an answer.")
    return {
        "speedup": plain_s / guessed_s,
        "drafted": speculation.num_drafted,
        "accepted_percent": 100 * speculation.num_accepted / max(1, speculation.num_drafted),
        "state": "on" if speculation.is_on else "off",
    }


def main() -> None:
    """Measure, print, and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("var/models/demo"))
    parser.add_argument("--layers", type=int, default=54)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows = measure(options.checkpoint, options.layers, options.tokens)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
