"""A container's limit bounds what a process counts on, in either version of control groups."""

from pathlib import Path

import pytest

from inference import host_memory
from inference.host_memory import HostMemory, find_groups, read_host_memory, read_limit

GIB = 2**30


def write_group(folder: Path, limit: str, used: int, stat: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(limit + "\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(stat)
    return folder


def write_old_group(folder: Path, limit: int, used: int, stat: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(stat)
    return folder


def test_a_limit_leaves_what_is_not_used_and_cached_files_make_place(tmp_path: Path) -> None:
    group = write_group(tmp_path, str(32 * GIB), 20 * GIB)
    assert read_limit(group) == HostMemory(32 * GIB, 12 * GIB)
    write_group(tmp_path, str(32 * GIB), 20 * GIB, f"anon 5\ninactive_file {8 * GIB}\nactive_file {GIB}\nslab x\n")
    assert read_limit(group) == HostMemory(32 * GIB, 21 * GIB)
    write_group(tmp_path, str(32 * GIB), 33 * GIB)
    assert read_limit(group) == HostMemory(32 * GIB, 0)


def test_the_first_version_has_other_names_for_the_same(tmp_path: Path) -> None:
    stat = f"inactive_file 1\ntotal_inactive_file {GIB}\ntotal_active_file 0\n"
    assert read_limit(write_old_group(tmp_path, 8 * GIB, 3 * GIB, stat)) == HostMemory(8 * GIB, 6 * GIB)


def test_a_group_without_limit_or_with_files_that_make_no_sense_bounds_nothing(tmp_path: Path) -> None:
    assert read_limit(write_group(tmp_path / "unbounded", "max", GIB)) is None
    assert read_limit(write_group(tmp_path / "broken", "", GIB)) is None
    assert read_limit(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("membership", "folders"),
    [
        ("0::/\n", ["."]),
        ("0::/system.slice/penstock.service\n", ["system.slice/penstock.service", "system.slice", "."]),
        ("7:cpu,memory:/docker/ab\n3:cpuset:/docker/ab\n", ["memory/docker/ab", "memory/docker", "memory"]),
        ("0::/../../outside\n", []),
        ("", []),
        ("nonsense\n:::\n", []),
    ],
)
def test_the_groups_of_a_process_are_its_own_and_those_above(membership: str, folders: list[str]) -> None:
    assert list(find_groups(membership, Path("/groups"))) == [Path("/groups") / folder for folder in folders]


def test_the_tightest_of_system_and_groups_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_group(tmp_path, str(2**60), 0)
    write_group(tmp_path / "pod", str(30 * 2**20), 10 * 2**20)
    write_group(tmp_path / "pod/container", str(2**60), 5 * 2**20)
    membership = tmp_path / "membership"
    membership.write_text("0::/pod/container\n")
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(host_memory, "MEMBERSHIP", membership)
    assert read_host_memory() == HostMemory(30 * 2**20, 20 * 2**20)
    membership.unlink()
    assert read_host_memory().available > 30 * 2**20
