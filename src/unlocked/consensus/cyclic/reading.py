"""Which weights the forwards of a step see, and how: what the forms of cyclic data parallelism have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from ...versions import Reading, Versions
from ...worker import Worker


class Plan(NamedTuple):
    """What a worker needs to know of the rule. fresh: u of all replicas at this stage. newest: take whatever is there."""

    fresh: tuple[bool, ...]
    newest: bool = False
    staggered: bool = True

    async def begin(self, worker: Worker, n: int) -> None:
        """Before the first forward of replica (or micro-batch) n; from then on the messages keep the distance."""
        if self.staggered and worker.first:
            await worker.until(n / len(self.fresh))


class Count:
    """The updates of a stage that is no single worker's: several have it, or it is elsewhere at times."""

    def __init__(self, stage: int) -> None:
        self.stage, self.version = stage, 0


@contextlib.contextmanager
def seen(versions: Versions, reading: Reading | None) -> Iterator[None]:
    """What is computed inside sees the weights of the reading (None: those in place); graphs made inside hold their names."""
    if reading is None:
        yield
        return
    with versions.in_place(reading), versions.saving(reading, "stash"):
        yield
