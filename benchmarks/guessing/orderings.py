"""What the thesis claims about the order of accuracies, each claim tested seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from .cases import SPACES, Case

Scores = Mapping[Case, Mapping[int, float]]  # accuracies in % by case and seed
_STUDENT = {2: 6.31, 3: 2.92, 4: 2.35, 5: 2.13}  # by number of seeds: 5 % in one tail


class Pair(NamedTuple):
    """The first is claimed to be better than the second."""

    better: Case
    worse: Case


class Found(NamedTuple):
    """mean, error: of the difference over the seeds that have both, in points of accuracy, and its standard error."""

    pair: Pair
    mean: float
    error: float
    seeds: int

    @property
    def verdict(self) -> str:
        """By Student's t in one tail at 5 %, without a correction for the number of pairs."""
        if self.seeds < 2:
            return "not settled"
        bound = _STUDENT.get(self.seeds, 2.0) * self.error
        return "holds" if self.mean > bound else "reversed" if self.mean < -bound else "not settled"


def tested(pair: Pair, scores: Scores) -> Found | None:
    """None while no seed has both."""
    one, other = scores.get(pair.better, {}), scores.get(pair.worse, {})
    gaps = [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
    if not gaps:
        return None
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.inf
    return Found(pair, statistics.fmean(gaps), error, len(gaps))


def claims() -> dict[str, list[Pair]]:
    """Every claim of F 4.3 with the pairs of rows that it is about."""
    local, ntk, noise = (_row("local", "mlp"), _row("ntk", "mlp"), _row("gaussian", ""))
    both = [(stages, space) for stages in (8, 16) for space in SPACES]
    heads = ("mlp", "cnn", "linear")
    return {
        "end to end > local guess": [Pair(Case(s, "end to end"), local(s, p)) for s, p in both],
        "local guess > NTK": [Pair(local(s, p), ntk(s, p)) for s, p in both],
        "NTK > Gaussian": [Pair(ntk(s, p), noise(s, p)) for s, p in both],
        "local guess > Gaussian": [Pair(local(s, p), noise(s, p)) for s, p in both],
        "weight > activity, local guesses": _spaces((s, "local", h) for s in (8, 16) for h in (*heads, "predsim")),
        "weight > activity, NTK and random": _spaces(
            (s, g, h) for s in (8, 16) for g, h in (("ntk", "mlp"), ("gaussian", ""), ("rademacher", ""))
        ),
        "8 stages > 16 stages": _splits(),
        "width helps local guesses": _widths("local", "mlp", ("weight",), 1),
        "width hurts random guesses": _widths("gaussian", "", SPACES, -1),
        "Gaussian: global target > local target": _targets("gaussian", "local", ("mlp",)),
        "local guess: global target > intermediate": _targets("local", "intermediate", heads),
        "Gaussian: global target > intermediate": _targets("gaussian", "intermediate", ("mlp",)),
        "subspace > one guess (hardly)": [
            Pair(Case(s, "global", "local", h, "activity", "subspace"), Case(s, "global", "local", h, "activity"))
            for s in (8, 16)
            for h in heads
        ],
        "MLP, CNN > linear, local guesses": [
            Pair(_row("local", h)(s, p), _row("local", "linear")(s, p)) for s, p in both for h in ("mlp", "cnn")
        ],
        "local learning > local guess on the global target": [
            Pair(Case(s, "local", "itself", h), _row("local", h)(s, "weight")) for s in (8, 16) for h in heads
        ],
        "trained head > fixed random head as a guess": [
            Pair(local(8, p), Case(8, "global", "fixed-ntk", "mlp", p)) for p in SPACES
        ],
        "a scalar for each tensor > for a stage (no claim of the thesis)": [
            Pair(local(8, "weight"), Case(8, "global", "local", "mlp", "weight", "stage scalar"))
        ],
    }


class _row(NamedTuple):
    """A guess of the global target, in any split and space."""

    guess: str
    head: str

    def __call__(self, stages: int, space: str) -> Case:
        return Case(stages, "global", self.guess, self.head, space)


def _spaces(rows: Iterable[tuple[int, str, str]]) -> list[Pair]:
    return [Pair(*(Case(s, "global", g, h, space) for space in SPACES)) for s, g, h in rows]


def _splits() -> list[Pair]:
    rows = [Case(8, "end to end"), Case(8, "local", "itself", "mlp")]
    guesses = [("local", "mlp"), ("local", "cnn"), ("local", "linear"), ("ntk", "mlp"), ("gaussian", "")]
    rows += [Case(8, "global", guess, head, space) for guess, head in guesses for space in SPACES]
    return [Pair(row, row._replace(stages=16)) for row in rows]


def _widths(guess: str, head: str, spaces: Iterable[str], sign: int) -> list[Pair]:
    factors = {8: (0.5, 1.0, 2.0), 16: (0.5, 1.0, 2.0, 4.0)}
    rows = [[Case(s, "global", guess, head, space, width=w) for w in factors[s]] for s in factors for space in spaces]
    steps = [(row[k + 1], row[k]) for row in rows for k in range(len(row) - 1)]
    return [Pair(*(step if sign > 0 else reversed(step))) for step in steps]


def _targets(guess: str, other: str, heads: Iterable[str]) -> list[Pair]:
    pairs = []
    for stages in (8, 16):
        for space in SPACES:
            for head in heads:
                one = Case(stages, "global", guess, "" if guess == "gaussian" else head, space)
                pairs.append(Pair(one, Case(stages, other, guess, head, space)))
    return pairs
