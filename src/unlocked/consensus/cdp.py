"""Cyclic data parallelism (Fournier & Oyallon, 2024; F Chapter 5, Eq. CDP, Algorithm 1, Table 5.1).

    θ_{t+1} = OPT(θ_t, (1/N) Σ_n ∇f_n(θ̂_{n,t}))          θ̂_{n,t}^j = u_{n,j}(θ_t^j, θ_{t−1}^j)          θ_{−1} = θ_0

    n = 0..N−1 replica, j = 0..J−1 stage, t training step (learning-rate schedules count these); f_n the loss of replica n on
    its own shard of the batch; u the rule: v1 takes θ_{t−1} everywhere, v2 takes θ_t wherever it can be had in time, any
    matrix in between may be given (rules/cyclic.py).

Replica n begins n/N of a gradient's time after replica 0, so that a stage's gradients come one after the other, and travel
point to point. Forward and backward of a micro-batch see the same weights. One rule, several executions (`form`):

    ring            N devices, a replica on each. Gradients and new weights go round; replica N−1 makes the updates.
    single-device   one device, one set of parameters: N micro-batches staggered through it. At most (N+1)/2 times the
                    activations of one are there, where all at once keep N times. θ_{t−1} is kept while it is still read.
    model-parallel  N(N+1)/2 devices (for J = N) with one stage and one micro-batch each (cyclic/pyramid.py).
    zero            N devices, a replica's activations on each; a stage's states are on one of them at a time, and move from
                    who has used them to who uses them next (cyclic/zero.py).

As a pipeline on J devices v1 is the credit rule `pipedream-2bw`, and any rule is `cdp-pipeline`.

The first step is an ordinary one: all see θ_0. After T updates the parameters of every replica are θ_T; mixtures are never
averaged. The optimizer's state is where the updates are made. `clip` is of each stage's own gradient: the norm of the whole
network's is not known when the first stage is updated.

Limits: N = 1 with v2 is ordinary training; where u is True everywhere it would be data parallelism, which is never in time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from ..batch import Batch
from ..chain import Chain
from ..errors import InvalidChoice, choose
from ..rules.cyclic import freshness, rows_of
from ..worker import Worker
from .base import Consensus, Properties, Store, Weights
from .cyclic.pyramid import Device, devices
from .cyclic.reading import Plan
from .cyclic.ring import CROSSING, Ring
from .cyclic.single import Single
from .cyclic.zero import Visited

Form = Literal["ring", "single-device", "model-parallel", "zero"]
_KINDS: dict[str, Callable[..., Weights]] = dict(zip(get_args(Form), (Ring, Single, Device, Visited), strict=True))


@dataclass(frozen=True)
class CDP(Consensus):
    """Replicas one after the other, by the rule u.

    Args:
        rule: "v1", "v2", N rows (replicas) of J truth values (stages), or a function (replica, stage) → bool, both counted
            from 0: True for θ_t. "newest": whatever has arrived when a forward begins, θ_{t−1} at least; on real processes that
            depends on who is faster.
        form: where the replicas are, see above.
        staggered: False: all replicas begin at once (the clock and the memory are then those of data parallelism).

    Raises InvalidChoice (when a trainer is made) for a rule of another size, or one that cannot be had in time.
    """

    rule: Literal["v1", "v2", "newest"] | tuple | Callable[[int, int], bool] = "v2"
    form: Form = "ring"
    staggered: bool = True

    name: ClassVar[str] = "cdp"
    properties: ClassVar[Properties] = Properties(
        title="Cyclic data parallelism (Fournier & Oyallon 2024)",
        source="F Algorithm 1",
        barrier="none: a replica waits for the one before it",
        bytes="2(N−1)/N Ψ_P, point to point",
        replicas="equal, up to one update apart",
        result="any replica",
    )
    shares_data: ClassVar[bool] = True
    needs_equal_start: ClassVar[bool] = True
    in_a_row: ClassVar[bool] = True
    one_at_a_time: ClassVar[bool] = True

    def __post_init__(self) -> None:
        choose("form of cyclic data parallelism", self.form, list(_KINDS))
        object.__setattr__(self, "rule", rows_of(self.rule, ("v1", "v2", "newest")))

    @property
    def crossing(self) -> frozenset[str]:
        return CROSSING

    @property
    def needs_one_process(self) -> bool:
        return self.form == "single-device"

    def networks(self, replicas: int) -> int:
        return 1 if self.form in ("model-parallel", "zero") else replicas

    def sizes(self, replicas: int, stages: int) -> list[int]:
        return devices(replicas, stages) if self.form == "model-parallel" else super().sizes(replicas, stages)

    def check(self, credit: Any, accumulate: int) -> None:
        if self.form == "model-parallel" and accumulate > 1:
            raise InvalidChoice(
                f"A device of cyclic model parallelism has one micro-batch at a time, got accumulate={accumulate}; give more "
                "replicas instead: each is a micro-batch of the step."
            )
        if self.form in ("model-parallel", "zero") and credit.name != "backprop":
            raise InvalidChoice(
                f"form={self.form!r} of cyclic data parallelism is made for backprop, where a stage has nothing to do between "
                f"its forward and its backward; {credit.name} goes with form='ring' or 'single-device'."
            )

    def batches(self, worker: Worker, given: Mapping[int, list[Batch]]) -> list[Batch]:
        if self.form != "model-parallel":
            return super().batches(worker, given)
        count, rows = len(given), [batch for n in sorted(given) for batch in given[n]]
        steps = [batch._replace(number=batch.number * count + k, weight=1.0 / count) for k, batch in enumerate(rows)]
        return [batch for batch in steps if batch.number % worker.replicas.size == worker.replica]

    def feeds(self, worker: Worker, replicas: int) -> Iterable[int]:
        return range(replicas) if self.form == "model-parallel" else super().feeds(worker, replicas)

    def copies(self, chain: Chain, replicas: int) -> list[Chain]:
        if self.form != "single-device":
            return super().copies(chain, replicas)
        shared = {id(x): x for x in chain.parameters()}
        return [chain, *(copy.deepcopy(chain, dict(shared)) for _ in range(replicas - 1))]

    def weights(self, worker: Worker, chain: Chain, store: Store, seed: int) -> Weights:
        newest = self.rule == "newest"
        count = store.replicas
        fresh = freshness("v2" if newest else self.rule, count, worker.stages)  # type: ignore[arg-type]
        plan = Plan(tuple(row[worker.stage] for row in fresh), newest, self.staggered)
        if store.mitigation is not None:
            raise InvalidChoice(
                f"cdp's gradients are those of the weights its rule says, and {store.mitigation.name} has no part in that; "
                "leave the mitigation out, or use it with a delayed credit rule (cdp-pipeline)."
            )
        return _KINDS[self.form](worker, chain, store, plan)
