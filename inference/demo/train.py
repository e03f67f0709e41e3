"""Train the demo model, a small Llama, in under a minute on two cores: `python -m inference.demo.train FOLDER`."""

import argparse
import hashlib
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from inference.demo.corpus import conversation, plain_text
from inference.demo.tokenizer import train_tokenizer

SEED = 20260101
CONTEXT = 1024
ROWS = 2
"""Rows of CONTEXT tokens in a batch."""
STEPS = 150
STAMP = "demo.json"


def source_hash() -> str:
    """Identifies what a trained model was made from: the files of this package."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def is_trained(folder: Path) -> bool:
    """Whether `folder` holds the model that this source would train."""
    stamp = folder / STAMP
    return stamp.is_file() and stamp.read_text() == source_hash()


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """About 3.5 million parameters, so that a step is short on any machine."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def _documents(tokenizer: PreTrainedTokenizerFast, random: Random) -> Iterator[list[int]]:
    while True:
        if random.random() < 0.15:
            yield [*tokenizer.encode(plain_text(random)), tokenizer.eos_token_id]
        else:
            text = tokenizer.apply_chat_template(conversation(random), tokenize=False)
            yield tokenizer.encode(text, add_special_tokens=False)


def batches(tokenizer: PreTrainedTokenizerFast, random: Random) -> Iterator[torch.Tensor]:
    """Endless batches of packed documents, int64 `[ROWS, CONTEXT]`; every row starts with a new document."""
    documents = _documents(tokenizer, random)
    while True:
        rows = []
        for _ in range(ROWS):
            row: list[int] = []
            while len(row) < CONTEXT:
                row += next(documents)
            rows.append(row[:CONTEXT])
        yield torch.tensor(rows)


def _optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers (it needs the fewest steps; Jordan et al. 2024), AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=0.004, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _schedule(step: int) -> float:
    """A short warm-up, a plateau, then a cosine to nearly nothing."""
    warmup, decay_from = 10, STEPS // 3
    if step < warmup:
        return (step + 1) / warmup
    if step < decay_from:
        return 1.0
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - decay_from) / (STEPS - decay_from)))


def train(quiet: bool = False) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train tokenizer and model. The same machine and thread count give the same weights."""
    random = Random(SEED)
    torch.manual_seed(SEED)
    sample = [" ".join(m["content"] for m in conversation(random)) for _ in range(2000)]
    tokenizer = train_tokenizer(sample + [plain_text(random) for _ in range(500)], CONTEXT)
    model = build_model(tokenizer).train()
    optimizers = _optimizers(model)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule) for optimizer in optimizers]
    data = batches(tokenizer, random)
    progress = tqdm(range(STEPS), desc="Training the demo model", unit="step", disable=quiet, file=sys.stderr)
    for _ in progress:
        batch = next(data)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        progress.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    return model.eval(), tokenizer


def save(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a Hugging Face checkpoint; it appears whole or not at all."""
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    (draft / STAMP).write_text(source_hash())
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def main() -> None:
    """Train unless FOLDER holds this model already."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the checkpoint goes")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args()
    if is_trained(options.folder):
        return
    options.folder.parent.mkdir(parents=True, exist_ok=True)
    save(options.folder, *train(options.quiet))


if __name__ == "__main__":
    main()
