"""Every delayed rule, what the sequential reference calls it, and small networks in both forms."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import unlocked as ul
from unlocked.credit import Credit
from unlocked.reversible import Coupling, Split
from unlocked.timeline import Timeline

import delayed_reference as reference
from delayed_reference import SGD, Adam, Batch, Network, Result

FEATURES, WIDTH, CLASSES, SAMPLES = 5, 4, 3, 4


@dataclass(frozen=True)
class Case:
    """`make(**options)`: the rule. `run`: arguments of the reference; None for the two versions of pipedream-2bw.

    exact: whether learning rate 0 gives backpropagation's gradients bit for bit on every chain.
    """

    name: str
    make: Callable[..., Credit]
    run: dict[str, Any] | None = field(default_factory=dict)
    exact: bool = True

    def fewest(self, stages: int) -> int:
        """The least number of micro-batches per step."""
        return max(1, stages - 1) if self.run is None else 1

    @property
    def shrinks(self) -> bool:
        return (self.run or {}).get("shrink", 1.0) != 1.0


def _case(name: str, make: Callable[..., Credit], hop: int, semantics: str, exact: bool = True, **more: Any) -> Case:
    return Case(name, make, {"hop": hop, "semantics": semantics, **more}, exact)


_C = ul.credit
CASES = [
    _case("pipedream", _C.PipeDream, 1, "stash"),
    _case("pipedream-snapshot", partial(_C.PipeDream, weights="snapshot"), 1, "stash"),
    _case("pipedream-input", partial(_C.PipeDream, keep="input"), 1, "stash"),
    Case("2bw", _C.PipeDream2BW, None),
    Case("2bw-input", partial(_C.PipeDream2BW, keep="input"), None),
    _case("delayed", _C.DelayedGradients, 1, "current"),
    _case("delayed-input", partial(_C.DelayedGradients, keep="input"), 1, "replay"),
    _case("ddg", partial(_C.DDG, shrink=0.7), 1, "stash", shrink=0.7),
    _case("features-replay", partial(_C.FeaturesReplay, shrink=0.7), 1, "replay", shrink=0.7),
    _case("fdg", partial(_C.FDG, shrink=0.6), 2, "stash", shrink=0.6, backward_first=True),
    _case("fdg-replay", partial(_C.FDG, shrink=0.6, replay=True), 2, "replay", shrink=0.6, backward_first=True),
    _case("petra", _C.PETRA, 2, "reverse", exact=False),
    _case("petra-input", partial(_C.PETRA, keep="input"), 2, "replay"),
    _case("petra-weights", partial(_C.PETRA, keep="weights"), 2, "stash", exact=False),
    _case("petra-input+weights", partial(_C.PETRA, keep="input+weights"), 2, "stash"),
    _case("petra-graph", partial(_C.PETRA, keep="graph"), 2, "stash"),
]
BY_NAME = {case.name: case for case in CASES}
UNSHRUNK = {**BY_NAME} | {
    "ddg": Case("ddg", _C.DDG),
    "features-replay": Case("features-replay", _C.FeaturesReplay),
    "fdg": Case("fdg", partial(_C.FDG, shrink=1.0)),
    "fdg-replay": Case("fdg-replay", partial(_C.FDG, shrink=1.0, replay=True)),
}

Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, tuple[SGD | Adam, Optimizer]] = {
    "sgd": (SGD(0.2), partial(torch.optim.SGD, lr=0.2)),
    "momentum": (SGD(0.1, 0.9, 0.01), partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)),
    "adam": (
        Adam(0.02, (0.8, 0.95), 1e-4, 0.01),
        partial(torch.optim.Adam, lr=0.02, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.01),
    ),
}


def name_of(case: Any) -> str:
    """For pytest's ids."""
    return case.name if isinstance(case, Case) else str(case)


# ---- networks ----------------------------------------------------------------------------------------------------------


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layers(stages: int, kind: str) -> list[list[str]]:
    """A "plain" chain: layers of all sorts. A "coupled" one: a stem of two streams, stages of couplings only, a classifier."""
    if stages == 1:
        return [["linear", "tanh", "linear"] if kind == "plain" else ["matrix", "duplicate", "coupling", "linear"]]
    if kind == "plain":
        return [["linear", "tanh"], *[["linear", "tanh", "matrix"]] * (stages - 2), ["linear", "tanh", "linear"]]
    return [["matrix", "duplicate"], *(["coupling"] * (1 + j % 2) for j in range(stages - 2)), ["linear"]]


def bodies(stages: list[list[str]]) -> list[nn.Sequential]:
    """The stages as modules, with random weights of size one over the square root of their inputs."""
    width, made = FEATURES, []
    for j, names in enumerate(stages):
        row: list[nn.Module] = []
        for i, name in enumerate(names):
            out = CLASSES if (j, i) == (len(stages) - 1, len(names) - 1) else WIDTH
            if name in ("linear", "matrix"):
                row.append(nn.Linear(width, out, bias=name == "linear"))
                width = out
            elif name == "tanh":
                row.append(nn.Tanh())
            elif name == "duplicate":
                row.append(Split(-1))
                width *= 2
            else:
                row.append(Coupling(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), -1))
        made.append(nn.Sequential(*row).double())
    with torch.no_grad():
        for k, x in enumerate(itertools.chain.from_iterable(body.parameters() for body in made)):
            x.copy_(normal(*x.shape, seed=k) / x.shape[-1] ** 0.5)
    return made


def chain_of(modules: Iterable[nn.Module]) -> ul.Chain:
    return ul.Chain([ul.Stage(body) for body in modules], like=normal(2, FEATURES, seed=0))


def pair_of(stages: int, kind: str) -> tuple[ul.Chain, Network]:
    """One network, for the library and for the reference."""
    names = layers(stages, kind)
    made = bodies(names)
    return chain_of(made), Network(names, [[x.detach().clone() for x in body.parameters()] for body in made])


def micro_batch(m: int) -> Batch:
    return normal(SAMPLES, FEATURES, seed=1000 + m), torch.arange(SAMPLES).add(m).remainder(CLASSES)


def step_batch(step: int, k: int) -> Batch:
    """The k micro-batches of a step, as one batch."""
    parts = [micro_batch(step * k + i) for i in range(k)]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def expected(case: Case, network: Network, steps: int, k: int, optimizer: SGD | Adam, **options: Any) -> Result:
    """What the reference makes of as many steps."""
    batches = [micro_batch(m) for m in range(steps * k)]
    if case.run is None:
        return reference.two_versions(network, batches, micro_batches=k, optimizer=optimizer)
    return reference.run(network, batches, k=k, optimizer=optimizer, **case.run, **options)


# ---- running the library -----------------------------------------------------------------------------------------------


def train(session: ul.Trainer, steps: Iterable[int], k: int) -> Timeline:
    """These steps, then a drain: everything that was done."""
    acts: list[Any] = []
    for step in steps:
        session.step(*step_batch(step, k))
        acts += session.timeline.acts
    return Timeline([*acts, *session.drain().acts])


def gradients(session: ul.Trainer) -> list[list[list[Tensor]]]:
    """From now on: for every worker and update, the gradients it is made with."""
    found: list[list[list[Tensor]]] = []
    for weights in session.weights:
        mine: list[list[Tensor]] = []
        found.append(mine)

        def update(weights: Any = weights, mine: list = mine, update: Callable[[], None] = weights.update) -> None:
            mine.append([x.grad.clone() for x in weights.parameters])
            update()

        weights.update = update  # type: ignore[method-assign]
    return found


def flat(stages: Iterable[Iterable[Tensor]]) -> list[Tensor]:
    return [x for stage in stages for x in stage]


def weights_of(session: ul.Trainer) -> list[Tensor]:
    """Of the first replica."""
    return flat([x.detach().clone() for x in stage.parameters()] for stage in session.chains[0])
