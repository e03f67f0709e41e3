"""How the traffic fared, in all and by tenant."""

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from statistics import quantiles

WINDOW_S = 5.0


@dataclass(slots=True)
class TenantTally:
    """Counts of one tenant; times in seconds."""

    num_sent: int = 0
    num_ok: int = 0
    num_tokens: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    first_token_s: list[float] = field(default_factory=list)
    end_to_end_s: list[float] = field(default_factory=list)


class Tally:
    """Counts of all tenants."""

    def __init__(self) -> None:
        self.tenants: dict[str, TenantTally] = {}
        self._recent: deque[tuple[float, int]] = deque()
        self._started = time.monotonic()

    def of(self, tenant: str) -> TenantTally:
        """A tenant's counts."""
        return self.tenants.setdefault(tenant, TenantTally())

    def tokens(self, tenant: str, num_tokens: int) -> None:
        """Tokens that have just come."""
        self.of(tenant).num_tokens += num_tokens
        self._recent.append((time.monotonic(), num_tokens))

    def tokens_per_s(self) -> float:
        """Over the last seconds."""
        now = time.monotonic()
        while self._recent and self._recent[0][0] < now - WINDOW_S:
            self._recent.popleft()
        return sum(n for _, n in self._recent) / max(0.1, min(WINDOW_S, now - self._started))

    def line(self, running: int) -> str:
        """The live line."""
        all_of = self.tenants.values()
        first = [s for t in all_of for s in t.first_token_s[-50:]]
        return (
            f"{time.monotonic() - self._started:5.0f} s  sent {sum(t.num_sent for t in all_of)}  running {running}  "
            f"ok {sum(t.num_ok for t in all_of)}  refused {sum(t.refused.total() for t in all_of)}  "
            f"failed {sum(t.failed.total() for t in all_of)}  {self.tokens_per_s():.0f} tokens/s  "
            f"first token {_percentile(first, 50)} p50 {_percentile(first, 95)} p95"
        )

    def summary(self) -> str:
        """A row per tenant, then the reasons of refusals and failures."""
        rows = [
            ("tenant", "sent", "ok", "refused", "failed", "tokens", "TTFT p50", "TTFT p95", "total p50", "total p95")
        ]
        for name, tally in sorted(self.tenants.items()):
            counts = (tally.num_sent, tally.num_ok, tally.refused.total(), tally.failed.total(), tally.num_tokens)
            times = [_percentile(s, p) for s in (tally.first_token_s, tally.end_to_end_s) for p in (50, 95)]
            rows.append((name, *map(str, counts), *times))  # type: ignore[arg-type]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        for kind in ("refused", "failed"):
            reasons: Counter[str] = sum((getattr(tally, kind) for tally in self.tenants.values()), Counter())
            lines += [f"{kind}: {reason} ({count})" for reason, count in reasons.most_common(5)]
        return "\n".join(lines)


def _percentile(values: list[float], percent: int) -> str:
    if not values:
        return "-"
    value = values[0] if len(values) == 1 else quantiles(values, n=100, method="inclusive")[percent - 1]
    return f"{value * 1000:.0f} ms" if value < 10 else f"{value:.1f} s"
