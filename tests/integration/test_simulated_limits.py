"""The simulator's ledger of tenants' limits says, step by step, what the scripts in Redis say."""

from uuid import uuid4

import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scheduling.core.simulation.limits import DAY_S, TenantLedger, TenantLimit
from scheduling.keys import Keys
from scheduling.limits import TenantLimits
from scheduling.store import execute

START_S = 1_700_006_400.0 + DAY_S - 40
"""Shortly before midnight, so that a new day's budget is seen too."""

steps = st.lists(
    st.tuples(
        st.sampled_from(["acquire", "acquire", "acquire", "settle", "refuse"]),
        st.floats(0, 12),
        st.integers(1, 400),
        st.integers(0, 30),
    ),
    max_size=25,
)
limit = st.none() | st.integers(1, 6)
limits = st.builds(
    TenantLimit,
    rpm=limit,
    tpm=st.none() | st.integers(100, 900),
    tpd=st.none() | st.integers(200, 2000),
    concurrency=limit,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps, limit=limits)
def test_ledger_and_scripts_agree(
    store: redis.Redis, steps: list[tuple[str, float, int, int]], limit: TenantLimit
) -> None:
    scripts, ledger = TenantLimits(Keys(uuid4().hex)), TenantLedger({"a": limit}, start_s=START_S)
    now_s, charged = 0.0, dict[str, int]()
    for number, (what, pause_s, tokens, choice) in enumerate(steps):
        now_s += pause_s
        if what == "acquire":
            answer = execute(
                store,
                scripts.acquire(
                    "a", str(number), rpm=limit.rpm, tpm=limit.tpm, tpd=limit.tpd, concurrency=limit.concurrency,
                    tokens=tokens, now=START_S + now_s,
                ),
            )  # fmt: skip
            assert ledger.acquire("a", str(number), tokens, now_s) == (answer.reason or None)
            if answer.ok:
                charged[str(number)] = tokens
        elif charged:
            id_ = sorted(charged)[choice % len(charged)]
            refund = charged.pop(id_) if what == "refuse" else charged.pop(id_) // 2
            if what == "refuse":
                end = scripts.cancel_charge("a", id_, tokens=refund, now=START_S + now_s)
            else:
                end = scripts.settle("a", id_, refund_tokens=refund, now=START_S + now_s)
            execute(store, end)
            ledger.settle("a", id_, refund, now_s, requests=int(what == "refuse"))
