"""Which events of an ordered list may be computed at the same time, exactly.

Two exchanges that share no node commute, so a list of events may be cut into batches in which no node comes twice, as long as
each node sees its own events in their order. The first batch is the events that are the first of both of their nodes; then
the same among the rest, until nothing is left.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..graph import Integers


def disjoint_batches(i: Integers, j: Integers, scratch: Integers) -> Iterator[Integers]:
    """Positions of the events of each batch, in ascending order; together all of 0 … len(i) − 1, each once.

    i, j: (k,) the two nodes of each event. scratch: as long as there are nodes; it is written to.
    """
    left = np.arange(len(i))
    while len(left):
        ends = np.stack([i[left], j[left]], axis=1)
        numbers = np.arange(len(left))
        backwards = ends.ravel()[::-1]  # so that the first event of a node is written last, and stays
        scratch[backwards] = np.repeat(numbers, 2)[::-1]
        ready = (scratch[ends] == numbers[:, None]).all(axis=1)
        yield left[ready]
        left = left[~ready]
