"""Whom a simulation refuses, drops and charges."""

from scheduling.core.backpressure import BackpressureLimits
from scheduling.core.simulation.admission import AdmissionSettings
from scheduling.core.simulation.limits import TenantLimit
from scheduling.core.simulation.simulator import simulate
from scheduling.core.sizing.cost_model import DEFAULT_COST
from tests.simulations import fleet, request


def test_backpressure_refuses_low_priorities_first() -> None:
    trace = [request(0.02 * i, output=60, priority=5 if i % 2 else 0) for i in range(200)]
    limits = BackpressureLimits(wait_s=(1e9, 1e9, 1e9, 1e9))
    admission = AdmissionSettings(queue_limit=20, limits=limits)
    outcomes = simulate(trace, fleet(batch_size=1, admission=admission), DEFAULT_COST).outcomes
    refused = [o.request.priority for o in outcomes if o.state == "refused"]
    assert refused.count(5) > refused.count(0)
    assert {o.reason for o in outcomes if o.state == "refused"} == {"overloaded", "queue_full", "shed"}


def test_a_full_queue_drops_the_low_for_the_high_unless_told_not_to() -> None:
    trace = [request(0.001 * i, output=60, priority=3) for i in range(30)] + [request(0.05, output=60, priority=0)]
    limits = BackpressureLimits(depth=(9.0, 9.0, 9.0, 9.0), wait_s=(1e9, 1e9, 1e9, 1e9), kv_usage=(9.0, 9.0, 9.0, 9.0))
    for shed in (True, False):
        admission = AdmissionSettings(queue_limit=10, limits=limits, tokens_limit=700, shed=shed)
        outcomes = simulate(trace, fleet(batch_size=1, admission=admission), DEFAULT_COST).outcomes
        assert (outcomes[-1].state == "finished") == shed
        assert sum(outcome.reason == "shed" for outcome in outcomes) == shed


def test_a_request_past_its_deadline_is_dropped_where_its_tenant_asks_for_that() -> None:
    crowd = [request(0.0, output=80) for _ in range(40)]
    for drop in (True, False):
        late = request(0.01, tenant="b")._replace(deadline_s=0.2, drop_expired=drop)
        outcome = simulate([*crowd, late], fleet(batch_size=1), DEFAULT_COST).outcomes[-1]
        assert (outcome.state, outcome.reason) == (("refused", "deadline_exceeded") if drop else ("finished", ""))


def test_a_tenant_s_limits_refuse_what_is_too_much_and_nothing_else() -> None:
    trace = sorted([*(request(0.25 * i, "a") for i in range(200)), *(request(0.25 * i, "b") for i in range(200))])
    admission = AdmissionSettings(queue_limit=None, tenants={"a": TenantLimit(rpm=60)})
    outcomes = simulate(trace, fleet(admission=admission), DEFAULT_COST).outcomes
    refused = [o for o in outcomes if o.state == "refused"]
    assert {(o.request.tenant, o.reason) for o in refused} == {("a", "requests_per_minute")}
    # A bucket of 60 that one a second goes into, for 49.75 s.
    assert len([o for o in outcomes if o.request.tenant == "a"]) - len(refused) == 109


def test_what_a_request_did_not_use_is_given_back_to_its_tenant_and_its_slot_to_the_next() -> None:
    trace = [request(float(i), output=5, max_tokens=500) for i in range(50)]
    limits = {"a": TenantLimit(concurrency=1, tpm=1200, tpd=2500)}
    admission = AdmissionSettings(queue_limit=None, tenants=limits)
    assert all(o.state == "finished" for o in simulate(trace, fleet(admission=admission), DEFAULT_COST).outcomes)


def test_a_dropped_request_gives_its_tenant_back_what_it_was_charged() -> None:
    late = [request(0.01, "b", deadline_s=0.05, drop_expired=True) for _ in range(3)]
    trace = [request(0.0, output=80), *late, request(9.0, "b")]
    admission = AdmissionSettings(queue_limit=None, tenants={"b": TenantLimit(concurrency=3, tpd=100)})
    outcomes = simulate(trace, fleet(batch_size=1, admission=admission), DEFAULT_COST).outcomes
    assert [o.reason for o in outcomes] == ["", *["deadline_exceeded"] * 3, ""]
