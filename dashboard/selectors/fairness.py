"""How fairly tenants were served: tokens received against what their weights entitle to, of what they asked."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from django.db.models import Sum

from dashboard.models import RequestRollup, Resolution

NOTHING: Mapping[str, Any] = {"tokens": 0, "done": 0, "lost": 0, "refused": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What a tenant was served in the last hour, and what it was entitled to among those who asked. Shares of 1.

    `asked` are the tokens that it wanted: those it received, and for each request that waits now or was refused for
    want of capacity as many as its requests had on average. Nobody is entitled to more than that.
    """

    tokens: int = 0
    asked: int = 0
    requests: int = 0
    failed: int = 0
    share: float | None = None
    entitled: float | None = None


def read_services(weights: Mapping[str, float], waiting: Mapping[str, int], since: datetime) -> dict[str, Service]:
    """Of tenants that asked since then, those that were served nothing too: who waits now, or was only refused."""
    rows = RequestRollup.objects.filter(resolution=Resolution.MINUTE, start__gte=since).values("tenant")
    sums = rows.annotate(
        tokens=Sum("prompt_tokens") + Sum("completion_tokens"),
        done=Sum("finished"),
        lost=Sum("failed"),
        refused=Sum("refused"),
    )
    found: dict[str, Mapping[str, Any]] = {row["tenant"]: row for row in sums}
    served = [row for row in found.values() if row["done"]]
    usual = sum(row["tokens"] for row in served) / max(1, sum(row["done"] for row in served))
    services: dict[str, Service] = {}
    for name in weights:
        row = found.get(name, NOTHING)
        unserved = row["refused"] + waiting.get(name, 0)
        each = row["tokens"] / row["done"] if row["done"] else usual or 1
        asked = row["tokens"] + round(unserved * each)
        if asked or row["lost"]:
            services[name] = Service(tokens=row["tokens"], asked=asked, requests=row["done"], failed=row["lost"])
    total = sum(service.tokens for service in services.values())
    fair = fair_shares(total, {name: service.asked for name, service in services.items()}, weights)
    if not total:
        return services
    return {
        name: replace(service, share=service.tokens / total, entitled=fair[name] / total)
        for name, service in services.items()
    }


def fair_shares(total: float, asked: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """How a total is shared fairly by weight: nobody gets more than it asked, and what it leaves goes to the others.

    Max-min fairness: Bertsekas and Gallager, Data Networks (1992), section 6.5.2.
    """
    shares: dict[str, float] = {}
    left, hungry = total, set(asked)
    while hungry:
        level = left / sum(weights[name] for name in hungry)
        content = {name for name in hungry if asked[name] <= level * weights[name]}
        if not content:
            return shares | {name: level * weights[name] for name in hungry}
        shares |= {name: asked[name] for name in content}
        left -= sum(asked[name] for name in content)
        hungry -= content
    return shares


def judge_evenness(services: Iterable[Service]) -> float | None:
    """Jain's index of what was received for what one was entitled to."""
    return jain_index([one.share / one.entitled for one in services if one.share is not None and one.entitled])


def jain_index(values: Sequence[float]) -> float | None:
    """How evenly values are spread: 1 where all are equal, 1/n where one has all. Jain, Chiu and Hawe (1984).

    None with fewer than two values, or nothing to share.
    """
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if len(values) > 1 and squares else None
