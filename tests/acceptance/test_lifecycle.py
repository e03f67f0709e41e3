"""Start, stop, start again; and the sentences on which a start ends that cannot work."""

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.acceptance.whole_system import MODEL, WholeSystem

pytestmark = pytest.mark.acceptance


@pytest.fixture
def other(demo_folder: Path, tmp_path: Path) -> Iterator[WholeSystem]:
    """A second system, not started yet."""
    shutil.copytree(demo_folder / "models" / "demo", tmp_path / "models" / "demo")
    system = WholeSystem(tmp_path)
    yield system
    if system.supervisor is not None:
        system.stop()


def break_weights(system: WholeSystem) -> None:
    """Cut the file off, as a disk that was full would."""
    weights = system.folder / "models" / "demo" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def test_ctrl_c_stops_everything_and_the_next_start_finds_the_data(other: WholeSystem) -> None:
    other.start()
    keys = other.keys()
    other.client().completions.create(model=MODEL, prompt="Rain", max_tokens=4, user="before")
    # One that still runs when Ctrl-C comes.
    stream = other.client().completions.create(
        model=MODEL, prompt="Rain", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    below = other.processes()
    other.stop()
    stream.close()
    assert not [process for process in below if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert other.supervisor is not None
    assert other.supervisor.returncode == 0

    other.start()
    assert other.keys() == keys
    other.client().completions.create(model=MODEL, prompt="Rain", max_tokens=4)
    assert other.num_records("before") == 1
    assert oct((other.folder / "demo.env").stat().st_mode & 0o777) == "0o600"
    assert other.password() in other.log()

    other.stop()
    break_weights(other)
    sentence = other.refuse()
    assert f"checkpoint of {MODEL} cannot be served" in sentence
    assert "add_model" in sentence


def test_a_second_start_on_the_same_folder_says_that_it_runs_already(system: WholeSystem) -> None:
    assert "runs already" in WholeSystem(system.folder).refuse()


def test_a_taken_port_is_named_with_a_way_out(other: WholeSystem) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", other.port))
        taken.listen()
        sentence = other.refuse()
    assert f"127.0.0.1:{other.port} cannot be used" in sentence
    assert "PENSTOCK_PORT=" in sentence


def test_a_redis_that_does_not_answer_is_named(other: WholeSystem) -> None:
    other.environment["REDIS_URL"] = "redis://127.0.0.1:1/0"
    assert "REDIS_URL names cannot be used" in other.refuse()


def test_a_database_that_does_not_answer_is_named(other: WholeSystem) -> None:
    other.environment["DATABASE_URL"] = "postgres://nobody:x@127.0.0.1:1/nothing"
    assert "DATABASE_URL names a database that cannot be used" in other.refuse()


def test_an_unknown_setting_is_named(other: WholeSystem) -> None:
    other.environment["PENSTOCK_PROT"] = "8001"
    assert "Unknown setting PENSTOCK_PROT" in other.refuse()


def test_a_broken_demo_model_is_named(other: WholeSystem) -> None:
    break_weights(other)
    sentence = other.refuse()
    assert "The demo model cannot be served" in sentence
    assert "Remove" in sentence
