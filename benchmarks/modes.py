"""One workload, and the systems of this process that run it: our four modes, and what transformers offers.

All start with the same requests waiting, and every request asks for its own number of tokens (end-of-sequence tokens
are ignored), greedy, in float32.
"""

import platform
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from benchmarks.roofline import MeteredRunner
from inference.messages import BatchMode
from scheduling.core.blocks import BlockAllocator
from scheduling.core.planner import StepPlanner
from scheduling.core.sequence import SamplingParams, Sequence

SLOTS = 16
STEP_TOKENS = 512
MAX_MODEL_LEN = 512
SIZES: dict[str, dict[str, Any]] = {
    "demo": {
        "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "100m": {
        "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 12, "num_key_value_heads": 4,
    },
}  # fmt: skip
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


class Request(NamedTuple):
    """A prompt, and how many tokens are wanted."""

    prompt: list[int]
    num_tokens: int


class Answer(NamedTuple):
    """The tokens of one request, and when each came, in seconds since the requests did."""

    tokens: list[int]
    times_s: list[float]


Answers = list[Answer]


def make_workload(num_requests: int, vocab_size: int, seed: int = 1) -> list[Request]:
    """Prompts of 16 to 256 tokens, answers of 8 to 256: Pareto with shape 0.8, cut at 256."""
    rng = random.Random(seed)
    requests = []
    for _ in range(num_requests):
        prompt = [rng.randrange(3, vocab_size) for _ in range(rng.randint(16, 256))]
        requests.append(Request(prompt, min(256, int(8 * rng.paretovariate(0.8)))))
    return requests


def make_checkpoint(size: str, folder: Path) -> Path:
    """A random Llama checkpoint, seeded."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES[size], max_position_embeddings=MAX_MODEL_LEN, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / size)
    return folder / size


def run_ours(runner: MeteredRunner, mode: BatchMode, workload: list[Request]) -> Answers:
    """The engine's loop: claim what there is room for, plan, step, apply."""
    runner.reset()
    planner = StepPlanner(
        mode, SLOTS, STEP_TOKENS, BlockAllocator(runner.num_blocks, runner.block_size), runner.max_model_len,
        time.monotonic,
    )  # fmt: skip
    sequences = [make_sequence(i, request) for i, request in enumerate(workload)]
    return drive(planner, runner, sequences)


def make_sequence(index: int, request: Request) -> Sequence:
    """A request as the planner takes it."""
    return Sequence(
        id=str(index), attempt=1, tenant="bench", priority=3, arrival_s=0.0, tokens=list(request.prompt),
        num_prompt_tokens=len(request.prompt), max_tokens=request.num_tokens, sampling=GREEDY,
    )  # fmt: skip


def drive(
    planner: StepPlanner, runner: MeteredRunner, sequences: list[Sequence], arrivals_s: list[float] | None = None
) -> Answers:
    """Run sequences to their ends. They come at `arrivals_s`, by default at once; times count from there."""
    arrivals = arrivals_s or [0.0] * len(sequences)
    times: dict[str, list[float]] = {sequence.id: [] for sequence in sequences}
    waiting = list(reversed(list(zip(arrivals, sequences, strict=True))))
    unfinished, start = len(sequences), time.perf_counter()
    while unfinished:
        now = time.perf_counter() - start
        room = planner.room().requests
        while room and waiting and waiting[-1][0] <= now:
            planner.add(waiting.pop()[1])
            room -= 1
        parts = planner.plan(time.monotonic())
        if not parts:
            time.sleep(max(0.0, waiting[-1][0] - now) if waiting else 0.001)
            continue
        wait = runner.start(parts)
        if runner.runner.runs_ahead:
            runner.runner.foresee(planner.foresee(parts))
        outputs = planner.apply(parts, wait())
        now = time.perf_counter() - start
        for output in outputs:
            if output.error:
                raise RuntimeError(output.error)
            times[output.sequence.id].append(now - arrivals[int(output.sequence.id)])
            unfinished -= output.finish is not None
        runner.turns_s += time.perf_counter() - start - now
    runner.elapsed_s = time.perf_counter() - start
    return [Answer(s.tokens[s.num_prompt_tokens :], times[s.id]) for s in sequences]


class Clock(transformers.StoppingCriteria):
    """Stops nothing; notes when each step of `generate` is done."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **unused: Any) -> torch.Tensor:
        """Called after each step."""
        self.times_s.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


@torch.inference_mode()
def run_generate(model: Any, slots: int, workload: list[Request]) -> Answers:
    """transformers' `generate` in batches, padded on the left; a batch runs until its longest answer is done."""
    answers: Answers = []
    start = time.perf_counter()
    for at in range(0, len(workload), slots):
        batch = workload[at : at + slots]
        longest, clock = max(len(r.prompt) for r in batch), Clock()
        padded = [[0] * (longest - len(r.prompt)) + r.prompt for r in batch]
        mask = [[0] * (longest - len(r.prompt)) + [1] * len(r.prompt) for r in batch]
        out = model.generate(
            torch.tensor(padded), attention_mask=torch.tensor(mask), max_new_tokens=max(r.num_tokens for r in batch),
            do_sample=False, eos_token_id=None, pad_token_id=0, stopping_criteria=[clock],
        )  # fmt: skip
        times = [t - start for t in clock.times_s]
        for row, r in zip(out, batch, strict=True):
            answers.append(Answer(row[longest : longest + r.num_tokens].tolist(), times[: r.num_tokens]))
    return answers


def run_transformers_continuous(
    model: Any, workload: list[Request], slots: int = SLOTS, step_tokens: int = STEP_TOKENS
) -> Answers:
    """transformers' own continuous batching, with as many slots and as large a step."""
    settings = transformers.ContinuousBatchingConfig(
        page_size=32, num_blocks=slots * MAX_MODEL_LEN // 32, max_batch_tokens=step_tokens,
        max_requests_per_batch=slots, allow_block_sharing=False,
    )  # fmt: skip
    generation = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=256)
    found: dict[str, Answer] = {}
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=settings, timeout=5
    ) as manager:
        start = time.perf_counter()
        for i, request in enumerate(workload):
            manager.add_request(
                request.prompt, request_id=str(i), max_new_tokens=request.num_tokens, record_timestamps=True
            )
        while len(found) < len(workload):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("transformers' continuous batching stopped before its end.")
            if result is not None and result.is_finished():
                if result.error:
                    raise RuntimeError(result.error)
                times = [t - start for t in result.timestamps or []]
                found[result.request_id] = Answer(list(result.generated_tokens), times)
    return [found[str(i)] for i in range(len(workload))]


def processor_name() -> str:
    """The processor as Linux names it, elsewhere as Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
