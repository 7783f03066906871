"""All measurements together, as two processes make them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from ..chain import Chain
from ..credit import Credit
from ..cutting import from_recipe_of_chain
from ..method_names import make_credit, parse_call
from ..simulation.costs import Costs
from ..simulation.hardware import Device, Hardware
from ..worlds.wiring import Links
from .crew import Member, run_crew
from .links import measure_links
from .machine import measure_device
from .stages import Points, Seconds, costs_of_measured, fastest, measure_stages

DEADLINE = 600.0  # seconds


@dataclass(frozen=True)
class Plan:
    """What to measure: the machine and, with a recipe, the stages of a network.

    recipe: of a chain (`chain.recipe`). input, integers, classes: shape of one sample, whether it is made of whole numbers,
    how many there are and how many outputs. credit: the rule whose heads the stages get. optimizer: see
    `simulation.profile.STATES`. samples: of a batch; a quarter of it is measured as well. links: as of the distributed world.
    """

    recipe: dict[str, Any] | None = None
    input: tuple[int, ...] = ()
    integers: bool = False
    classes: int = 10
    credit: str = "backprop"
    optimizer: str = "momentum"
    samples: int = 32
    links: Links = "auto"

    def chain(self) -> Chain:
        """The network, cut, with its heads; the weights are made up."""
        assert self.recipe is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            shape = (2, *self.input)
            like = torch.randint(self.classes, shape) if self.integers else torch.randn(shape)
            chain = from_recipe_of_chain(self.recipe, like)
        self._rule(chain).prepare(chain, 0)
        return chain

    def rows(self, chain: Chain) -> tuple[int, ...]:
        """How many there are in the batches that are measured: two views of each sample under rules that compare views."""
        views = 2 if self._rule(chain).self_supervised else 1
        return tuple(sorted({views * max(1, self.samples // 4), views * self.samples}))

    def _rule(self, chain: Chain) -> Credit:
        return make_credit(parse_call(self.credit), len(chain))


@dataclass(frozen=True)
class Calibration:
    """What was found: the machine, and the stages if a network was measured."""

    hardware: Hardware
    costs: Costs | None
    samples: tuple[int, ...] = ()
    heads: tuple[str, ...] = ()


def calibrate(plan: Plan, tell: Callable[[str], None] = lambda words: None) -> Calibration:
    """Measure with two processes that have ended when this returns. Raises LostProcess, UnlockedError.

    tell: called with what is being measured.
    """
    return run_crew(measure, 2, plan, deadline=DEADLINE, tell=tell)[0]


def measure(member: Member, plan: Plan) -> Calibration:
    """The same on each of two processes."""
    member.tell("processor and memory")
    device = _joined_device(member, measure_device())
    member.tell("links between two processes")
    hardware = Hardware(device, network=measure_links(member, plan.links).network())
    if plan.recipe is None:
        return Calibration(hardware, None)
    chain = plan.chain()
    samples = plan.rows(chain)
    member.tell(f"{len(chain)} stage(s) with {' and '.join(map(str, samples))} samples")
    costs = measured_costs(member, chain, samples, plan.optimizer)
    heads = tuple("none" if stage.head is None else type(stage.head).__name__ for stage in chain)
    return Calibration(hardware, costs, samples, heads)


def measured_costs(member: Member, chain: Chain, samples: Sequence[int], optimizer: str = "momentum") -> Costs:
    """The costs of the stages as `measured_points` finds them. All processes call it; all get the same."""
    return costs_of_measured(chain, measured_points(member, chain, samples, optimizer), optimizer)


def measured_points(
    member: Member,
    chain: Chain,
    samples: Sequence[int],
    optimizer: str = "momentum",
    *,
    windows: int = 3,
    seconds: float = 0.2,
) -> list[Points]:
    """For every stage, by the number of samples: seconds of each kind of work.

    Both processes measure all stages at the same time, each beginning with another one, so that the memory is as busy as in
    training. Two cores are not always equally fast: the mean of both counts.
    """
    mine = measure_stages(
        chain,
        samples,
        optimizer,
        windows=windows,
        seconds=seconds,
        order=member.cluster.rank,
        together=member.barrier.wait,
    )
    found = member.cluster.share([{str(count): row for count, row in stage.items()} for stage in mine])
    rows = [[{int(count): row for count, row in stage.items()} for stage in stages] for stages in found]
    return [{count: _mean([stage[count] for stage in stages]) for count in samples} for stages in zip(*rows)]


def _mean(rows: Sequence[Seconds]) -> Seconds:
    return {part: fmean(row[part] for row in rows) for part in rows[0]}


def merged(*rows: Sequence[Points]) -> list[Points]:
    """The fastest of several measurements of the same stages, made at different times."""
    return [{count: fastest(stage[count] for stage in stages) for count in stages[0]} for stages in zip(*rows)]


def _joined_device(member: Member, device: Device) -> Device:
    """The faster of the two."""
    rows = member.cluster.share([device.flops, device.memory_bandwidth])
    return Device(*(max(column) for column in zip(*rows)))


def date() -> str:
    """Now, for the file."""
    return time.strftime("%Y-%m-%d %H:%M:%S")
