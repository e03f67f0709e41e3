"""The arithmetic of a token bucket, for the simulator and as the reference for `lua/acquire.lua`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket that holds one minute's worth, fills evenly, and stood at `level` at `time_s`."""

    per_minute: float
    level: float
    time_s: float

    @classmethod
    def full(cls, per_minute: float, now_s: float) -> "Bucket":
        return cls(per_minute, per_minute, now_s)

    def at(self, now_s: float, per_minute: float | None = None) -> "Bucket":
        """The bucket at `now_s` (a clock that went back counts as no time), with the limit as it is now."""
        limit = self.per_minute if per_minute is None else per_minute
        elapsed_s = max(0.0, now_s - self.time_s)
        return Bucket(limit, min(limit, self.level + elapsed_s * limit / 60), max(now_s, self.time_s))

    def take(self, amount: float) -> "Bucket":
        return Bucket(self.per_minute, self.level - amount, self.time_s)

    def give(self, amount: float) -> "Bucket":
        return Bucket(self.per_minute, min(self.per_minute, self.level + amount), self.time_s)

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` can be taken; for more than the bucket ever holds, until it is full."""
        missing = min(amount, self.per_minute) - self.level
        return max(0.0, missing * 60 / self.per_minute) if self.per_minute > 0 else 60.0
