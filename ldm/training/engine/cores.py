"""How many threads each rank computes with: the CPU cores that this process may use, divided by the machine's ranks."""

from __future__ import annotations

import os
from pathlib import Path

import torch

UNLIMITED = -1.0  # a quota of cgroup v1
V2, V1 = "cpu.max", ("cpu.cfs_quota_us", "cpu.cfs_period_us")


def local_ranks() -> int:
    """Return how many ranks this machine has, according to torchrun or deepspeed; 1 under plain python."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def share_cores(threads: int | None) -> None:
    """Set the number of threads of this process's CPU operations: `threads`, or what the environment says
    (OMP_NUM_THREADS), or its part of the cores. Threads that wait for a core that another has cost several times more
    than they bring."""
    own = threads
    if own is None and not os.environ.get("OMP_NUM_THREADS"):
        cores = torch.get_num_threads()  # PyTorch counts the physical cores that the process's affinity allows
        quota = cpu_quota()
        own = max(1, min(cores, cores if quota is None else int(quota)) // local_ranks())
    if own is not None and own != torch.get_num_threads():
        torch.set_num_threads(own)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return how many cores' time the process's cgroups allow, as containers and batch systems set it; None: no limit.

    The smallest limit of a group and those that it is part of counts. root: of the file system.
    """
    limits = [limit for folder in _groups(root) if (limit := _limit(folder)) is not None]
    return min(limits, default=None)


def _groups(root: Path) -> list[Path]:
    """List the folders of the process's cgroup for CPUs, and of those above it. In a container they may not exist: its
    own group is then the root of what it sees."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []
    found: list[Path] = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        own = mount / name.strip("/")
        found += [own, *(above for above in own.parents if above.is_relative_to(mount))]
    return found


def _limit(folder: Path) -> float | None:
    try:
        if (folder / V2).exists():
            quota, period = (folder / V2).read_text().split()  # "max 100000", or microseconds in a period
            return None if quota == "max" else float(quota) / float(period)
        quota, period = (float((folder / name).read_text()) for name in V1)
        return None if quota == UNLIMITED else quota / period
    except (OSError, ValueError):  # no such group, or a file that is not ours to read
        return None
