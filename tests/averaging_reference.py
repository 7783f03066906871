"""Rules that average now and then, one update after the other on N plain models: the formulas of the files' headers, nothing
of the library.

    reference = LocalSGD(mlp(), 3, sgd, parts=[6, 4], period=4)      3 replicas; stages of the first 6 and the next 4 tensors
    reference.step([(x, y), (x, y), (x, y)])
    reference.models

Each stage of each replica has an optimizer of its own. Weights of a stage, or of a fragment of it, are handled as one vector.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Batches = Sequence[tuple[Tensor, Tensor]]


def vector(tensors: Sequence[Tensor]) -> Tensor:
    """All values in a row; a copy."""
    return torch.cat([x.detach().reshape(-1) for x in tensors]).clone()


@torch.no_grad()
def write(values: Tensor, tensors: Sequence[Tensor]) -> None:
    """The inverse."""
    for x, part in zip(tensors, values.split([x.numel() for x in tensors])):
        x.copy_(part.view_as(x))


def mean(rows: Sequence[Tensor]) -> Tensor:
    """In the order of the replicas."""
    total = rows[0].clone()
    for row in rows[1:]:
        total = total + row
    return total / len(rows)


def begins(update: int, period: int, later: int) -> bool:
    """Whether an averaging begins after this update: every `period`, the first after `period` + `later`."""
    return update >= period + later and (update - period - later) % period == 0


class Independent:
    """N models, each trained by itself. `average` is called after every update."""

    def __init__(
        self,
        model: nn.Module,
        replicas: int,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        parts: Sequence[int],
        schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
        period: int | tuple[int, ...] = 4,
        overlap: int = 0,
        staggered: bool = False,
    ) -> None:
        self.models = [copy.deepcopy(model) for _ in range(replicas)]
        self.size, self.stages = replicas, len(parts)
        self.weights: list[list[list[nn.Parameter]]] = []
        for one in self.models:
            row, rest = [], list(one.parameters())
            for count in parts:
                row.append(rest[:count])
                rest = rest[count:]
            assert not rest
            self.weights.append(row)
        self.optimizers = [[optimizer(part) for part in row] for row in self.weights]
        self.schedules = [[None if schedule is None else schedule(one) for one in row] for row in self.optimizers]
        self.first_rate = self.rate = self.optimizers[0][0].param_groups[0]["lr"]
        self.periods = period if isinstance(period, tuple) else (period,) * len(parts)
        self.overlap, self.staggered = overlap, staggered
        self.updates = 0

    def step(self, batches: Batches) -> None:
        """One update of all, then what the rule does."""
        for model, (x, y) in zip(self.models, batches):
            model.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
        self.reduce()
        self.rate = self.optimizers[0][0].param_groups[0]["lr"]
        for n in range(self.size):
            for optimizer, schedule in zip(self.optimizers[n], self.schedules[n]):
                optimizer.step()
                if schedule is not None:
                    schedule.step()
        self.updates += 1
        for j in range(self.stages):
            self.average(j)

    def reduce(self) -> None:
        """What is done with the gradients."""

    def share_gradients(self) -> None:
        """Their mean in place of each."""
        for row in zip(*(model.parameters() for model in self.models)):
            middle = mean([x.grad for x in row])
            for x in row:
                x.grad.copy_(middle)

    def average(self, j: int) -> None:
        """What is done with the weights of stage j."""

    def later(self, j: int) -> int:
        """Updates by which stage j is later than stage 0."""
        return j * self.periods[j] // self.stages if self.staggered else 0

    def due(self, j: int) -> bool:
        return begins(self.updates, self.periods[j], self.later(j))

    def theta(self, j: int) -> list[Tensor]:
        """The weights of stage j of every replica."""
        return [vector(self.weights[n][j]) for n in range(self.size)]

    def put(self, j: int, rows: Sequence[Tensor]) -> None:
        for n, row in enumerate(rows):
            write(row, self.weights[n][j])


class Late(Independent):
    """What is begun at one update and taken in `overlap` later."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.begun: dict[Any, tuple[int, list[Tensor]]] = {}

    def arriving(self, j: int) -> list[Tensor] | None:
        """What stage j of every replica had when the exchange began that is over now."""
        if self.overlap and j in self.begun and self.updates == self.begun[j][0] + self.overlap:
            return self.begun.pop(j)[1]
        return None

    def average(self, j: int) -> None:
        before = self.arriving(j)
        if before is not None:
            self.take_in(j, before)
        if self.due(j):
            if self.overlap:
                self.begun[j] = self.updates, self.theta(j)
            else:
                self.take_in(j, self.theta(j))

    def take_in(self, j: int, before: list[Tensor]) -> None:
        raise NotImplementedError


class Papa(Late):
    """θ_n ← θ_n + α γ_t/γ_0 (θ̄ − θ_n)^{t−τ}."""

    def __init__(self, *arguments: Any, alpha: float, anneal: bool = True, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.alpha, self.anneal = alpha, anneal

    def take_in(self, j: int, before: list[Tensor]) -> None:
        share = self.alpha * (self.rate / self.first_rate if self.anneal else 1.0)
        middle = mean(before)
        self.put(j, [theta + share * (middle - was) for theta, was in zip(self.theta(j), before)])


class LocalSGD(Late):
    """θ_n ← θ̄; a round of `shared` updates with mean gradients before; levels of groups."""

    def __init__(
        self,
        *arguments: Any,
        shared: int = 0,
        hierarchy: Sequence[tuple[int, int]] = (),
        state: str = "local",
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.shared, self.levels, self.state = shared, list(hierarchy), state

    def reduce(self) -> None:
        if self.updates < self.shared:
            self.share_gradients()

    def average(self, j: int) -> None:
        if not self.levels:
            if self.updates > self.shared or self.begun:
                super().average(j)
            return
        sizes = [size for period, size in self.levels if self.updates % period == 0]
        if sizes and self.updates > self.shared:
            for first in range(0, self.size, max(sizes)):
                self.merge(j, range(first, first + max(sizes)))

    def merge(self, j: int, group: Sequence[int]) -> None:
        middle = mean([vector(self.weights[n][j]) for n in group])
        for n in group:
            write(middle, self.weights[n][j])
        self.merge_states(j, group)

    def merge_states(self, j: int, group: Sequence[int]) -> None:
        optimizers = [self.optimizers[n][j] for n in group]
        if self.state == "reset":
            for optimizer in optimizers:
                optimizer.state.clear()
        if self.state == "average":
            for k, x in enumerate(self.weights[group[0]][j]):
                for name, value in optimizers[0].state[x].items():
                    if isinstance(value, Tensor) and value.shape == x.shape:
                        rows = [one.state[self.weights[n][j][k]][name] for one, n in zip(optimizers, group)]
                        middle = mean(rows)
                        for row in rows:
                            row.copy_(middle)

    def take_in(self, j: int, before: list[Tensor]) -> None:
        if not self.overlap:
            self.merge(j, range(self.size))
            return
        middle = mean(before)
        self.put(j, [theta + (middle - was) for theta, was in zip(self.theta(j), before)])
        self.merge_states(j, range(self.size))


class SlowMo(Independent):
    """v ← β v + (x − θ̄)/γ;  x ← x − α γ v, as the paper has it."""

    def __init__(self, *arguments: Any, alpha: float, beta: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.alpha, self.beta = alpha, beta
        self.x = [self.theta(j)[0] for j in range(self.stages)]
        self.v = [torch.zeros_like(x) for x in self.x]

    def average(self, j: int) -> None:
        if self.due(j):
            self.v[j] = self.beta * self.v[j] + (self.x[j] - mean(self.theta(j))) / self.rate
            self.x[j] = self.x[j] - self.alpha * self.rate * self.v[j]
            self.put(j, [self.x[j]] * self.size)


class DiLoCo(Independent):
    """PyTorch's SGD on Δ = mean of x − θ_n; fragments of layers, each at its own time, taken in late and mixed."""

    def __init__(
        self,
        *arguments: Any,
        outer: Callable[[list[Tensor]], torch.optim.Optimizer],
        fragments: int = 1,
        mixing: float = 0.0,
        layers: Callable[[int], int] = lambda place: place // 2,
        **options: Any,
    ) -> None:
        """`layers`: the layer of a tensor, by its place in the network. A stage's fragments that hold nothing do not count."""
        super().__init__(*arguments, **options)
        self.mixing, self.fragments = mixing, []  # (stage, update, places in the stage, x, optimizer)
        place = 0
        for j in range(self.stages):
            rows: list[list[int]] = [[] for _ in range(fragments)]
            for k in range(len(self.weights[0][j])):
                rows[layers(place) % fragments].append(k)
                place += 1
            rows = [row for row in rows if row]
            for p, row in enumerate(rows):
                x = vector([self.weights[0][j][k] for k in row]).requires_grad_()
                later = (self.later(j) + p * self.periods[j] // len(rows)) % self.periods[j]
                self.fragments.append((j, later, row, x, outer([x])))
        self.deltas: dict[int, tuple[int, Tensor]] = {}

    def average(self, j: int) -> None:
        for p, (stage, later, places, x, optimizer) in enumerate(self.fragments):
            if stage != j:
                continue
            mine = [[self.weights[n][j][k] for k in places] for n in range(self.size)]
            if self.overlap and p in self.deltas and self.updates == self.deltas[p][0] + self.overlap:
                self.take_delta(x, optimizer, self.deltas.pop(p)[1], mine)
            if begins(self.updates, self.periods[j], later):
                delta = mean([x.detach() - vector(row) for row in mine])
                if self.overlap:
                    self.deltas[p] = self.updates, delta
                else:
                    self.take_delta(x, optimizer, delta, mine)

    def take_delta(self, x: Tensor, optimizer: torch.optim.Optimizer, delta: Tensor, mine: list[list[Tensor]]) -> None:
        x.grad = delta
        optimizer.step()
        for row in mine:
            write((1 - self.mixing) * x.detach() + self.mixing * vector(row), row)


class CO2(Independent):
    """v ← clip(β v + (x_{t−1} − θ̄_{t−1}));  x_{t+1} ← x_t − α v/Λ, in u = γ v."""

    def __init__(
        self, *arguments: Any, alpha: float, beta: float, clip: float | None, penalty: bool, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.alpha, self.beta, self.clip, self.penalty = alpha, beta, clip, penalty
        self.x = [self.theta(j)[0] for j in range(self.stages)]
        self.v = [torch.zeros_like(x) for x in self.x]
        self.before: list[tuple[Tensor, Tensor] | None] = [None] * self.stages  # x and θ̄ of the round before

    def average(self, j: int) -> None:
        if not self.due(j):
            return
        now, ended = self.x[j], mean(self.theta(j))
        if self.before[j] is not None:
            was, reached = self.before[j]
            u = self.rate * (self.beta * self.v[j] + (was - reached) / self.rate)
            if self.clip is not None and u.norm() > self.clip:
                u = u * self.clip / u.norm()
            self.v[j] = u / self.rate
            gap = 1 + (now - was).norm() / (was - reached).norm() if self.penalty else 1.0
            self.x[j] = now - self.alpha * u / gap
        self.before[j] = now, ended
        self.put(j, [self.x[j]] * self.size)


class Easgd(Late):
    """d_n = ρ (θ_n − c)^{t−τ};  θ_n ← θ_n − d_n;  c ← c + Σ d_n."""

    def __init__(self, *arguments: Any, rho: float | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.rho = 0.9 / self.size if rho is None else rho
        self.centre = [self.theta(j)[0] for j in range(self.stages)]

    def take_in(self, j: int, before: list[Tensor]) -> None:
        differences = [self.rho * (was - self.centre[j]) for was in before]
        self.put(j, [theta - d for theta, d in zip(self.theta(j), differences)])
        for d in differences:
            self.centre[j] = self.centre[j] + d


class ByEpochs(Independent):
    """Nothing after updates; `end_epoch` merges: pairs = {0, 1, …} for every replica, or all. Gradients are shared at first."""

    def __init__(self, *arguments: Any, shared: int = 0, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.shared, self.epoch = shared, 0

    def reduce(self) -> None:
        if self.epoch < self.shared:
            self.share_gradients()

    def end_epoch(self, groups: Sequence[Sequence[int]] | None) -> None:
        """`groups`: whose mean each replica becomes; None: no merge."""
        self.epoch += 1
        if groups is not None:
            for j in range(self.stages):
                rows = self.theta(j)
                self.put(j, [mean([rows[n] for n in group]) for group in groups])


def consensus_distance(replicas):
    """Σ_n ‖θ_n − θ̄‖² (F Eq. 6.2), in float64."""
    rows = torch.stack([x.detach().double().reshape(-1) for x in replicas])
    return float((rows - rows.mean(0)).square().sum())
