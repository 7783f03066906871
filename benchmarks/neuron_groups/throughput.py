"""What two processes gain: (K, G) = (2, 1) by DGL and (1, 2) by GN-DGL, beside one process with backprop."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

import unlocked as ul
from neuron_groups.table import head
from unlocked.chain import Chain, join
from unlocked.costs import run_once
from unlocked.cutting import from_recipe_of_chain
from unlocked.grouping.cost import macs, module_costs
from unlocked.worlds import Distributed

from overhead import hand_written_backprop
from pipelines.crew import Member
from pipelines.tasks import sgd
from pipelines.windows import Variant, play, rates, ratio, warm_up

ONE = "1 process, 1 thread, backprop"
ALONE = ": its stages alone"
INDEPENDENT = "2 independent processes, backprop"


class Plan(NamedTuple):
    """Width factor of ResNet-32, images per batch, rounds, seconds of a window."""

    width: float
    batch: int
    rounds: int
    seconds: float


class Metered:
    """A step that notes the seconds that this process's threads compute: they do not grow while others use the core."""

    def __init__(self, step: Callable[[], object]) -> None:
        self._step = step
        self.seconds: list[float] = []

    def __call__(self) -> None:
        begin = time.process_time()
        self._step()
        self.seconds.append(time.process_time() - begin)


def methods() -> dict[str, tuple[Any, Any]]:
    """(options of the cut, credit rule) of each: stem and 7 blocks | 8 blocks and classifier; stem and group 0 | group 1 and
    classifier."""
    gn, dgl = ul.credit.GNDGL, ul.credit.DGL(head=head, budget=None)
    depth, width = {"sizes": [8, 9]}, {"groups": 2, "sizes": [15]}
    known: dict[str, dict[str, Any]] = {
        "(1,2) GN-DGL naive, stem's own head": {"stem": "own"},
        "(1,2) GN-DGL naive": {},
        "(1,2) GN-DGL stop-gradient + diversity": {"stop_gradient": True, "diversity": 0.5},
    }
    rules = {name: (width, gn(head=head, budget=None, **options)) for name, options in known.items()}
    return {"(2,1) DGL": (depth, dgl), **rules}


def measure(member: Member, plan: Plan) -> dict[str, Any]:
    """Everything. Called on both processes; the numbers are the same on both."""
    torch.manual_seed(0)
    x, y = torch.randn(plan.batch, 3, 32, 32), torch.randint(10, (plan.batch,))
    model = ul.models.resnet32((3, 32, 32), 10, width=plan.width)
    chief = member.cluster.chief
    backprop = Metered(hand_written_backprop(model, x, y))
    whole, predicted = macs(model, x[:1], elementwise=True), {}
    variants = [
        Variant(ONE, backprop if chief else None, plan.batch),
        Variant(INDEPENDENT, backprop, plan.batch, "sum"),
    ]
    with ExitStack() as worlds:
        for name, (options, credit) in methods().items():
            recipe = ul.cut(model, like=x, **options).recipe
            trainer = ul.Trainer(
                _chain(recipe, x), credit=credit, optimizer=sgd, world=worlds.enter_context(Distributed(member.cluster))
            )
            chain = _chain(recipe, x, credit)
            predicted[f"{name}{ALONE}"] = round(whole / _busiest(chain), 2)
            variants += [
                Variant(name, lambda trainer=trainer: trainer.step(x, y), plan.batch),
                Variant(f"{name}{ALONE}", Metered(_alone(chain, x, y, member)), plan.batch, "slowest"),
            ]
        for variant in variants:
            member.tell(f"warming up: {variant.name}")
            warm_up(member, [variant], plan.seconds)
        member.tell("measuring")
        play(member, variants, plan.rounds)
    found = rates(member, variants)
    meters = {variant.name: variant.step for variant in variants if isinstance(variant.step, Metered)}
    shared = member.cluster.share({name: median(meter.seconds[3:]) for name, meter in meters.items()})
    computing = {name: max(row[name] for row in shared) for name in shared[1]}
    return {
        "computing_ms": {name: round(1e3 * seconds, 1) for name, seconds in computing.items()},
        "speed_up_computing": {name: round(computing[INDEPENDENT] / value, 2) for name, value in computing.items()},
        "speed_up_by_macs": predicted,
        "samples_per_second": {name: round(median(row), 1) for name, row in found.items()},
        "speed_up": {name: ratio(found, name, ONE) for name in found},
    }


def _process(j: int, chain: Chain) -> int:
    return j * 2 // len(chain)  # as the library places stages


def _busiest(chain: Chain) -> float:
    """MACs of one image through the stages and heads of the process that has most."""
    costs = module_costs(chain, elementwise=True)
    return max(sum(cost.total for cost in costs if _process(cost.stage, chain) == rank) for rank in range(2))


def _chain(recipe: Any, x: Tensor, credit: Any = None) -> Chain:
    torch.manual_seed(0)
    chain = from_recipe_of_chain(recipe, x)
    if credit is not None:
        credit.prepare(chain, 0)
    return chain


def _alone(chain: Chain, x: Tensor, y: Tensor, member: Member) -> Any:
    """This process's stages on constant inputs, each with its own loss and update, without any message."""
    walked = list(chain.walk(x, lambda j, given: run_once(chain[j].body, given)))
    outputs = {j: h for j, _, h in walked}
    mine = [j for j in range(len(chain)) if _process(j, chain) == member.cluster.rank]
    rows = [(j, given, sgd(list(chain[j].parameters()))) for j, given, _ in walked if j in mine]

    def step() -> None:
        for j, given, optimizer in rows:
            stage, beside = chain[j], chain.layout.beside(j)
            h = stage.body(given)
            if stage.head is None and j < len(chain) - 1:
                h.backward(outputs[j])  # a stem that learns from the groups
            else:
                seen = join([h if k == j else outputs[k] for k in beside]) if stage.reads_siblings else h
                stage.loss(stage.read(seen), y).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step
