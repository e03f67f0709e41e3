"""Whose batch comes first: who is first takes the room there is, so the tenants are it in turn."""

from collections.abc import Sequence
from typing import Protocol, TypeVar


class HasTenant(Protocol):
    """A batch; the test has its own, since Django's needs a database."""

    @property
    def tenant(self) -> str:
        """Whose it is."""
        ...


T = TypeVar("T", bound=HasTenant)


def in_turn(batches: Sequence[T], turn: int) -> list[T]:
    """In the order given for each tenant, and another tenant first with every turn."""
    tenants = list(dict.fromkeys(batch.tenant for batch in batches))
    places = {tenant: (i - turn) % len(tenants) for i, tenant in enumerate(tenants)}
    return sorted(batches, key=lambda batch: places[batch.tenant])
