"""Whose batch is served first."""

from dataclasses import dataclass

from controlplane.offline.turns import in_turn


@dataclass(frozen=True)
class Work:
    """A batch, as far as turns are concerned."""

    id: str
    tenant: str


def test_every_tenant_is_first_as_often_as_any_other_and_its_oldest_batch_before_its_others() -> None:
    batches = [Work("a1", "a"), Work("a2", "a"), Work("b1", "b"), Work("a3", "a"), Work("c1", "c")]
    orders = [[work.id for work in in_turn(batches, turn)] for turn in range(3)]
    assert sorted(order[0] for order in orders) == ["a1", "b1", "c1"]
    for order in orders:
        assert sorted(order) == sorted(work.id for work in batches)
        assert [name for name in order if name.startswith("a")] == ["a1", "a2", "a3"]
