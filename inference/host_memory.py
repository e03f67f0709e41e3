"""How much memory this process may still take on its host: what the system has, and what its control group leaves."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes, in all and still to be had."""

    total: int
    available: int


def read_host_memory() -> HostMemory:
    """Of the host, or of the container where that is allowed less."""
    system = psutil.virtual_memory()
    memory = HostMemory(system.total, system.available)
    for group in find_groups(_read(MEMBERSHIP), CGROUPS):
        limit = read_limit(group)
        if limit is not None:
            memory = HostMemory(min(memory.total, limit.total), min(memory.available, limit.available))
    return memory


def find_groups(membership: str, root: Path) -> Iterator[Path]:
    """Folders of the control groups that bound a process's memory, by its /proc/PID/cgroup: its own and those above.

    Inside a container the path that it says may be the host's; the container's own group then lies at the root.
    """
    for line in membership.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            top = root
        elif "memory" in controllers.split(","):  # version 1, each controller in a tree of its own
            top = root / "memory"
        else:
            continue
        below = Path(path.lstrip("/"))
        if ".." not in below.parts:
            yield from (top / part for part in (below, *below.parents))


def read_limit(group: Path) -> HostMemory | None:
    """What one group allows its processes together, in either version's files; None where it sets no limit.

    Cached files, such as a checkpoint that was just read, are counted as used, and make place where that is needed.
    """
    for limit_name, used_name, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        limit, used = _read(group / limit_name).strip(), _read(group / used_name).strip()
        if limit.isdecimal() and used.isdecimal():
            pairs = (line.split() for line in _read(group / "memory.stat").splitlines())
            stat = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
            cached = sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
            taken = max(0, int(used) - cached)
            return HostMemory(int(limit), max(0, int(limit) - taken))
    return None


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
