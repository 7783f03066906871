"""Training with one stage in memory (Fournier's thesis, Figure 3.7 and the text beside it).

    for each batch, for j = 1..J:   load stage j;  x^{j+1} = f^j(x^j);  local backward, update;  unload stage j;  pass x^{j+1}

What is loaded and unloaded: parameters, buffers, gradients, optimizer state. The numbers are those of the rule without this,
bit for bit. In memory at once, S being the largest stage's parameters, buffers and optimizer state, and A what it computes with
(activations, gradients, its optimizer's temporaries):

    without prefetch   S + A + what goes from stage to stage, and up to 3 S that the C library holds back (heap.py)
    with prefetch      at most 2 S more: the stage before being written, the next one being read

so it does not grow with J. A stage is read once and written once per update, which costs 2 S of traffic; with prefetch that
goes on beside the computing, on another core, as long as a stage computes longer than its S is read and written.

Limits: J = 1 is ordinary training, with a copy on the disk.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..chain import Chain, Stage
from ..errors import InvalidChoice, choose
from .residence import Residence, looked_after
from .shelves import Disk, Host, Shelf

if TYPE_CHECKING:
    from ..worlds import World

_residences: weakref.WeakKeyDictionary[Chain, Residence] = weakref.WeakKeyDictionary()  # of chains built stage by stage


@dataclass(frozen=True)
class OneStage:
    """One stage in memory at a time: `Trainer(…, resident=OneStage("disk"))`.

    Args:
        keep: where the other stages wait: in files on "disk"; or, for stages that compute on an accelerator, in "host" memory.
        folder: for the files; None: the system's folder for temporary files. It should be on a disk, not in memory.
        prefetch: read the next stage, and write the last one, beside the computing.

    It goes with rules whose stages learn alone (`Credit.local`), any model, one replica. Between two steps the tensors of the
    stages that are away are NaN in `trainer.chains`; `trainer.averaged()` gives the whole network, `save` writes it.
    A chain that is given whole is in memory once, at the start (its weights only); `chain` builds one stage by stage.
    """

    keep: Literal["disk", "host"] = "disk"
    folder: str | Path | None = None
    prefetch: bool = True

    def __post_init__(self) -> None:
        choose("place to keep stages", self.keep, ("disk", "host"))
        if self.keep == "host" and self.folder is not None:
            raise InvalidChoice(
                f"keep='host' uses no files; leave out folder={str(self.folder)!r}, or take keep='disk'."
            )

    def chain(self, makers: Iterable[Callable[[], Stage | nn.Module]], like: Tensor) -> Chain:
        """A chain of which never more than a stage is in memory. makers: for each stage, what makes it (or its body).

        The modules must not share parameters. Give the chain to a Trainer with `resident` this very choice.
        """
        residence, stages = self.residence(torch.device("cpu"), self._shelf()), []
        for number, make in enumerate(makers):
            made = make()
            stages.append(made if isinstance(made, Stage) else Stage(made))
            residence.take(number, stages[-1])
        chain = Chain(stages, like=like)
        _residences[chain] = residence
        return chain

    def residence(self, device: torch.device, shelf: Shelf | None = None) -> Residence:
        """What does it, for stages that compute on `device`."""
        return Residence(shelf if shelf is not None else self._shelf(), self.prefetch, device)

    def _shelf(self) -> Shelf:
        return Disk(self.folder) if self.keep == "disk" else Host()


def residence_of(chain: Chain, resident: OneStage | None, device: torch.device) -> Residence | None:
    """For a chain that is to be trained on `device`; None without the wish. Raises InvalidChoice."""
    built = _residences.get(chain)
    if resident is None:
        if built is not None:
            raise InvalidChoice("This chain was built by OneStage.chain; give the trainer the same choice: resident=….")
        _refuse_used(chain)
        return None
    if not isinstance(resident, OneStage):
        raise InvalidChoice(f"resident={resident!r} is not possible; give ul.OneStage('disk'), or None for all stages.")
    if resident.keep == "host" and device.type == "cpu":
        raise InvalidChoice("Stages that compute on the CPU are in the host's memory already; take OneStage('disk').")
    if built is None:
        _refuse_used(chain)
        return resident.residence(device)
    built.move(device)
    return built


def _refuse_used(chain: Chain) -> None:
    """Raises InvalidChoice for a chain whose stages are away: another trainer keeps them."""
    if any(looked_after(stage) for stage in chain):
        raise InvalidChoice(
            "Another trainer keeps one stage of this chain in memory, so the others are not here; make a new chain, or take "
            "that trainer's averaged(), which is a whole one."
        )


def check_resident(chain: Chain, credit: Any, consensus: Any, replicas: int, mitigation: Any, world: World) -> None:
    """Raises InvalidChoice for what would need several stages at once."""
    reason = _reason(chain, credit, consensus, replicas, mitigation, world)
    if reason is not None:
        raise InvalidChoice(f"One stage in memory is not possible here: {reason}")


def _reason(chain: Chain, credit: Any, consensus: Any, replicas: int, mitigation: Any, world: World) -> str | None:
    from ..worlds import (
        InProcess,
        Simulated,
    )  # late: they need the credit rules, of which one needs this package's files

    if not credit.local:
        return (
            f"under {credit.name} a stage waits for {credit.awaits} of other stages; take a rule whose stages learn alone, "
            "such as dgl, predsim or greedy."
        )
    if credit.crossing or credit.needs_processes:
        return f"{credit.name} has batches under way from step to step; take dgl, predsim or greedy."
    if credit.free:
        return f"under {credit.name} the stages run freely, each at its own rate; take dgl, predsim or greedy."
    if consensus.free:
        return f"under {consensus.name} replicas run freely; take independent."
    if consensus.name != "independent":
        return f"{consensus.name} looks at the weights of all stages between two steps; take independent."
    if replicas > 1:
        return f"{replicas} replicas are averaged to be judged, which takes whole networks; take one."
    if mitigation is not None:
        return "a mitigation keeps older weights; leave it out."
    if isinstance(world, Simulated):
        return (
            "the simulated clock does not know what reading and writing cost; take the world in process or distributed."
        )
    if isinstance(world, InProcess) and world.uses_streams:
        return "with streams stages compute side by side; take InProcess()."
    if any(stage.borrows is not None for stage in chain):
        return "heads here read weights of another stage; take a head that does not."
    if world.crew.size > 1 and chain in _residences:
        return "a chain built stage by stage cannot be compared among processes; start one process, or give the whole chain."
    return None
