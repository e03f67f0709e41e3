"""Train the demo model, a small Llama, in under a minute on two cores: `python -m inference.demo.train FOLDER`."""

import argparse
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
from inference.demo.stamp import STAMP, is_trained, source_hash
from inference.demo.tokenizer import train_tokenizer

SEED = 20260101
CONTEXT = 1024
BATCH_TOKENS = 1536
STEPS = 250
LONG_EVERY = 10
"""One step in so many sees rows of CONTEXT tokens; the others, rows of SHORT tokens, which are cheaper and teach faster."""
SHORT = 256
QUESTION_WEIGHT = 0.1
MATRIX_RATE, EMBEDDING_RATE = 0.02, 0.006


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Two million parameters, so that a step is short on any machine."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def _documents(tokenizer: PreTrainedTokenizerFast, random: Random) -> Iterator[list[tuple[int, float]]]:
    """Documents as tokens with the weight of each in the loss: answers count, questions hardly."""
    while True:
        if random.random() < 0.1:
            yield [(token, 1.0) for token in (*tokenizer.encode(plain_text(random)), tokenizer.eos_token_id)]
            continue
        document = [(tokenizer.bos_token_id, QUESTION_WEIGHT)]
        for message in conversation(random):
            weight = 1.0 if message["role"] == "assistant" else QUESTION_WEIGHT
            document.append((tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>"), QUESTION_WEIGHT))
            document += [(token, weight) for token in tokenizer.encode(message["content"], add_special_tokens=False)]
            if message["role"] == "assistant":
                document.append((tokenizer.eos_token_id, 1.0))
        yield document


def batches(tokenizer: PreTrainedTokenizerFast, random: Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A batch for every step: packed documents, int64 `[rows, tokens]`, and the weights of their tokens in the loss.

    Every row starts with a new document.
    """
    documents = _documents(tokenizer, random)
    for step in range(STEPS):
        num_tokens = CONTEXT if step % LONG_EVERY == 0 else SHORT
        rows = []
        for _ in range(max(1, BATCH_TOKENS // num_tokens)):
            row: list[tuple[int, float]] = []
            while len(row) < num_tokens:
                row += next(documents)
            rows.append(row[:num_tokens])
        yield torch.tensor([[t for t, _ in row] for row in rows]), torch.tensor([[w for _, w in row] for row in rows])


def weighted_loss(model: LlamaForCausalLM, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the next token."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def _optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers (it needs the fewest steps; Jordan et al. 2024), AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=EMBEDDING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _schedule(step: int) -> float:
    """A short warm-up, a plateau, then a cosine to nearly nothing."""
    warmup, decay_from = 10, STEPS // 2
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
        loss = weighted_loss(model, *next(data))
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
