"""1F1B with flush (Narayanan et al., 2019 and 2021; F §2.1.2; B1-B2): one forward, one backward, drained before every update.

    stage j of J (from 0):  J − 1 − j forwards first, then F B F B … , then the backwards that are left, then one update

    J = 3, M = 4 (time to the right)
    stage 0    F0 F1 F2 B0 F3 B1 .. B2 B3
    stage 1       F0 F1 B0 F2 B1 F3 B2 B3
    stage 2          F0 B0 F1 B1 F2 B2 F3 B3

The sums are those of GPipe and of backpropagation with M accumulated micro-batches, bit for bit; the bubble is GPipe's; what is
kept is J − j micro-batches at most, not M.

Limits: M = 1 is backpropagation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..worker import Worker
from .base import Properties
from .gpipe import Flushed


@dataclass(frozen=True)
class OneFOneB(Flushed):
    """The network's own loss through a pipeline that does backwards as soon as it can, and is drained for every batch."""

    name: ClassVar[str] = "1f1b"
    properties: ClassVar[Properties] = Properties(
        title="1F1B with flush (Narayanan et al. 2019)",
        source="F Figure 2.5c",
        locks="forward, backward (per micro-batch), update",
        memory="own stage, J − j micro-batches",
        up="Ψ_A",
        down="Ψ_A",
        delay="0",
        objective="global",
    )

    def ahead(self, worker: Worker) -> int:
        return worker.stages - 1 - worker.stage
