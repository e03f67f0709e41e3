"""Fixtures of the acceptance tests: the demo model, trained once for all runs, and a running system."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from inference.demo.stamp import is_trained
from tests.acceptance.dashboard_web import chromium, fleet, page_keys, sessions, visit, visitor, web
from tests.acceptance.whole_system import ROOT, WholeSystem

__all__ = ["chromium", "fleet", "page_keys", "sessions", "visit", "visitor", "web"]


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The folder that `make up` uses, so that the model is trained at most once."""
    folder = ROOT / "var" / "models" / "demo"
    if is_trained(folder):
        return folder
    command = [sys.executable, "-m", "inference.demo.train", "--quiet", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}, timeout=600)
    return folder


@pytest.fixture(scope="session")
def demo_folder(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder in which only the model is there already; in a short path, for the sockets."""
    folder = tmp_path_factory.mktemp("var")
    shutil.copytree(demo_model, folder / "models" / "demo")
    return folder


@pytest.fixture(scope="session")
def system(demo_folder: Path) -> Iterator[WholeSystem]:
    """A running system that the tests share."""
    running = WholeSystem(demo_folder)
    try:
        running.start()
        yield running
    finally:
        if running.supervisor is not None:
            running.stop()
