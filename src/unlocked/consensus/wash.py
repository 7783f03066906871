"""WASH: weight averaging using parameter shuffling (Fournier et al., 2024; F Chapter 6, Algorithm 2, Eq. 6.3-6.6).

    θ_n ← OPT_n(θ_n, ∇f_n(θ_n))                                            n = 1..N, each on its own data order
    θ_n^i ← θ_{π_i(n)}^i  with probability p_l,  p_l = p (1 − l/(L−1))     for each scalar i of layer l = 0..L−1

N replicas that start equal, π_i a uniform permutation of the replicas, one per scalar and step, p the base probability
(0.001 for CIFAR, 0.05 for ImageNet), L layers in forward order. The result is the mean of the replicas. WASH+Opt
(`optimizer=True`) moves the entries of the optimizer's state that belong to θ_n^i along with it, by the same π_i.

Choices the paper leaves open: what a layer is (`layers`); a BatchNorm's weight and bias are shuffled, its running statistics
are not (both can be changed); a head is shuffled like the last layer of its stage. l and L are those of the whole network,
however it is cut and whatever is left out.

Limits: p = 0 or N = 1 is independent training. Σ_n θ_n^i and Σ_n ‖θ_n − θ̄‖² are untouched by a shuffle; E[θ̂] = (1−p)θ + pθ̄.
With optimizer=True all replicas must have used the same weights by then: state that only some replicas have cannot move.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..chain import Chain
from ..errors import InvalidChoice, choose
from ..rules.shuffle import Schedule
from ..work import work
from ..worker import Worker
from .base import Consensus, Properties, Store, Weights
from .shuffling.layers import Selection, layers_of, refuse_an_empty_selection
from .shuffling.moving import Message, Shuffle
from .shuffling.states import elementwise_states

LAYERS = ("module", "tensor", "block")


class _Shuffled(Weights):
    """Independent steps, then the shuffle. Only entries that move travel; who moves is drawn alike on every replica."""

    def __init__(self, worker: Worker, chain: Chain, store: Store, rule: WASH, seed: int) -> None:
        super().__init__(worker, chain, store)
        self._rule = rule
        self._layers = layers_of(chain, rule.selection, worker.stage)
        self._shuffle = Shuffle(self._layers, seed, worker.replicas.size)

    async def mix(self) -> None:
        if self.worker.replicas.size == 1 or not self._layers or not self._rule.due(self.worker.version, self.epoch):
            return
        for message in await self.worker.run("U", self._pick):  # as many on every replica: they draw alike
            message.put(await self.worker.replicas.take(message.channel, message.values, message.owners))

    def _expected(self) -> list[Message]:
        """About what moves, where there are no tensors; the optimizer then counts as one with momentum."""
        of_weights = sum(layer.size * layer.p for layer in self._layers)
        count = round(of_weights * (2 if self._rule.optimizer else 1))
        values = torch.empty(count, dtype=self._layers[0].parts[0].tensor.dtype, device="meta")
        return [Message([], values, torch.empty((self.worker.replicas.size, count), dtype=torch.long, device="meta"))]

    @work(gives=_expected)
    def _pick(self) -> list[Message]:
        return self._shuffle.messages(self.worker.version, self._states)

    def _states(self, x: Tensor) -> Sequence[Tensor]:
        return elementwise_states(self.store.optimizer, x) if self._rule.optimizer else ()


@dataclass(frozen=True)
class WASH(Consensus):
    """Shuffle a small share of the scalars among the replicas after every update.

    Args:
        p: base probability, in [0, 1].
        schedule: how p_l changes with depth: "decreasing" (the paper's), "constant" or "increasing".
        layers: what counts as a layer: "module" (each module with parameters of its own), "tensor", or "block" (each part
            with a weight matrix that the network can be cut after, as a residual block, with what follows it without one).
        optimizer: True: WASH+Opt. State tensors of the weight's shape move along (momentum, Adam's moments, …); what has
            another shape stays (counts of steps, Adafactor's rows and columns).
        batchnorm_affine: whether BatchNorm's weights and biases are shuffled.
        batchnorm_statistics: "keep" (each replica its own, the paper's) or "shuffle": a channel's running mean and variance
            move together, with the probability of the BatchNorm's layer.
        start, end: shuffle in epochs start ≤ e < end only, counted from 0; None: from the first, to the last.
        every: shuffle after every so many updates.
        only, skip: regular expressions; shuffled are tensors in whose name (the network's own; of heads
            "stages.<j>.head.<name>") `only` is found and `skip` is not. None: no such condition.

    Raises InvalidChoice if a value is not allowed or nothing is left to shuffle.
    """

    p: float = 1e-3
    schedule: Schedule = "decreasing"
    layers: Literal["module", "tensor", "block"] = "module"
    optimizer: bool = False
    batchnorm_affine: bool = True
    batchnorm_statistics: Literal["keep", "shuffle"] = "keep"
    start: int | None = None
    end: int | None = None
    every: int = 1
    only: str | None = None
    skip: str | None = None

    name: ClassVar[str] = "wash"
    properties: ClassVar[Properties] = Properties(
        title="WASH (Fournier et al. 2024)",
        source="F Algorithm 2",
        barrier="all replicas, every update (few values)",
        bytes="(N−1)/N · p/2 · Ψ_P",
        replicas="differ, in one basin",
        result="mean of the replicas",
    )
    needs_equal_start: ClassVar[bool] = True
    counts_updates: ClassVar[bool] = True
    reads_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.p <= 1.0:
            raise InvalidChoice(
                f"p={self.p} is not a probability; give a number from 0 to 1 (the paper: 0.001 to 0.05)."
            )
        choose("schedule", self.schedule, ("decreasing", "constant", "increasing"))
        choose("layers", self.layers, LAYERS)
        choose("batchnorm_statistics", self.batchnorm_statistics, ("keep", "shuffle"))
        _check_times(self.start, self.end, self.every)
        for name, pattern in (("only", self.only), ("skip", self.skip)):
            _check_pattern(name, pattern)

    @property
    def selection(self) -> Selection:
        """What is shuffled, and how often."""
        return Selection(
            self.p,
            self.schedule,
            self.layers,
            self.batchnorm_affine,
            self.batchnorm_statistics == "shuffle",
            self.only,
            self.skip,
        )

    def due(self, update: int, epoch: int) -> bool:
        """Whether there is a shuffle after this update (from 1) in this epoch (from 0)."""
        begun = self.start is None or epoch >= self.start
        return begun and (self.end is None or epoch < self.end) and update % self.every == 0

    def weights(self, worker: Worker, chain: Chain, store: Store, seed: int) -> Weights:
        refuse_an_empty_selection(chain, self.selection)
        return _Shuffled(worker, chain, store, self, seed)


def _check_times(start: int | None, end: int | None, every: int) -> None:
    for name, epoch in (("start", start), ("end", end)):
        if epoch is not None and (isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0):
            raise InvalidChoice(f"{name}={epoch} is no epoch; give a whole number from 0, or leave it out.")
    if start is not None and end is not None and end <= start:
        raise InvalidChoice(f"start={start}, end={end} leaves no epoch to shuffle in; give an end after the start.")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise InvalidChoice(f"every={every} is not possible; give a whole number of updates of at least 1.")


def _check_pattern(name: str, pattern: str | None) -> None:
    try:
        re.compile(pattern or "")
    except (re.error, TypeError) as error:
        raise InvalidChoice(f"{name}={pattern!r} is no regular expression ({error}).") from error
