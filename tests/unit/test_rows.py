"""Rows in columns: always what a sorted list would hold, over many chunks."""

from array import array
from bisect import insort
from random import Random

import pytest

from scheduling.core.rows import CHUNK, Rows


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("span", [3, 500, 10**9])
def test_rows_hold_what_a_sorted_list_holds(seed: int, span: int) -> None:
    rng, rows, expected = Random(seed), Rows(array("d"), []), list[tuple[float, str]]()
    in_order = seed % 2 == 0
    for number in range(12 * CHUNK):
        row = (float(number // 7 if in_order else rng.randrange(span)), f"r{rng.randrange(10**9)}-{number}")
        rows.insert(*row)
        insort(expected, row)
        if rng.random() < (0.3 if number < 8 * CHUNK else 0.9):
            gone = expected.pop(rng.choice([0, -1, rng.randrange(len(expected))]))
            rows.discard(*gone)
        if expected:
            place = rng.randrange(len(expected))
            chunk, at = rows.locate(*expected[place])
            assert tuple(column[at] for column in chunk.columns) == expected[place]
            assert rows.before(chunk, at) == place
        key = float(rng.randrange(span))
        above = [index for index, one in enumerate(expected) if one[0] >= key]
        first = rows.first_from(key)
        assert (first is None) == (not above)
        assert first is None or rows.before(*first) == above[0]
    assert list(rows) == expected
    assert list(reversed(rows)) == expected[::-1]
    assert rows.size == len(expected)
    for row in expected:
        rows.discard(*row)
    assert list(rows) == []
    assert len(rows.chunks) == 1


def test_rows_that_come_in_order_fill_their_chunks() -> None:
    rows = Rows(array("d"), [])
    for number in range(10 * CHUNK):
        rows.insert(float(number), str(number))
    assert len(rows.chunks) == 10
