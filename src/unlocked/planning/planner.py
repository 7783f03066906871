"""The plan: all candidates, predicted and sorted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rich.table import Table
from torch import Tensor

from ..errors import InvalidChoice, choose
from ..simulation import cost_file, options
from ..simulation.hardware import Device, Hardware
from ..simulation.network import uniform
from ..simulation.options import ClusterOptions
from ..simulation.profile import STATES
from .candidates import BACKPROP, Candidate, candidates
from .cuts import Cuts, Made
from .predicting import Infeasible, Row, Setting, crowds, predict

Objective = Literal["throughput", "memory", "bytes"]

ASSUMED = Hardware(Device(flops=10e12, memory_bandwidth=500e9), network=uniform(latency=50e-6, bandwidth=1.25e9))


@dataclass(frozen=True)
class Plan:
    """What was found. rows: what fits, the best by the objective first; infeasible: what does not, and why."""

    rows: tuple[Row, ...]
    infeasible: tuple[Infeasible, ...]
    assumptions: tuple[str, ...]
    objective: Objective
    batch: int
    devices: int

    @property
    def best(self) -> Row | None:
        """The best by the objective; None if nothing fits."""
        return self.rows[0] if self.rows else None

    @property
    def single(self) -> Row | None:
        """Backpropagation on one device, or the best rule without labels if only such are planned; None if it does not fit,
        however small its micro-batches."""
        alone = [row for row in self.rows if row.devices == 1]
        return next((row for row in alone if row.method == str(BACKPROP)), alone[0] if alone else None)

    @property
    def headline(self) -> str:
        """The best against one device, and what bounds it, in plain words."""
        from .wording import headline

        return headline(self)

    def table(self, limit: int | None = 20) -> Table:
        """The rows as a rich table; `limit`: how many, None for all."""
        from .wording import table

        return table(self, limit)

    def to_json(self) -> dict[str, Any]:
        """Everything, as a plain dictionary."""
        return {
            "headline": self.headline,
            "objective": self.objective,
            "batch": self.batch,
            "devices": self.devices,
            "rows": [row.to_json() for row in self.rows],
            "infeasible": [row.to_json() for row in self.infeasible],
            "assumptions": list(self.assumptions),
        }


def plan(
    model: Made | Cuts,
    like: Tensor | None = None,
    *,
    batch: int,
    devices: int,
    hardware: Hardware | None = None,
    optimizer: str = "momentum",
    accumulate: int = 1,
    objective: Objective = "throughput",
    credit: Sequence[str] = (),
    consensus: Sequence[str] = (),
    **cluster: Any,
) -> Plan:
    """Predict every method on so many devices. Nothing is computed and no weight is allocated; `model` stays as it is.

    Args:
        model: any module `ul.cut` can cut; a Chain with stages and heads of your own; or a function from a number of stages to
            a Chain. `planning.Cuts(model, like)` in its place spares the reading when one network is planned several times.
        like: an example batch, of which only the shape matters; a Chain may have its own.
        batch: samples of one update of one network. devices: how many there are.
        hardware: the cluster; what `cluster` says goes before. Default: 10¹³ operations/s, 500 GB/s, 10 Gbit/s, 50 µs.
        optimizer: "sgd", "momentum", "adam" or "adamw": whose state is held. accumulate: micro-batches per update.
        objective: what to sort by: "throughput" of one network, "memory" of the fullest device, "bytes" sent per sample.
        credit, consensus: only these rules, as texts such as "dgl(head=cnn)". Default: all.
        cluster: options of the command line, as texts: memory="16GiB", bandwidth="1Gbit/s", latency="100us", speeds="1,1,0.5",
            flops="10T", memory_bandwidth="500GB/s", per_node=4, ….

    Raises InvalidChoice, CannotCut.
    """
    _check(batch, devices, accumulate, objective, optimizer)
    given = _options(cluster)
    known = hardware is not None or given.costs is not None
    base = cost_file.base_hardware(given.costs) if hardware is None and known else hardware
    machines = options.hardware(given, devices, ASSUMED if base is None else base)
    cuts = model if isinstance(model, Cuts) else Cuts(model, like)
    cuts.chain(1)  # a network that cannot be a chain at all is refused here, in its own words
    setting = Setting(cuts, machines, batch, devices, optimizer)
    tried = candidates(crowds(machines, devices), accumulate, credit, consensus)
    found = [row for one in tried for row in _predicted(setting, one)]
    from .wording import assumptions

    return Plan(
        tuple(sorted((one for one in found if isinstance(one, Row)), key=_order(objective))),
        tuple(one for one in found if isinstance(one, Infeasible)),
        tuple(assumptions(setting, given, known, accumulate, credit, consensus)),
        objective,
        batch,
        devices,
    )


def _predicted(setting: Setting, candidate: Candidate) -> list[Row | Infeasible]:
    """The candidate, and where its memory does not suffice the same in the fewest micro-batches that fit."""
    whole = predict(setting, candidate)
    if isinstance(whole, Row) or not whole.parts:
        return [whole]
    for parts in (whole.parts, 2 * whole.parts, 4 * whole.parts):  # the first is an estimate
        row = predict(setting, dataclasses.replace(candidate, accumulate=parts))
        if isinstance(row, Row):
            return [dataclasses.replace(whole, instead=parts), row]
    return [whole]


def _order(objective: Objective) -> Any:
    def key(row: Row) -> tuple:
        speed = -float(f"{row.samples_per_second:.9g}")  # what differs by rounding only is equal
        last = (row.devices, row.bytes_step, row.peak, row.method)
        if objective == "memory":
            return (row.peak, speed, *last)
        return (row.bytes_per_sample, speed, *last) if objective == "bytes" else (speed, *last)

    return key


def _options(cluster: dict[str, Any]) -> ClusterOptions:
    names = [field.name for field in dataclasses.fields(ClusterOptions)]
    for name, value in cluster.items():
        choose("option of the cluster", name, names)
        if name == "speeds" and isinstance(value, (tuple, list)):
            cluster = cluster | {name: ",".join(map(str, value))}
        elif value is not None and not isinstance(value, str) and name not in ("per_node", "costs"):
            raise InvalidChoice(f"{name}={value!r} must be a text with a unit, as on the command line, e.g. '16GiB'.")
    return ClusterOptions(**cluster)


def _check(batch: int, devices: int, accumulate: int, objective: str, optimizer: str) -> None:
    choose("objective", objective, get_args(Objective))
    choose("optimizer", optimizer, STATES)
    for name, number in (("batch", batch), ("devices", devices), ("accumulate", accumulate)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise InvalidChoice(f"{name} {number} is not possible; give a whole number of at least 1.")
    if batch < accumulate:
        raise InvalidChoice(f"A batch of {batch} cannot be split into {accumulate} micro-batches.")
