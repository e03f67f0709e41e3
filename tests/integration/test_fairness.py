"""How fairly tenants were served: against what they asked, so that who asks little is not treated unfairly."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboard.models import RequestRollup
from dashboard.selectors.fairness import fair_shares, judge_evenness, read_services

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
WEIGHTS = {"heavy": 1.0, "light": 1.0}


@given(st.dictionaries(st.text(max_size=3), st.tuples(st.integers(0, 10**6), st.floats(0.1, 100)), max_size=8))
def test_a_fair_share_is_no_more_than_was_asked_and_by_weight_beyond(tenants: dict[str, tuple[int, float]]) -> None:
    asked = {name: num for name, (num, _) in tenants.items()}
    weights = {name: weight for name, (_, weight) in tenants.items()}
    total = sum(asked.values()) / 2
    shares = fair_shares(total, asked, weights)
    assert shares.keys() == asked.keys()
    assert sum(shares.values()) == pytest.approx(total)
    assert all(shares[name] <= asked[name] + 1e-6 for name in asked)
    cut = [shares[name] / weights[name] for name in asked if shares[name] < asked[name] * (1 - 1e-9)]
    assert cut == pytest.approx([max(cut)] * len(cut) if cut else [])


def serve(tenant: str, num: int, *, refused: int = 0) -> None:
    RequestRollup.objects.create(
        resolution=60, start=NOW, model="demo", tenant=tenant, priority=3, finished=num, refused=refused,
        prompt_tokens=num * 60, completion_tokens=num * 40,
    )  # fmt: skip


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("waiting", "refused", "entitled", "index"),
    [
        ({}, 0, 0.01, 1.0),
        ({"heavy": 500}, 0, 0.01, 1.0),
        ({"light": 1}, 0, 0.02, 0.9),
        ({"light": 500}, 0, 0.5, 0.51),
        ({}, 500, 0.5, 0.51),
    ],
)
def test_only_who_asked_for_more_is_treated_unfairly(
    waiting: dict[str, int], refused: int, entitled: float, index: float
) -> None:
    serve("heavy", 99)
    serve("light", 1, refused=refused)
    services = read_services(WEIGHTS, waiting, NOW - timedelta(hours=1))
    assert services["light"].entitled == pytest.approx(entitled)
    assert judge_evenness(services.values()) == pytest.approx(index, abs=0.01)
    assert (services["light"].tokens, services["light"].share) == (100, 0.01)
