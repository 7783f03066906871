"""Which process a worker lives in."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InvalidChoice
from ..worker import Place
from .local import places


def placement(replicas: int | Sequence[int], stages: int, processes: int) -> dict[Place, int]:
    """Workers replica by replica, in rows as equal as can be. Raises InvalidChoice if there are more processes than workers."""
    workers = len(places(replicas, stages))
    if processes > workers:
        raise InvalidChoice(
            f"{processes} processes were started for {workers} worker(s) ({replicas} replica(s), {stages} stage(s)); "
            f"start at most {workers}, or give more replicas or stages."
        )
    return {place: index * processes // workers for index, place in enumerate(places(replicas, stages))}
