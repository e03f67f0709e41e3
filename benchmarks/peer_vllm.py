"""Runs a workload through vLLM's engine; for the interpreter of vLLM's own environment.

Reads one JSON object from standard input and prints a JSON line a round: seconds, and per request its tokens and when
each came.
"""

import json
import sys
import time


def main() -> None:
    """Load, run a short warm-up, then the workload."""
    began = time.perf_counter()
    job = json.load(sys.stdin)
    from vllm import EngineArgs, LLMEngine, SamplingParams

    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=job["path"], skip_tokenizer_init=True, dtype="float32", max_num_seqs=job["slots"],
            max_num_batched_tokens=job["step_tokens"], max_model_len=job["max_model_len"],
            enforce_eager=not job["compiled"], enable_prefix_caching=False, disable_log_stats=True,
        )
    )  # fmt: skip

    def run(requests: list) -> dict:  # type: ignore[type-arg]
        found: dict = {}  # type: ignore[type-arg]
        start = time.perf_counter()
        for i, (prompt, count) in enumerate(requests):
            params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
            engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
            found[str(i)] = ([], [])
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter() - start
            for output in outputs:
                tokens, times = found[output.request_id]
                new = output.outputs[0].token_ids
                times += [now] * (len(new) - len(tokens))
                tokens[:] = new
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "answers": [found[str(i)] for i in range(len(requests))]}

    print(f"STAGE loaded and compiled in {time.perf_counter() - began:.0f} s", flush=True)
    run([[prompt[:32], 4] for prompt, _ in job["requests"][: job["slots"]]])
    for number in range(job["rounds"]):
        print(f"STAGE {number} rounds of {job['rounds']} run", flush=True)
        print("RESULT " + json.dumps(run(job["requests"])), flush=True)


if __name__ == "__main__":
    main()
