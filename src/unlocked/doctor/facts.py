"""What a process can say about itself and its host, without the others."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..cluster.network import Interface, interfaces


@dataclass(frozen=True)
class Facts:
    """One process.

    `machine`: equal for processes of one kernel, whatever their container. `cores`: numbers of the cores it may run on;
    `core_quota`: cores' worth of time its container may use, None without a limit. `memory_free`, `shared_memory_free`:
    bytes, None if unknown.
    """

    rank: int
    host: str
    machine: str
    pid: int
    python: str
    torch: str
    unlocked: str
    threads: int
    cores: tuple[int, ...]
    core_quota: float | None
    interface: str
    address: str
    loopback: bool
    memory_free: int | None
    shared_memory_free: int | None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"cores": list(self.cores)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Facts:
        """The inverse of `to_json`."""
        return cls(**values | {"cores": tuple(values["cores"])})


def local_facts(interface: Interface | None = None, rank: int = 0) -> Facts:
    """Those of this process. `interface`: the one it uses; None: the first that others can reach, else the loopback."""
    from .. import __version__

    found = [row for row in interfaces() if not row.loopback] or interfaces() or [Interface("none", "127.0.0.1")]
    chosen = interface if interface is not None else found[0]
    return Facts(
        rank=rank,
        host=socket.gethostname(),
        machine=_text("/proc/sys/kernel/random/boot_id") or socket.gethostname(),
        pid=os.getpid(),
        python=platform.python_version(),
        torch=torch.__version__.split("+")[0],
        unlocked=__version__,
        threads=torch.get_num_threads(),
        cores=_cores(),
        core_quota=_quota(),
        interface=chosen.name,
        address=chosen.address,
        loopback=chosen.loopback,
        memory_free=_memory_free(),
        shared_memory_free=shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None,
    )


def _cores() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _quota() -> float | None:
    """Cores' worth of time that the control group allows."""
    quota, _, period = _text("/sys/fs/cgroup/cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _memory_free() -> int | None:
    """Bytes this process could still get: what the kernel has, or what the control group leaves, whichever is less."""
    lines = dict(line.split(":", 1) for line in _text("/proc/meminfo").splitlines() if ":" in line)
    if "MemAvailable" not in lines:
        return None
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = _text("/sys/fs/cgroup/memory.max"), _text("/sys/fs/cgroup/memory.current")
    return min(free, max(0, int(limit) - int(used))) if limit.isdigit() and used.isdigit() else free


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
