"""Tasks of the ops worker that last keep no thread from the others."""

import threading
from importlib import import_module

import pytest
from django.conf import settings

from controlplane.processes import OPS_THREADS, ops_process
from inference.alone import alone
from tests.patience import PATIENCE_S


def test_a_run_that_finds_the_one_before_still_going_ends_at_once() -> None:
    started, finish, runs = threading.Event(), threading.Event(), list[str]()

    @alone
    def work() -> None:
        runs.append(threading.current_thread().name)
        started.set()
        assert finish.wait(PATIENCE_S)

    first = threading.Thread(target=work, name="first")
    first.start()
    assert started.wait(PATIENCE_S)
    work()
    assert runs == ["first"]
    finish.set()
    first.join()
    work()
    assert len(runs) == 2


def test_a_run_that_failed_leaves_the_next_one_free() -> None:
    @alone
    def fail() -> None:
        raise ValueError("each time")

    for _ in range(2):
        with pytest.raises(ValueError, match="each time"):
            fail()


def test_every_task_that_beat_repeats_takes_one_thread_at_most_and_there_are_more() -> None:
    names = [entry["task"].rpartition(".") for entry in settings.CELERY_BEAT_SCHEDULE.values()]
    tasks = [getattr(import_module(module), name) for module, _, name in names]
    assert [task.name for task in tasks if not hasattr(task.run, "__wrapped__")] == []
    assert f"--concurrency={OPS_THREADS}" in ops_process(settings.PENSTOCK).command
