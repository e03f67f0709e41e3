"""Tokens of a tenant are neither made nor lost: its buckets hold what was not used and is not charged to a request."""

import uuid

import redis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from scheduling.keys import Keys
from scheduling.limits import TenantLimits
from scheduling.store import execute

RPM, TPM, SLOTS = 20, 1000, 6
DAILY = st.sampled_from([700, 3000])
"""Below what a bucket holds, or never reached at one moment."""
NOW_S = 1e9
STEPS = st.lists(
    st.tuples(st.sampled_from(["acquire", "acquire", "settle", "cancel"]), st.integers(0, 9), st.integers(1, 400)),
    max_size=40,
)


@settings(
    max_examples=40,
    deadline=None,
    phases=(Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=STEPS, tpd=DAILY)
def test_tokens_and_requests_are_conserved_by_any_order_of_charges_and_refunds(
    store: redis.Redis, steps: list[tuple[str, int, int]], tpd: int
) -> None:
    # At one moment, so that nothing flows in.
    limits, tenant = TenantLimits(Keys(f"c{uuid.uuid4().hex[:12]}")), "acme"
    charged: dict[str, int] = {}
    used_tokens = num_used = num_ever = 0
    for action, which, amount in steps:
        id_ = f"r{which}"
        if action == "acquire":
            admission = execute(
                store,
                limits.acquire(tenant, id_, rpm=RPM, tpm=TPM, concurrency=SLOTS, tokens=amount, now=NOW_S, tpd=tpd),
            )
            if admission.ok and id_ not in charged:
                charged[id_] = amount
                num_ever += 1
            assert admission.remaining_tokens == TPM - used_tokens - sum(charged.values())
            assert admission.remaining_requests == RPM - num_used - len(charged)
        elif action == "settle":
            refund = min(amount, charged.get(id_, 0))
            execute(store, limits.settle(tenant, id_, refund_tokens=refund, now=NOW_S))
            if id_ in charged:
                used_tokens += charged.pop(id_) - refund
                num_used += 1
        else:
            execute(store, limits.cancel_charge(tenant, id_, tokens=charged.pop(id_, 0), now=NOW_S))
        usage = execute(store, limits.usage(tenant, NOW_S))
        assert usage.running == len(charged) <= SLOTS
        if num_ever:
            assert usage.remaining_tokens == TPM - used_tokens - sum(charged.values()) >= 0
            assert usage.remaining_requests == RPM - num_used - len(charged) >= 0
            spent = int(store.hget(f"{limits.keys.tenant(tenant)}:day", "tokens") or 0)
            assert spent == used_tokens + sum(charged.values()) <= tpd
