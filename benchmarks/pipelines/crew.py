"""How busy the machine is with other things while a benchmark runs on processes of its own (calibration/crew.py)."""

from __future__ import annotations

import os
import time

from unlocked.calibration.crew import Member, run_crew

__all__ = ["Member", "Others", "busy_share", "run_crew"]


def busy_share(seconds: float = 1.0) -> float:
    """Share of all cores' time that something ran, over the next seconds."""
    others = Others()
    time.sleep(seconds)
    return others.share()


class Others:
    """How busy the machine was since this was made, without this process and the children that have ended since."""

    def __init__(self) -> None:
        self._ticks, self._own = _ticks(), _own_seconds()

    def share(self) -> float:
        """Share of all cores' time."""
        (total, idle), (total_now, idle_now) = self._ticks, _ticks()
        own = (_own_seconds() - self._own) * os.sysconf("SC_CLK_TCK")
        return max(0.0, (total_now - total - (idle_now - idle) - own) / max(1, total_now - total))


def _own_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def _ticks() -> tuple[int, int]:
    with open("/proc/stat") as file:
        user, nice, system, idle, waiting, *rest = map(int, file.readline().split()[1:])
    return user + nice + system + idle + waiting + sum(rest[:3]), idle + waiting
