"""What the rules ACCO, DPU and weight prediction have in common: their parameters' meaning, and what they cannot do."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

from ..chain import Chain
from ..errors import InvalidChoice
from ..mitigation import Mitigation
from ..worker import Worker
from .accumulating import Accumulating
from .base import Consensus, Store
from .sharded_update import refuse_optimizer

Contributions = tuple[int, ...] | Literal["managed"] | None


class AccumulatingRule(Consensus):
    """A rule whose step consists of rounds of micro-batches (`fewest` of them), with an exchange beside each.

    No dataclass itself, since its fields would come before a rule's own: each rule says the order of its parameters.
    `contributions` and `samples_per_schedule_step` mean what `DPU` says. correction: what the rule itself does about late
    gradients, in a word.
    """

    contributions: Contributions
    samples_per_schedule_step: int | None

    shares_data: ClassVar[bool] = True
    needs_equal_start: ClassVar[bool] = True
    one_at_a_time: ClassVar[bool] = True
    correction: ClassVar[str]

    def __post_init__(self) -> None:
        check_contributions(self.contributions, self.samples_per_schedule_step)

    def weights(self, worker: Worker, chain: Chain, store: Store, seed: int) -> Accumulating:
        """Raises InvalidChoice for what the rule cannot do."""
        self._check(worker, store)
        if store.mitigation is not None:
            self.check_mitigation(store.mitigation)
        return self.accumulating(worker, chain, store)

    @abstractmethod
    def accumulating(self, worker: Worker, chain: Chain, store: Store) -> Accumulating:
        """The weights of one worker, everything being checked."""

    def check_mitigation(self, mitigation: Mitigation) -> None:
        """Raises InvalidChoice for a mitigation that has nothing to act on. Here: for all."""
        raise InvalidChoice(
            f"{self.name}'s {self.correction} is what it does about late gradients, so {mitigation.name} has nothing to act "
            "on; leave it out, or use dpu with it."
        )

    def _check(self, worker: Worker, store: Store) -> None:
        rounds, given = self.fewest, self.contributions
        if store.accumulate < rounds:
            raise InvalidChoice(
                f"{self.name} splits a step into {rounds} rounds and needs at least as many micro-batches, got "
                f"accumulate={store.accumulate}; give accumulate={rounds} or more."
            )
        if isinstance(given, tuple) and len(given) != worker.replicas.size:
            raise InvalidChoice(
                f"contributions={given} are those of {len(given)} replicas, but there are {worker.replicas.size}; give one "
                "number for each."
            )
        if given == "managed" and worker.stages > 1:
            raise InvalidChoice(
                f"contributions='managed' lets each worker stop when it has no more time, but the {worker.stages} stages of "
                "a replica must do the same micro-batches; give whole numbers, or train without stages."
            )
        refuse_optimizer(self.name, store.optimizer)


def check_contributions(contributions: Contributions, per_step: int | None) -> None:
    """Raises InvalidChoice for values that mean nothing."""
    numbers = contributions if isinstance(contributions, tuple) else ()
    good = contributions in (None, "managed") or (numbers and all(isinstance(c, int) and c >= 1 for c in numbers))
    if not good:
        raise InvalidChoice(
            f"contributions={contributions!r} is not possible; give None (all do all), a tuple with each replica's "
            "micro-batches per round, whole numbers of at least 1, or 'managed'."
        )
    if per_step is not None and not (isinstance(per_step, int) and per_step >= 1):
        raise InvalidChoice(
            f"samples_per_schedule_step={per_step} is not possible; give a whole number of at least 1, or None."
        )
