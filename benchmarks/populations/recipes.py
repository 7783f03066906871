"""The runs behind Figures 6.2, 6.4, 6.5, 6.6 and D.1, each as rows that a table and a picture can be made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

from torch import nn

import unlocked as ul
from unlocked.callbacks import Callback
from unlocked.consensus import Consensus
from unlocked.data import Data

from .training import Method, Recipe, trained

Row = dict[str, Any]
POINTS = 40  # of a curve, and steps


@dataclass(frozen=True)
class Bench:
    """What the recipes share: how is trained, on what, who judges; p of WASH, α of PAPA, N."""

    recipe: Recipe
    train: Data
    test: Data
    p: float
    alpha: float
    members: int

    def run(self, method: Method, seed: int = 0, callbacks: Sequence[Callback] = ()) -> list[nn.Module]:
        """The members after training."""
        trainer, _ = trained(self.recipe, method, self.members, seed, self.train, callbacks=callbacks)
        return cast(list[nn.Module], trainer.members())

    def accuracies(self, members: Sequence[nn.Module]) -> Row:
        """In percent: of the ensemble, of the averaged network, of the members in the mean."""
        found = ul.soups.evaluate_population(members, self.test)
        shares = [one.accuracy or 0.0 for one in found.members]
        return {
            "ensemble": 100 * (found.ensemble.accuracy or 0.0),
            "averaged": 100 * (found.averaged.accuracy or 0.0),
            "member": 100 * sum(shares) / len(shares),
            "disagreement": 100 * (found.mean_disagreement or 0.0),
        }


class DistanceToConsensus(Callback):
    """Keeps (epochs, distance, distances of the four quarters) before training and after every few updates."""

    def __init__(self, updates: int, of_epoch: int) -> None:
        self._every, self._of_epoch = max(1, updates // POINTS), of_epoch
        self.records: list[tuple[float, float, tuple[float, ...]]] = []

    def on_start(self, trainer: ul.Trainer, epochs: int) -> None:
        self._keep(trainer)

    def on_step(self, trainer: ul.Trainer, record: dict[str, Any]) -> None:
        if trainer.steps % self._every == 0:
            self._keep(trainer)

    def _keep(self, trainer: ul.Trainer) -> None:
        found = ul.soups.distance_to_consensus(trainer.chains)
        self.records.append((trainer.steps / self._of_epoch, found.whole, found.quarters))


def distances(bench: Bench, rules: Mapping[str, Consensus], seed: int = 0) -> Iterator[Row]:
    """A row for each rule: epochs, distances, quarters (per quarter), and the accuracies at the end. All begin equal."""
    of_epoch = bench.train.steps(bench.recipe.batch)
    for name, rule in rules.items():
        seen = DistanceToConsensus(of_epoch * bench.recipe.epochs, of_epoch)
        members = bench.run(Method(rule, batchnorm="average" if name.startswith("PAPA") else "local"), seed, [seen])
        epochs, whole, quarters = zip(*seen.records)
        row = {"name": name, "epochs": epochs, "distances": whole, "quarters": list(zip(*quarters))}
        yield row | bench.accuracies(members)


def of_methods(bench: Bench) -> Iterator[Row]:
    """Figure 6.2."""
    rules = ul.consensus
    every = max(1, bench.recipe.epochs // 6)
    methods = {
        "baseline": rules.Independent(),
        "PAPA": rules.PAPA(alpha=bench.alpha, period=10),
        f"PAPA-all, every {every} epochs": rules.PAPAAll(epochs=every),
        "WASH": rules.WASH(bench.p),
        "WASH+Opt": rules.WASH(bench.p, optimizer=True),
    }
    return distances(bench, methods)


def of_schedules(bench: Bench) -> Iterator[Row]:
    """Figure 6.4."""
    schedules = ("decreasing", "constant", "increasing")
    return distances(bench, {name: ul.consensus.WASH(bench.p, schedule=name) for name in schedules})  # type: ignore[arg-type]


def of_probabilities(bench: Bench, values: Sequence[float], seeds: int) -> Iterator[Row]:
    """Figure 6.5: a row for each p and seed. p = 0 is the baseline."""
    for p in values:
        for seed in range(seeds):
            yield {"p": p, "seed": seed} | bench.accuracies(bench.run(Method(ul.consensus.WASH(p)), seed))


def of_times(bench: Bench, epochs: Sequence[int], seeds: int) -> Iterator[Row]:
    """Figure 6.6: rows with `kind` "from" (shuffling from that epoch on) and "until" (in the epochs before it)."""
    known: dict[tuple[Consensus, int], Row] = {}  # the ends of the two curves are the same
    last, wash = bench.recipe.epochs, ul.consensus.WASH
    for seed, epoch in product(range(seeds), epochs):
        rules: dict[str, Consensus] = {
            "from": wash(bench.p, start=epoch) if 0 < epoch < last else wash(bench.p),
            "until": wash(bench.p, end=epoch) if 0 < epoch < last else wash(bench.p),
        }
        if epoch in (0, last):
            rules["until" if epoch == 0 else "from"] = ul.consensus.Independent()
        for kind, rule in rules.items():
            if (rule, seed) not in known:
                known[rule, seed] = bench.accuracies(bench.run(Method(rule), seed))
            yield {"kind": kind, "epoch": epoch, "seed": seed} | known[rule, seed]


def of_interpolations(bench: Bench, steps: int) -> Iterator[tuple[str, ul.soups.HeatMap]]:
    """Figure D.1: a heat map for each method."""
    wash = {"WASH": ul.consensus.WASH(bench.p), "WASH+Opt": ul.consensus.WASH(bench.p, optimizer=True)}
    rules: dict[str, Consensus] = {"baseline": ul.consensus.Independent(), **wash}
    for name, rule in rules.items():
        yield name, ul.soups.heat_map(bench.run(Method(rule)), bench.test, steps=steps)
