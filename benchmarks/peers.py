"""Peers of the gateway: LiteLLM's proxy in a virtual environment of its own, before the dummy upstream."""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.stack import ROOT, ended, free_port, wait_for_http

FOLDER = ROOT / "var" / "peers"
LITELLM = "litellm[proxy]==1.106.2"


@contextmanager
def dummy_upstream() -> Iterator[int]:
    """A dummy upstream; its port."""
    port = free_port()
    with ended(subprocess.Popen([sys.executable, "-m", "benchmarks.dummy_upstream", str(port)], cwd=ROOT)) as process:
        wait_for_http(f"http://127.0.0.1:{port}/", process)
        yield port


@contextmanager
def litellm_proxy(upstream_port: int) -> Iterator[tuple[int, str]]:
    """LiteLLM's proxy with one worker before the upstream; its port and key. Installs it the first time."""
    python = install("litellm", LITELLM)
    port = free_port()
    config = FOLDER / "litellm.json"
    parameters = {"model": "openai/tiny", "api_base": f"http://127.0.0.1:{upstream_port}/v1", "api_key": "none"}
    config.write_text(json.dumps({"model_list": [{"model_name": "tiny", "litellm_params": parameters}]}))
    command = [str(python.parent / "litellm"), "--config", str(config), "--port", str(port), "--num_workers", "1"]
    command += ["--host", "127.0.0.1", "--telemetry", "False"]
    # It would fetch a price list from the network; it carries a copy.
    key = f"sk-{secrets.token_hex(16)}"
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    environment["LITELLM_MASTER_KEY"] = key
    with (FOLDER / "litellm.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=FOLDER, env=environment, stdout=log, stderr=log)
        with ended(process):
            wait_for_http(f"http://127.0.0.1:{port}/health/liveliness", process, 120)
            yield port, key


def install(name: str, requirement: str) -> Path:
    """The interpreter of a peer's own environment, made where it is missing."""
    folder = FOLDER / name
    python = folder / "bin" / "python"
    marker = folder / "installed"
    if not marker.exists() or marker.read_text() != requirement:
        FOLDER.mkdir(parents=True, exist_ok=True)
        print(f"Installing {requirement} under {folder} ...", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *requirement.split()], check=True)
        marker.write_text(requirement)
    return python
