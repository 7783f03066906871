"""When members of a run are lost or come: those who are left save what they have as the run of the next generation.

The checkpoint is that of the new members: former ones under their new numbers, who joins with a copy of a neighbour's weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import graphs
from .cluster.elastic import Succession
from .consensus.gossip import Gossip
from .consensus.gossiping.available import Available
from .errors import LostProcess, MembersChanged
from .saving import HandOver, save_state
from .worlds import Distributed

if TYPE_CHECKING:
    from .session import Trainer


def is_elastic(trainer: Trainer, folder: Any) -> bool:
    """Whether others can go on if a process of this run is lost: replicas that run freely, each on a process of its own, a
    store that belongs to none of them, and a folder to save to."""
    world = trainer.world
    if not (isinstance(world, Distributed) and trainer.consensus.free and folder is not None):
        return False
    return world.crew.size == trainer.replicas > 1 and world.crew.seat.hosted


def become_elastic(trainer: Trainer, folder: Path) -> None:
    """The loss of a process is no failure from now on."""
    world = trainer.world
    assert isinstance(world, Distributed)
    world.be_elastic(world.crew.be_elastic({"folder": str(Path(folder).resolve())}))


def _parts(trainer: Trainer) -> tuple[Distributed, Gossip, list[Available]]:
    """The world, the rule and the weights of a run that is elastic."""
    world, rule = trainer.world, trainer.consensus
    assert isinstance(world, Distributed) and isinstance(rule, Gossip)
    return world, rule, [weights for weights in trainer.weights if isinstance(weights, Available)]


def roll_call(trainer: Trainer, folder: Path, left: bool = False) -> None:
    """Find out who is there. Raises MembersChanged if it is not those of before, all having saved what they have."""
    world, _, mine = _parts(trainer)
    succession = world.crew.roll_call([weights.moment for weights in mine], left)
    if succession.seat != world.crew.seat:
        raise _hand_over(trainer, folder, succession)


def after_loss(trainer: Trainer, folder: Path, lost: LostProcess) -> None:
    """A process was lost where it could not be done without. Raises MembersChanged, or the loss if the run has failed."""
    world, _, _ = _parts(trainer)
    if world.crew.failure is not None:
        raise lost
    roll_call(trainer, folder, left=True)


def _hand_over(trainer: Trainer, folder: Path, succession: Succession) -> MembersChanged:
    world, rule, mine = _parts(trainer)
    before = trainer.replicas
    for j, weights in enumerate(mine):
        weights.end_window(max(said[j] for said in succession.said))
    cluster, succession = world.crew.next_generation(succession)
    world.leave()
    for weights in mine:
        weights.renumber(succession.survivors)
    new = rule.among(succession.survivors, succession.joined, before)
    graphs = rule.graph_of(before), new.graph_of(len(succession.numbers))
    save_state(trainer, folder, HandOver(cluster, succession.survivors, succession.joined, new))
    record = _record(trainer, succession, before, *graphs)
    return MembersChanged(_sentence(record), cluster, folder, record)


def _record(
    trainer: Trainer, succession: Succession, before: int, old: graphs.Graph, new: graphs.Graph
) -> dict[str, Any]:
    return {
        "event": "members",
        "epoch": trainer.epoch,
        "step": trainer.steps,
        "before": before,
        "lost": succession.lost,
        "joined": succession.joined,
        "replicas": len(succession.numbers),
        "chi1": [graphs.chi1(old), graphs.chi1(new)],
        "chi2": [graphs.chi2(old), graphs.chi2(new)],
        "graph": [old.name, new.name],
    }


def _sentence(record: dict[str, Any]) -> str:
    lost = " ".join(record["lost"])
    joined = f"{record['joined']} joined." if record["joined"] else ""
    (first, second), (old, new) = zip(record["chi1"], record["chi2"]), record["graph"]
    return (
        f"{lost} {joined} {record['replicas']} of {record['before']} replicas go on: {old} "
        f"(χ₁ {first[0]:.3g}, χ₂ {first[1]:.3g}) is now {new} (χ₁ {second[0]:.3g}, χ₂ {second[1]:.3g})."
    ).strip()
