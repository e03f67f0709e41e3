"""How times and values are written."""

from typing import Any

import pytest

from dashboard.wording import duration
from scheduling.wording import say_value


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "none"), ("", "none"), ([], "none"), (0, "0"), (True, "yes"), (False, "no"), (30.0, "30"),
        ("fair", "fair"), (["a", "b"], "a; b"),
        ([{"policy": "fifo", "params": {}}, {"policy": "fair", "params": {"level_s": 30.0, "strict": True}}],
         "policy fifo; policy fair, params (level_s 30, strict yes)"),
    ],
)  # fmt: skip
def test_a_value_of_the_audit_trail_is_written_as_people_write_it(value: Any, said: str) -> None:
    assert say_value(value) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (None, "–"), (0.0, "0.0 ms"), (0.0042, "4.2 ms"), (0.0124, "12 ms"), (0.9999, "1.0 s"), (24.0, "24 s"),  # noqa: RUF001
        (75.9, "1 min 15 s"), (5400, "1 h 30 min"), (90_000, "1 d 1 h"),
    ],
)  # fmt: skip
def test_a_duration_is_written_in_the_two_largest_units_that_matter(seconds: float | None, said: str) -> None:
    assert duration(seconds) == said
