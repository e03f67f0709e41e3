"""`manage.py replay`: compares policies on a trace, and predicts what a recorded engine did."""

import json
import random
from dataclasses import astuple
from datetime import timedelta
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command
from django.db.models import F

from inference.models import BatchRecord, ModelDeployment, RequestRecord
from inference.recorded import HistoryError, read_history
from inference.recorded_cost import learn_claim_s
from inference.what_if import Candidate, run_what_if
from scheduling.core.simulation.trace import TraceRequest
from scheduling.core.sizing.cost_model import DEFAULT_COST, StepCost
from scheduling.models import Tenant
from tests.integration.recorded_run import START, record_run

Capture = pytest.CaptureFixture[str]
COST = StepCost(step_s=0.004, prefill_token_s=4e-5, decode_sequence_s=4e-4, context_token_s=3e-7, attention_pair_s=2e-9)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    draw = random.Random(1)
    rows = sorted(
        (draw.uniform(0, 60), draw.choice("ab"), draw.randint(1, 400), draw.randint(1, 80)) for _ in range(300)
    )
    lines = [f"{at:.6f},{tenant},{prompt},{output}\n" for at, tenant, prompt, output in sorted(rows)]
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,tenant,prompt_tokens,output_tokens\n" + "".join(lines))
    return path


def test_policies_are_compared_in_table_json_and_chart(trace: Path, tmp_path: Path, capsys: Capture) -> None:
    figures, chart = tmp_path / "out.json", tmp_path / "out.html"
    options = ["--policies=fifo,fair", "--rate=4", "--limit=200", "--batch-size=4", "--replicas=2", "--kv-blocks=200"]
    call_command("replay", str(trace), *options, f"--json={figures}", f"--chart={chart}")
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split() == ["fifo", "fair"]
    assert "200 of 200" in out
    assert "fifo: 200 of 200 requests" in err
    assert "times faster than real time" in err
    reports = json.loads(figures.read_text())["reports"]
    assert [report["label"] for report in reports] == ["fifo", "fair"]
    assert all(report["total"]["finished"] == 200 and report["max_batch_size"] <= 4 for report in reports)
    assert chart.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("options", [["--sizing=adaptive"], ["--mode=dynamic"], ["--queue-limit=3", "--rate=50"]])
def test_sizing_mode_and_backpressure_can_be_chosen(trace: Path, capsys: Capture, options: list[str]) -> None:
    call_command("replay", str(trace), "--policies=priority", *options)
    out = capsys.readouterr().out
    refused = next(line for line in out.splitlines() if line.startswith("refused"))
    assert (refused.split()[-1] != "0") == ("--queue-limit=3" in options)


def test_tenants_limits_and_weights_and_a_policy_s_parameters_are_the_operator_s(
    trace: Path, tmp_path: Path, capsys: Capture
) -> None:
    tenants, figures = tmp_path / "tenants.json", tmp_path / "out.json"
    tenants.write_text('{"a": {"rpm": 30, "weight": 4}, "b": {}}')
    options = ["--policies=fair,fifo", '--params={"fair": {"output_price": 9}}', f"--tenants={tenants}"]
    call_command("replay", str(trace), *options, f"--json={figures}", '--trigger={"size": 4}', "--mode=dynamic")
    out = capsys.readouterr().out
    assert "requests_per_minute" in out
    for report in json.loads(figures.read_text())["reports"]:
        assert report["refusals"].keys() == {"requests_per_minute"}
        assert report["tenants"]["a"]["refused"] > 50
        assert report["tenants"]["b"]["refused"] == 0


def test_a_cost_file_decides_how_long_steps_take(trace: Path, tmp_path: Path, capsys: Capture) -> None:
    slow = tmp_path / "slow.json"
    StepCost(step_s=0.5, prefill_token_s=0, decode_sequence_s=0, context_token_s=0).save(slow)
    call_command("replay", str(trace), "--policies=fifo", "--limit=1", f"--cost={slow}")
    tenant = next(line for line in capsys.readouterr().out.splitlines() if "(1)" in line)
    assert tenant.split()[2:5] == ["fifo", "100.0%", "500"]
    assert tenant.count("500 ms") >= 4


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--policies=best"], "There is no policy 'best'"),
        (["--batch-size=0"], "at least 1"),
        (["--queue-limit=0"], "bound is at least 1"),
        (["--policies=fifo", '--params={"wrr": {}}'], "'wrr', which is not among the policies"),
        (['--params={"wrr": {"high": -1}}'], "high must be a number from 0.01"),
        (["--params=[]"], "--params is a JSON object"),
        (["--sizing=balanced", '--sizing-params={"gain": 9}'], "gain must be a number"),
        (['--trigger={"luck": 1}'], "There is no trigger 'luck'"),
        (["--tenants=absent.json"], "absent.json cannot be read"),
        (["--swap=0"], "--swap and --kv-bytes are above 0"),
        (["--swap=nan"], "--swap and --kv-bytes are above 0"),
        (["--rate=0"], "The rate must be a number above 0"),
        (["--rate=nan"], "The rate must be a number above 0"),
        (["--limit=-1"], "The limit must be at least 1"),
        (["--ttft-target=nan"], "are seconds, above 0"),
        (["--e2e-target=-3"], "are seconds, above 0"),
        (['--params={"wrr": [1]}'], "what wrr is given is an object"),
        (['--sizing-params={"gain": 1}'], "name it with --sizing"),
        (['--trigger={"size": 4}'], "in continuous none do"),
        (["--chart=chart.png"], "ends in .html, not chart.png"),
        (["--cost=absent.json"], "absent.json cannot be read"),
        (["--chart=absent/chart.html", "--limit=2"], "cannot be written"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(trace: Path, options: list[str], sentence: str) -> None:
    with pytest.raises(CommandError, match=sentence):
        call_command("replay", str(trace), *options)


@pytest.mark.django_db
def test_without_trace_or_history_it_asks_for_one() -> None:
    with pytest.raises(CommandError, match="Name a trace"):
        call_command("replay")
    with pytest.raises(CommandError, match="No request of 'demo' is recorded; there are records of: none"):
        call_command("replay", "--from-history=demo")


def mixed_requests() -> list[TraceRequest]:
    """About a minute of them."""
    draw, clock, requests = random.Random(2), 0.0, []
    for _ in range(400):
        clock += draw.expovariate(7.0)
        output = min(300, int(draw.expovariate(1 / 60)) + 1)
        requests.append(TraceRequest(clock, draw.choice("ab"), draw.randint(10, 400), output, 3, output))
    return requests


@pytest.mark.django_db
@pytest.mark.parametrize("tells_features", [True, False])
def test_what_an_engine_recorded_is_predicted(capsys: Capture, tmp_path: Path, tells_features: bool) -> None:
    record_run(mixed_requests(), COST, tells_features=tells_features)
    run = read_history("demo")
    assert (run.policy, run.mode, run.num_replicas, run.num_blocks) == ("fifo", "continuous", 1, 400)
    report = tmp_path / "report.json"
    call_command("replay", "--from-history=demo", "--policies=fifo,fair", "--step-tokens=256", f"--json={report}")
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["recorded", "(fifo)", "fifo", "fair"]
    assert "Prediction under fifo against the record: TTFT mean " in out
    served, fifo, _ = (r["total"] for r in json.loads(report.read_text())["reports"])
    for latency in ("ttft_s", "e2e_s"):
        assert fifo[latency]["mean"] == pytest.approx(served[latency]["mean"], rel=0.1)
        assert fifo[latency]["p99"] == pytest.approx(served[latency]["p99"], rel=0.2)


@pytest.mark.django_db
def test_seconds_in_which_the_machine_was_slow_are_slow_in_the_replay_too() -> None:
    # Laid upon another second than their own, they make TTFT a fifth shorter than it was.
    record_run(mixed_requests(), COST, pace=lambda now_s: 4.0 if int(now_s) % 4 == 0 else 1.0)
    BatchRecord.objects.update(step_cost=list(astuple(COST)))  # as an engine tells what it learned
    ModelDeployment.objects.create(name="demo", path="/models/demo", max_batch_size=8, step_tokens=256)
    error = run_what_if(read_history("demo"), [Candidate(policy="fifo")])["replayed"]["error"]
    assert error == dict.fromkeys(error, pytest.approx(0, abs=0.1))


@pytest.mark.parametrize(("places", "claim_ms"), [(1, 1.5), (3, 2.0)])
def test_the_way_through_the_queue_is_told_by_requests_that_found_a_place(places: int, claim_ms: float) -> None:
    # (arrival, end) in s, and the wait in ms: two found nobody there, two a place, one a full engine, one no memory
    seen = [(0.0, 0.5, 1), (1.0, 2.0, 2), (1.1, 2.2, 3), (1.2, 2.4, 2), (1.3, 2.5, 10), (2.3, 2.7, 200)]
    rows = [
        RequestRecord(
            arrived_at=(arrival := START + timedelta(seconds=arrival_s)),
            claimed_at=arrival + timedelta(milliseconds=wait_ms),
            finished_at=START + timedelta(seconds=end_s),
        )
        for arrival_s, end_s, wait_ms in seen
    ]
    assert learn_claim_s(rows, places) == pytest.approx(claim_ms / 1000)


@pytest.mark.django_db
def test_too_little_history_is_said_to_be_too_little() -> None:
    record_run([TraceRequest(0.0, "a", 5, 5, 3, 5)], DEFAULT_COST)
    with pytest.raises(HistoryError, match="Only 1 s of steps are recorded"):
        read_history("demo")
    assert RequestRecord.objects.get().finished_at - START < timedelta(seconds=1)


@pytest.mark.django_db
def test_what_another_server_computed_is_not_replayed() -> None:
    record_run(mixed_requests(), COST)
    BatchRecord.objects.update(kv_blocks_total=0)
    with pytest.raises(HistoryError, match="another server's"):
        read_history("demo")


@pytest.mark.django_db
def test_recorded_requests_have_as_long_until_their_deadline_at_any_rate(tmp_path: Path) -> None:
    record_run(mixed_requests(), COST)
    RequestRecord.objects.update(deadline_at=F("arrived_at") + timedelta(seconds=30))
    Tenant.objects.bulk_create(Tenant(name=name, drop_expired=True) for name in "ab")
    report = tmp_path / "report.json"
    call_command("replay", "--from-history=demo", "--policies=fifo", "--rate=0.5", f"--json={report}")
    (total,) = (r["total"] for r in json.loads(report.read_text())["reports"])
    assert (total["finished"], total["refused"]) == (400, 0)
