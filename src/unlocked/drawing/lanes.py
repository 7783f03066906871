"""The lanes of a timeline: a worker each, or a device each where workers share devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..simulation.memory import Curve, together
from ..timeline import BUSY, Act, Timeline
from ..worker import Place

Colours = Literal["micro-batch", "kind"]


@dataclass(frozen=True)
class Lane:
    """What is drawn in one line. acts: in their order of beginning. span: seconds of the whole timeline."""

    name: str
    places: tuple[Place, ...]
    acts: tuple[Act, ...]
    span: float

    @property
    def idle(self) -> float:
        """Share of the timeline in which nobody here computes or updates."""
        busy = sum(act.end - act.start for act in self.acts if act.kind in BUSY)
        return max(0.0, 1.0 - busy / self.span) if self.span else 0.0


def lanes(timeline: Timeline, devices: Mapping[Place, int] | None = None) -> list[Lane]:
    """One lane per device of `devices`, in their order; without: one per worker, replica by replica."""
    workers = [Place(*worker) for worker in timeline.workers()]
    rows: dict[int, list[Place]] = {}
    for number, place in enumerate(workers):
        rows.setdefault(number if devices is None else devices[place], []).append(place)
    acts: dict[Place, list[Act]] = {place: [] for place in workers}
    for act in timeline:
        acts[Place(act.replica, act.stage)].append(act)
    shared = any(len(row) > 1 for row in rows.values())
    replicas, stages = (len({place[axis] for place in workers}) for axis in (0, 1))
    span = timeline.span()
    found = []
    for number, row in sorted(rows.items()):
        name = f"device {number}" if shared else _name(row[0], replicas, stages)
        together = sorted((act for place in row for act in acts[place]), key=lambda act: (act.start, act.end))
        found.append(Lane(name, tuple(row), tuple(together), span))
    return found


def lane_curves(rows: Sequence[Lane], curves: Mapping[Place, Curve]) -> list[Curve]:
    """What the workers of each lane hold together, from the curves of the workers (simulation/memory.py)."""
    return [together([curves.get(place, []) for place in lane.places]) for lane in rows]


def _name(place: Place, replicas: int, stages: int) -> str:
    if replicas == 1:
        return f"stage {place.stage}"
    return f"replica {place.replica}" + (f" stage {place.stage}" if stages > 1 else "")
