"""Which methods are predicted, and on which cut of a network each runs on two processes."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import unlocked as ul
from unlocked.chain import Chain

from pipelines.tasks import Task, chain_of

Cut = Literal["passing", "local", "whole"]


class Method(NamedTuple):
    """A pair of rules. cut: "passing" (two stages), "local" (two stages, the first with a head), "whole" (two replicas)."""

    name: str
    cut: Cut
    credit: Any
    consensus: Any = None

    @property
    def replicas(self) -> int:
        """N."""
        return 2 if self.cut == "whole" else 1


def methods(task: Task) -> list[Method]:
    """All that fit two processes."""
    backprop = ul.credit.Backprop()
    return [
        Method("backprop", "passing", backprop),
        Method("gpipe(4)", "passing", ul.credit.GPipe(4)),
        Method("dgl", "local", task.dgl),
        Method("interlocking(1)", "local", ul.credit.Interlocking(d=1, head=task.head)),
        Method("backprop/all-reduce@2", "whole", backprop, ul.consensus.AllReduce()),
        Method("backprop/all-reduce(bucket_mb=0)@2", "whole", backprop, ul.consensus.AllReduce(bucket_mb=0)),
        Method("backprop/wash(p=0.01)@2", "whole", backprop, ul.consensus.WASH(p=0.01)),
    ]


def chains(task: Task) -> dict[Cut, Chain]:
    """The network in the three cuts, the same on every process."""
    two, one = (ul.cut(task.network(), stages, like=task.x).recipe for stages in (2, 1))
    assert two is not None and one is not None
    return {"passing": chain_of(task, two), "local": chain_of(task, two, task.dgl), "whole": chain_of(task, one)}
