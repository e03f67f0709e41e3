"""What-if: recorded traffic under other policies, beside what really happened."""

import json
import random
from datetime import timedelta

import pytest

from inference.models import ModelDeployment, RequestRecord
from inference.recorded import HistoryError, RecordedRun, read_window
from inference.what_if import Candidate, run_what_if
from scheduling.core.policy import InvalidPolicyParameter
from scheduling.core.simulation.trace import TraceRequest
from scheduling.core.sizing.cost_model import StepCost
from scheduling.models import ServiceLevel, Tenant
from tests.integration.recorded_run import START, record_run

COST = StepCost(step_s=0.004, prefill_token_s=4e-5, decode_sequence_s=4e-4, context_token_s=3e-7, attention_pair_s=2e-9)
HOUR = timedelta(hours=1)


def overload(seconds: float = 40.0) -> list[TraceRequest]:
    """A heavy tenant that floods, and a light one that asks now and then."""
    draw, clock, requests = random.Random(3), 0.0, []
    while (clock := clock + draw.expovariate(17.0)) < seconds:
        tenant = "light" if draw.random() < 0.1 else "heavy"
        output = draw.randint(5, 15) if tenant == "light" else draw.randint(40, 90)
        requests.append(TraceRequest(clock, tenant, draw.randint(20, 200), output, 3, output))
    return requests


@pytest.fixture(autouse=True)
def deployment(db: None) -> None:
    ModelDeployment.objects.create(name="demo", path="/models/demo", max_batch_size=8, step_tokens=256)


def read() -> RecordedRun:
    return read_window("demo", start=START, end=START + HOUR)


def test_candidates_stand_beside_the_record_by_tenant_and_priority() -> None:
    record_run(overload(), COST)
    told: list[tuple[float, str]] = []
    answer = run_what_if(
        read(),
        [Candidate(policy="fair"), Candidate(policy="fair", params={"output_price": 8.0}, label="fair, dear output")],
        progress=lambda share, label: told.append((share, label)),
    )
    json.dumps(answer, allow_nan=False)
    really, fair = answer["really"], answer["candidates"][0]
    assert [one["label"] for one in answer["candidates"]] == ["fair", "fair, dear output"]
    assert set(really["tenants"]) == set(fair["tenants"]) == {"heavy", "light"}
    assert set(fair["priorities"]) == {"normal"}
    assert fair["tenants"]["light"]["ttft_s"]["mean"] < really["tenants"]["light"]["ttft_s"]["mean"] / 5
    assert abs(answer["replayed"]["error"]["ttft_s_mean"]) < 0.1
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert [label for share, label in told if share in (1 / 3, 2 / 3, 1.0)] == ["fifo", "fair", "fair, dear output"]


def test_the_policy_that_was_in_force_is_not_run_twice() -> None:
    record_run(overload(10), COST)
    told: set[str] = set()
    answer = run_what_if(
        read(), [Candidate(policy="fair"), Candidate(policy="fifo")], progress=lambda _, label: told.add(label)
    )
    assert told == {"fair", "fifo"}
    assert answer["replayed"]["total"] == answer["candidates"][1]["total"]


def test_targets_and_shares_are_the_tenants_own() -> None:
    record_run(overload(), COST)
    light = Tenant.objects.create(name="light", weight=5.0)
    ServiceLevel.objects.create(tenant=light, priority=3, ttft_ms=1)
    ServiceLevel.objects.create(priority=3, ttft_ms=3_600_000)
    recorded = read()
    assert {request.share for request in recorded.trace if request.tenant == "light"} == {5.0}
    tenants = run_what_if(recorded, [Candidate(policy="fair")])["candidates"][0]["tenants"]
    assert tenants["light"]["sla_attainment"] == 0
    assert tenants["heavy"]["sla_attainment"] == 1


def test_who_was_turned_away_is_asked_for_again_with_a_likely_length() -> None:
    record_run(overload(10), COST)
    row = RequestRecord.objects.filter(tenant="light").latest("id")
    row.pk, row.request_id, row.max_tokens, row.completion_tokens = None, "turned away", 40, 0
    row.state, row.error_code, row.first_token_at, row.claimed_at = "failed", "shed", None, None
    row.save()
    recorded = read()
    assert recorded.num_assumed == 1
    answer = run_what_if(recorded, [Candidate(policy="fifo")])
    assert answer["assumed"] == 1
    assert answer["really"]["tenants"]["light"]["refused"] == 1
    assert answer["candidates"][0]["tenants"]["light"]["refused"] == 0
    assert max(request.output_tokens for request in recorded.trace if request.tenant == "light") == 40


def test_a_window_holds_what_arrived_in_it() -> None:
    record_run(overload(20), COST)
    end = START + timedelta(seconds=10)
    half = read_window("demo", start=START, end=end)
    assert 0 < len(half.trace) < RequestRecord.objects.count()
    assert half.start + timedelta(seconds=max(request.arrival_s for request in half.trace)) < end
    with pytest.raises(HistoryError, match="No request of 'demo' is recorded"):
        read_window("demo", start=START - HOUR, end=START)


def test_a_bad_candidate_is_named_before_anything_runs() -> None:
    record_run(overload(10), COST)
    told: list[float] = []
    with pytest.raises(InvalidPolicyParameter, match="within"):
        run_what_if(
            read(),
            [Candidate(policy="fair"), Candidate(policy="hierarchical", params={"within": "luck"})],
            progress=lambda share, _: told.append(share),
        )
    assert not told
