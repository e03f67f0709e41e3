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


DEMO = ROOT / "var" / "models" / "demo"
"""The folder that `make up` uses, so that the model is trained at most once."""
TRAINING = pytest.StashKey["subprocess.Popen[bytes]"]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Train the model while the tests that come first run, where some will need it; it takes the time they leave."""
    needed = any("demo_model" in getattr(item, "fixturenames", ()) for item in session.items)
    if not needed or is_trained(DEMO) or session.config.option.collectonly:
        return
    command = ["nice", "-n", "19", sys.executable, "-m", "inference.demo.train", "--quiet", str(DEMO)]
    quiet = {"OMP_WAIT_POLICY": "PASSIVE", "TQDM_DISABLE": "1"}
    training = subprocess.Popen(command, cwd=ROOT, env=os.environ | quiet)
    session.config.stash[TRAINING] = training
    session.config.add_cleanup(lambda: end(training))


def end(training: "subprocess.Popen[bytes]") -> None:
    """Leave nothing behind, whatever ended the run."""
    training.kill()
    training.wait()


@pytest.fixture(scope="session")
def demo_model(pytestconfig: pytest.Config) -> Path:
    """Its folder."""
    training = pytestconfig.stash.get(TRAINING, None)
    if training is not None:
        assert training.wait(600) == 0
    assert is_trained(DEMO)
    return DEMO


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
