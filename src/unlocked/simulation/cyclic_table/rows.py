"""The ten rows of Table 5.1: their programs, which workers share a device, and what the table says.

Conventions, said once. B samples in a micro-batch, N micro-batches, N = J equal stages.

    activations      in B Ψ_A: of the N stages and one micro-batch
    parameters       in Ψ_P: of all N stages. On a single device a copy for every micro-batch that uses them, as the
                     thesis counts (and says that they may be shared); elsewhere the stages whose states a device has,
                     in one version
    volume           of one of the N micro-batches in a training step. "Ψ_P" is what each replica sends in an
                     all-reduce, 2 (N−1)/N Ψ_P: gradients and their sum, or gradients and new weights. "Ψ_A^int" are the
                     activations at the N − 1 inner boundaries going up, and their gradients coming down
    steps            "O(log N)": at least ⌈log2 N⌉ and more for more replicas. "O(1)": the same for all N from 3 on
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from ...consensus import CDP, AllReduce, Consensus
from ...credit import Backprop, CDPPipeline, Credit
from ...worker import Place
from .zero_dp import ZeroDP

Rule = Literal["v1", "v2"]
NUMBERS = ("activations", "parameters", "parameter_volume", "activation_volume", "devices")


@dataclass(frozen=True)
class Expected:
    """What the table says for one N. collective: O(log N) steps of communication; None: no communication."""

    activations: Fraction
    parameters: Fraction
    parameter_volume: Fraction
    activation_volume: Fraction
    collective: bool | None
    devices: int


@dataclass(frozen=True)
class Row:
    """One implementation.

    Args:
        method: the rules, for a rule u of cyclic data parallelism. device: which workers are one device: all, those of
            a replica, or each by itself. dealt: whether micro-batches are numbered through a step, and not replica by
            replica.
        copies: whether parameters are counted once for every micro-batch. shared: whether all replicas have the same
            weights in memory. states: whether a stage's states stay where they are, move from replica to replica, or
            are broadcast by their owner.
        table: what it says, for N. differs: columns in which the program does not do what the table says, and what it
            does. notes: where a definition had to be fixed, and why something differs.
    """

    name: str
    method: Callable[[Rule], tuple[Credit, Consensus | None]]
    device: Literal["one", "replica", "worker"]
    table: Callable[[int], Expected]
    dealt: bool = False
    copies: bool = False
    shared: bool = False
    states: Literal["stay", "move", "broadcast"] = "stay"
    differs: Mapping[str, Fraction] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def expected(self, count: int) -> dict[str, Fraction | int]:
        """The columns that are numbers, for N = `count`: what the table says, or what is known to differ."""
        table = self.table(count)
        return {name: getattr(table, name) for name in NUMBERS} | dict(self.differs)

    @property
    def pipeline(self) -> bool:
        """Whether the micro-batches are those of one replica."""
        return self.method("v2")[1] is None

    def device_of(self, place: Place) -> Hashable:
        """The device of a worker."""
        return {"one": 0, "replica": place.replica, "worker": place}[self.device]


def _cdp(
    form: Literal["ring", "single-device", "model-parallel", "zero"],
) -> Callable[[Rule], tuple[Credit, Consensus]]:
    return lambda rule: (Backprop(), CDP(rule, form=form))


def _table(
    activations: Callable[[int], Fraction | int],
    parameters: Callable[[int], Fraction | int],
    volume: tuple[Fraction | int, int],
    collective: bool | None,
    devices: Callable[[int], int],
) -> Callable[[int], Expected]:
    """Columns as functions of N. volume: in Ψ_P and in B Ψ_A^int."""
    return lambda n: Expected(
        Fraction(activations(n)),
        Fraction(parameters(n)),
        Fraction(volume[0]),
        Fraction(volume[1]),
        collective,
        devices(n),
    )


def _one(n: int) -> int:
    return 1


def _n(n: int) -> int:
    return n


def _nth(n: int) -> Fraction:
    return Fraction(1, n)


def _half(n: int) -> Fraction:
    return Fraction(n + 1, 2)


_DATA_PARALLEL = (Backprop(), AllReduce(bucket_mb=0))
_ALL_REDUCE = (
    "the exchange sends to all replicas directly: a reduce-scatter and a gather of N−1 messages each, one after the "
    "other, so 2(N−1) steps; the table's bound is ⌈log2 N⌉"
)
_TWO_VERSIONS = "the table counts one version of the weights; micro-batches in flight see two"

ROWS: tuple[Row, ...] = (
    Row(
        "single-GPU DP",
        lambda rule: _DATA_PARALLEL,
        "one",
        _table(_n, _n, (0, 0), None, _one),
        copies=True,
        notes=("multi-GPU DP's program with all replicas on one device, each with its own weights",),
    ),
    Row(
        "single-GPU, cyclic",
        _cdp("single-device"),
        "one",
        _table(_half, _half, (0, 0), None, _one),
        copies=True,
        shared=True,
        notes=(
            "parameters: a copy for each micro-batch between its forward and its backward, as the thesis counts; the "
            "program has one model, and θ_{t−1} beside it while that is read: less than two",
        ),
    ),
    Row(
        "multi-GPU DP",
        lambda rule: _DATA_PARALLEL,
        "replica",
        _table(_one, _one, (1, 0), True, _n),
        notes=(_ALL_REDUCE,),
    ),
    Row(
        "multi-GPU, cyclic",
        _cdp("ring"),
        "replica",
        _table(_one, _one, (1, 0), False, _n),
        notes=("new weights wait at their next replica until it begins the forward that is to see them",),
    ),
    Row(
        "DP with MP",
        lambda rule: _DATA_PARALLEL,
        "worker",
        _table(_nth, _nth, (1, 1), True, lambda n: n * n),
        notes=(_ALL_REDUCE,),
    ),
    Row(
        "MP, cyclic",
        _cdp("model-parallel"),
        "worker",
        _table(_nth, _nth, (Fraction(1, 2), 1), False, lambda n: n * (n + 1) // 2),
        dealt=True,
        notes=(
            "the optimizer's state (none here) besides moves once a step, at stages whose number of devices does not "
            "divide N",
        ),
    ),
    Row(
        "PP, CDP-v1",
        lambda rule: (CDPPipeline(rule="v1"), None),
        "worker",
        _table(_one, _nth, (0, 1), False, _n),
        dealt=True,
        notes=(f"activations: of stage 0, which has most; {_TWO_VERSIONS}",),
    ),
    Row(
        "PP, CDP-v2",
        lambda rule: (CDPPipeline(rule="v2"), None),
        "worker",
        _table(_one, _nth, (0, 1), False, _n),
        dealt=True,
        notes=(f"activations: of stage 0, which has most; {_TWO_VERSIONS} everywhere but at the last stage",),
    ),
    Row(
        "ZeRO-DP",
        lambda rule: (Backprop(), ZeroDP()),
        "replica",
        _table(_one, _nth, (1, 0), True, _n),
        states="broadcast",
        differs={"parameter_volume": Fraction(3, 2)},
        notes=(
            "volume: weights twice, gradients once, which is the 'maximum increase of 1.5' of §5.3.4",
            "parameters: of the stages a device owns; the weights of one more are there while they are used",
        ),
    ),
    Row(
        "ZeRO, cyclic",
        _cdp("zero"),
        "replica",
        _table(_one, _nth, (1, 0), False, _n),
        states="move",
        notes=(
            "volume: of the newest weights. With them travel the gradient's sum, (N−1)/N of that; under v2 θ_{t−1} "
            "while it is still to be read, (N−1)/2N of it; and the optimizer's state (none here), as often as the "
            "weights",
            "parameters: the table counts one version; under v2 θ_{t−1} is there beside θ_t for a part of the step",
        ),
    ),
)
