"""The engine beside its peers and its limits, in one run.

    python -m benchmarks.engine [--sizes demo,100m] [--parts modes,profile,scaling,prefix,long,precision]
                                [--rounds 3] [--requests 64] [--threads N] [--peers] [--json FILE] [--device cuda]

`modes`: one workload through our four modes, transformers' `generate` one by one and in batches, its continuous
batching, and with `--peers` vLLM for CPUs and llama.cpp's server, which are installed in environments of their own.
`profile`: where the time of our modes goes, by kinds of steps. `scaling`: decode steps of 1 to 32 sequences. `prefix`:
prompts that share beginnings. `long`: a long prompt beside running streams. `precision`: what weights in fewer bits
cost and bring. Rounds are interleaved; medians, with the smallest and largest, and ratios of medians. Shares of the
limit are those of benchmarks/roofline.py. `--device cuda` runs benchmarks/cuda.py in place of all that.
"""

import argparse
import json
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import cuda, engine_parts, precision
from benchmarks.comparison import compare_systems, report_systems
from benchmarks.modes import SIZES, STEP_TOKENS, make_checkpoint, make_workload, processor_name
from benchmarks.roofline import MeteredRunner, Rates, Work, measure_rates
from benchmarks.step_profile import measure_profile
from inference.engine.runner import ModelRunner
from inference.messages import DeploymentSpec

PARTS = ("modes", "profile", "scaling", "prefix", "long", "precision")


def load(path: Path, size: str, rates: Rates, max_batch_size: int = 32) -> MeteredRunner:
    """Our engine in float32 with torch's number of threads."""
    spec = DeploymentSpec(
        name="bench", path=str(path), dtype="float32", max_batch_size=max_batch_size, step_tokens=STEP_TOKENS
    )
    runner = ModelRunner(spec, "cpu", num_threads=torch.get_num_threads())
    print(f"  {runner.describe()}")
    return MeteredRunner(runner, Work.of(SIZES[size]), rates)


def measure(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """All parts asked for, on a checkpoint of that size."""
    print(f"{size}:")
    rates = measure_rates(Work.of(SIZES[size]))
    print(f"  one thread: {rates.flops_per_s / 1e9:.0f} GFLOP/s, {rates.bytes_per_s / 1e9:.1f} GB/s")
    found: dict[str, Any] = {"rates": rates._asdict()}
    parts: dict[str, Callable[[MeteredRunner], Any]] = {
        "profile": lambda runner: measure_profile(runner, make_workload(options.requests, SIZES[size]["vocab_size"])),
        "scaling": lambda runner: engine_parts.measure_scaling(runner, size),
        "prefix": lambda runner: engine_parts.measure_prefix(runner, size, options.requests),
        "long": lambda runner: engine_parts.measure_long_prompt(runner, size),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = make_checkpoint(size, Path(folder))
        runner = load(path, size, rates)
        if "modes" in options.parts:
            found["modes"] = compare_systems(runner, path, size, options.rounds, options.requests, options.peers)
            found["ratios"] = report_systems(found["modes"])
        for name, part in parts.items():
            if name in options.parts:
                found[name] = part(runner)
        if "precision" in options.parts:
            found["precision"] = precision.measure_speed(path, size)
    return found


def main() -> None:
    """Parse options, measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="demo,100m", help="comma-separated: " + ", ".join(SIZES))
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated: " + ", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every system compared")
    parser.add_argument("--peers", action="store_true", help="beside vLLM for CPUs and llama.cpp's server")
    parser.add_argument("--quality", type=Path, metavar="CHECKPOINT", help="measure what rounding costs the demo model")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    options.parts, sizes = options.parts.split(","), options.sizes.split(",")
    if unknown := (set(sizes) - SIZES.keys()) | (set(options.parts) - set(PARTS)):
        parser.error(f"unknown: {unknown.pop()}; there are {', '.join((*SIZES, *PARTS))}")
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    machine = {
        "processor": processor_name(), "threads": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    results: dict[str, Any] = {}
    if options.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("there is no CUDA device here; run this command on a machine that has one")
        results = cuda.measure(options.rounds)
    elif options.quality:
        results["quality"] = precision.measure_quality(options.quality)
    else:
        results = {size: measure(size, options) for size in sizes}
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
