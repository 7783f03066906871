"""WASH: weight averaging using parameter shuffling (Fournier et al., 2024; F Chapter 6, Algorithm 2, Eq. 6.3-6.6).

    θ_n ← OPT_n(θ_n, ∇f_n(θ_n))                                            n = 1..N, each on its own data order
    θ_n^i ← θ_{π_i(n)}^i  with probability p_l,  p_l = p (1 − l/(L−1))     for each scalar i of layer l = 0..L−1

    N replicas that start equal, π_i a uniform permutation of the replicas, one per scalar and step, p the base probability
    (0.001 for CIFAR, 0.05 for ImageNet), L layers in forward order. The result is the mean of the replicas.

Choices the paper leaves open: a layer is a module with parameters of its own (`layers="tensor"`: a parameter tensor); a
BatchNorm's weight and bias are shuffled, its running statistics are not; a head is shuffled like the last layer of its stage.

Limits: p = 0 or N = 1 is independent training. Σ_n θ_n^i and Σ_n ‖θ_n − θ̄‖² are untouched by a shuffle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..chain import Chain
from ..errors import InvalidChoice, choose
from ..rng import generator
from ..rules.shuffle import Schedule, draw, layer_probability
from ..work import work
from ..worker import Worker
from .base import Consensus, Properties, Store, Weights


class _Moving(NamedTuple):
    """What moves at an update: (tensor, indices), the entries in a row (k,), and the owners (N, k) of the new ones."""

    picked: list[tuple[Tensor, Tensor]]
    values: Tensor
    owners: Tensor

    def put(self, taken: Tensor) -> None:
        """Write the new entries (k,)."""
        begin = 0
        for tensor, where in self.picked:
            tensor.put_(where, taken[begin : begin + len(where)])
            begin += len(where)


class _Shuffled(Weights):
    """Independent steps, then the shuffle. Only entries that move travel; who moves is drawn alike on every replica."""

    def __init__(self, worker: Worker, chain: Chain, store: Store, rule: WASH, seed: int) -> None:
        super().__init__(worker, chain, store)
        self._seed = seed
        self._rows = [row for row in _probabilities(chain, rule, worker.stage) if row[2] > 0.0]

    async def mix(self) -> None:
        if self.worker.replicas.size == 1 or not self._rows:
            return
        moving = await self.worker.run("U", self._pick)
        if moving is None:  # then on every replica: they draw alike
            return
        taken = await self.worker.replicas.take("wash", moving.values, moving.owners)
        moving.put(taken)

    def _expected(self) -> _Moving:
        """About how many entries move, where there are no tensors."""
        count = round(sum(tensor.numel() * p for _, tensor, p in self._rows))
        values = torch.empty(count, dtype=self._rows[0][1].dtype, device="meta")
        return _Moving([], values, torch.empty((self.worker.replicas.size, count), dtype=torch.long, device="meta"))

    @work(gives=_expected)
    def _pick(self) -> _Moving | None:
        """The entries that move at this update; None if there are none."""
        picked, columns = [], []
        for layer, tensor, p in self._rows:
            source = generator(self._seed, "wash", self.worker.version, layer)
            where, owners = draw(tensor.numel(), p, self.worker.replicas.size, source)
            if len(where):
                picked.append((tensor, where.to(tensor.device)))
                columns.append(owners.to(tensor.device))
        if not picked:
            return None
        return _Moving(picked, torch.cat([tensor.take(where) for tensor, where in picked]), torch.cat(columns, dim=1))


@dataclass(frozen=True)
class WASH(Consensus):
    """Shuffle a small share of the scalars among the replicas after every update.

    Args:
        p: base probability, in [0, 1].
        schedule: how p_l changes with depth: "decreasing" (the paper's), "constant" or "increasing".
        layers: what counts as a layer: "module" or "tensor".
    """

    p: float = 1e-3
    schedule: Schedule = "decreasing"
    layers: Literal["module", "tensor"] = "module"

    name: ClassVar[str] = "wash"
    properties: ClassVar[Properties] = Properties(
        title="WASH (Fournier et al. 2024)",
        source="F Algorithm 2",
        barrier="all replicas, every update (few values)",
        bytes="(N−1)/N · p/2 · Ψ_P",
        replicas="differ, in one basin",
        result="mean of the replicas",
    )

    def __post_init__(self) -> None:
        if not 0.0 <= self.p <= 1.0:
            raise InvalidChoice(
                f"p={self.p} is not a probability; give a number from 0 to 1 (the paper: 0.001 to 0.05)."
            )
        choose("schedule", self.schedule, ("decreasing", "constant", "increasing"))
        choose("layers", self.layers, ("module", "tensor"))

    def weights(self, worker: Worker, chain: Chain, store: Store, seed: int) -> Weights:
        return _Shuffled(worker, chain, store, self, seed)


def _probabilities(chain: Chain, rule: WASH, stage: int) -> list[tuple[str, Tensor, float]]:
    """(name for the seed, tensor, p_l) of every trained tensor of the stage; the name is the same for every split."""
    layers = chain.layers(rule.layers)
    user = {(j, inside): name for name, j, inside in chain.names}
    rows: list[tuple[str, Tensor, float]] = []
    last = 0.0
    for index, (j, _, parameters) in enumerate(layers):
        if j != stage:
            continue
        last = layer_probability(rule.p, index, len(layers), rule.schedule)
        rows += [(user[(j, name)], x, last) for name, x in chain[j].body.named_parameters() if _among(x, parameters)]
    head = chain[stage].head
    if head is not None:
        rows += [(f"head {stage} {name}", x, last) for name, x in head.named_parameters()]
    return [(name, x.detach(), p) for name, x, p in rows if x.requires_grad]


def _among(x: Tensor, tensors: list[torch.nn.Parameter]) -> bool:
    return any(x is tensor for tensor in tensors)
