"""The benchmark's profile of our modes: every step and token is in it, once, and in the right row."""

from pathlib import Path
from typing import get_args

import pytest

from benchmarks.modes import Request
from benchmarks.roofline import MeteredRunner, Rates, Work
from benchmarks.step_profile import PROMPTS, measure_profile
from inference.engine.runner import ModelRunner
from inference.messages import BatchMode, DeploymentSpec
from tests.checkpoints import SIZES, make_checkpoint


def test_every_step_of_a_mode_is_of_one_kind(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    runner = ModelRunner(DeploymentSpec(name="m", path=str(tmp_path), max_batch_size=16), "cpu")
    workload = [Request([5 + i] * (3 + i), 2 + 3 * i) for i in range(20)]
    found = measure_profile(MeteredRunner(runner, Work.of(SIZES), Rates(1e12, 1e9)), workload)
    for mode in get_args(BatchMode):
        kinds = found[mode]["kinds"].values()
        assert sum(kind["tokens"] for kind in kinds) == sum(request.num_tokens for request in workload)
        assert sum(kind["share"] for kind in kinds) == pytest.approx(1)
    assert set(found["serial"]["kinds"]) == {PROMPTS, "1 decoding"}
    assert found["serial"]["kinds"][PROMPTS]["tokens"] == len(workload), "a prompt's first token comes with it"
    assert found["static"]["kinds"]["16 decoding"]["steps"] == 1, "the shortest of the first batch ends then"
    assert found["least_s_static_over_continuous"] > 1
