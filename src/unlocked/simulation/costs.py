"""Seconds and bytes of every stage on a device of speed 1: what the simulated world charges.

They come from counted operations and a device (`costs_of`), from measurements of this machine (a cost file of
`unlocked calibrate`), or are made up (`unit`, for figures).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..chain import Chain, Stage
from ..errors import InvalidChoice, choose
from ..work import WORKS, Work
from .hardware import Device
from .network import Line
from .profile import STATES, Holding, Profile, StageProfile, profile

_TRAFFIC: dict[Work, float] = {
    "forward": 2.0,
    "backward": 3.0,
    "weight-backward": 3.0,
    "input-backward": 2.0,
}  # × bytes kept, read or written


@dataclass(frozen=True)
class StageCosts:
    """One stage: seconds by kind of work, as lines in the number of samples; an update's does not depend on them.

    profile: its shapes and bytes. state: bytes its optimizer keeps.
    """

    seconds: Mapping[Work, Line]
    profile: StageProfile
    state: int = 0

    def __post_init__(self) -> None:
        for part, line in self.seconds.items():
            choose("kind of work", part, WORKS)
            if not (line.fixed >= 0 or line.each > 0):
                raise InvalidChoice(f"The cost {line} of {part!r} is not possible; seconds must be at least 0.")

    def of(self, parts: Sequence[Work], samples: int) -> float:
        """Seconds of a computation made of these kinds of work; a weight-backward without a cost has a backward's."""
        total = 0.0
        for part in parts:
            line = self.seconds.get(part) or (self.seconds.get("backward") if part == "weight-backward" else None)
            if line is not None:
                total += line.fixed + line.each * samples
        return total if total > 0.0 else 0.0

    @property
    def held(self) -> int:
        """Bytes held whatever happens: weights, buffers, gradients, optimizer state."""
        return self.profile.parameters + self.profile.trained + self.state

    def moment(self, parts: Sequence[Work], samples: int, complete: int) -> float:
        """Seconds after the begin of a computation of these parts at which so many bytes of gradients are complete.

        A head's backward completes them evenly, a body's as its profile says.
        """
        head = self.profile.head_trained
        begin = 0.0
        for part in parts:
            length = self.of((part,), samples)
            if part == "head-backward" and head:
                if complete <= head:
                    return begin + length * complete / head
                complete -= head
            elif part in ("backward", "weight-backward"):
                return begin + length * self._complete(min(1.0, complete / max(1, self.profile.trained - head)))
            begin += length
        return begin

    def _complete(self, share: float) -> float:
        """The share of a backward's time after which this share of the body's gradients is complete."""
        for (before, begin), (after, end) in pairwise(self.profile.done):
            if share <= after:
                return end if after == before else begin + (end - begin) * (share - before) / (after - before)
        return 1.0


@dataclass(frozen=True)
class Costs:
    """The stages of a chain, in order; the shape and dtype of one input sample."""

    stages: tuple[StageCosts, ...]

    def __len__(self) -> int:
        return len(self.stages)

    def __getitem__(self, j: int) -> StageCosts:
        return self.stages[j]


def costs_of(profile: Profile, device: Device, optimizer: str = "momentum") -> Costs:
    """Seconds from counted operations: operations / speed, and what is no matrix product by the memory's bandwidth.

    A forward reads and writes about twice what it keeps, a backward three times; an update reads and writes weights, gradients
    and state once. `optimizer`: "sgd", "momentum", "adam", "adamw".
    """
    choose("optimizer", optimizer, STATES)
    return Costs(tuple(_stage(stage, device, STATES[optimizer]) for stage in profile.stages))


def forward_of(network: nn.Module, like: Tensor, device: Device) -> Line:
    """Seconds of the forward of a network by itself, counted as a stage's is. `like`: an example of its input (B, …).

    Raises InvalidChoice for a network that does not run on shapes alone.
    """
    try:
        (found,) = profile(Chain([Stage(network)], like)).stages
    except Exception as error:  # a network may do anything with a tensor that has no values
        raise InvalidChoice(
            f"A simulated clock counts the operations of a {type(network).__name__} on shapes alone, which it cannot run on "
            f"({type(error).__name__}: {error}); give one whose forward does not look at values, or train without the clock."
        ) from error
    return _stage(found, device, 0).seconds["forward"]


def _stage(stage: StageProfile, device: Device, states: int) -> StageCosts:
    seconds: dict[Work, Line] = {}
    for part, flops in stage.flops.items():
        kept = stage.head_kept if part.startswith("head") else stage.kept
        moved = _TRAFFIC.get(part, 2.0) / device.memory_bandwidth
        seconds[part] = Line(
            flops.fixed / device.flops + kept.fixed * moved, flops.each / device.flops + kept.each * moved
        )
    state = states * stage.trained
    seconds["update"] = Line((3 * stage.trained + 2 * state) / device.memory_bandwidth)
    return StageCosts(seconds, stage, state)


def unit(
    stages: int,
    *,
    forward: float | Sequence[float] = 1.0,
    backward: float | Sequence[float] = 1.0,
    head: float | Sequence[float] = 0.0,
    update: float | Sequence[float] = 0.0,
    activation: int = 1,
    weights: int = 1,
) -> Costs:
    """Made-up costs for figures and laws: seconds of a stage's acts, whatever the batch.

    A number holds for every stage, a row gives one for each. `head`: its forward and backward together. `activation`: values
    (float32) of one sample at every boundary; `weights`: trained values of a stage. A backward to the input alone takes half of
    `backward`; one sample keeps its `activation` at each stage, which is its input there, or what a reversible stage
    makes again.
    """
    given = {"forward": forward, "backward": backward, "head": head, "update": update}
    rows = zip(*(_row(name, one, stages) for name, one in given.items()))
    return Costs(tuple(_unit_stage(f, b, h, u, activation, weights) for f, b, h, u in rows))


def _row(name: str, given: float | Sequence[float], stages: int) -> list[float]:
    row = [float(given)] * stages if isinstance(given, (int, float)) else [float(x) for x in given]
    if len(row) != stages:
        raise InvalidChoice(
            f"{name} has {len(row)} entries for {stages} stages; give one number or one for each stage."
        )
    return row


def _unit_stage(
    forward: float, backward: float, head: float, update: float, activation: int, weights: int
) -> StageCosts:
    size = 4
    sample = Line(0.0, float(size * activation))
    shape = StageProfile(
        flops={},
        input=(activation,),
        output=(activation,),
        dtype=torch.float32,
        weights=(((weights,), torch.float32),) if weights else (),
        head_weights=0,
        parameters=size * weights,
        trained=size * weights,
        kept=sample,
        head_kept=Line(),
        done=((0.0, 0.0), (1.0, 1.0)),
        holdings={"input": Holding(sample), "parts": Holding(Line(), sample)},
    )
    seconds: dict[Work, Line] = {
        "forward": Line(forward),
        "backward": Line(backward),
        "input-backward": Line(backward / 2),
        "head-forward": Line(head / 3),
        "head-backward": Line(2 * head / 3),
        "update": Line(update),
    }
    return StageCosts(seconds, shape)
