"""What a session saves, and how it is put back."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import consensus, credit, mitigation
from .chain import Chain
from .checkpoint import FORMAT, Reader, Writer, copy_into, pack, shard_name, unpack
from .cluster import Cluster, Crew
from .consensus.base import Weights
from .cutting import from_recipe_of_chain
from .delays import laid_out, load_in_flight, put_back, state_in_flight
from .errors import BadCheckpoint
from .loop import EpochBook, random_state_kept
from .losses import cross_entropy
from .population import Regulariser
from .recutting import Shards, optimizer_state, rename_losses
from .recutting import cut_anew as cut_chain_anew
from .restore import (
    describe_method,
    describe_optimizer,
    describe_schedule,
    is_described,
    restore_method,
    restore_optimizer,
    restore_schedule,
)
from .sharding import load_optimizer, whole, whole_state
from .worlds import Simulated, World

if TYPE_CHECKING:
    from .session import Trainer

_OPTIONS = ("replicas", "seed", "clip", "accumulate", "precision", "batchnorm", "schedule_every")
_MANIFEST = (
    "recipe",
    "stages",
    "credit",
    "consensus",
    "mitigation",
    "optimizer",
    "schedule",
    "options",
    "progress",
    "sent_before",
    "book",
)
_PROGRESS = (
    "steps",
    "epoch",
    "phase",
    "batch_in_epoch",
    "elapsed",
    "epochs_per_phase",
    "batch_size",
    "activation_peak",
    "memory",
    "dealt",
    "oracle",
)


class HandOver(NamedTuple):
    """To whom a checkpoint is left when members change: their cluster, the former replicas among them in the order of their new
    numbers, how many join after them, and their rule."""

    cluster: Cluster
    former: list[int]
    joined: int
    rule: consensus.Consensus

    @property
    def replicas(self) -> int:
        """How many there are now."""
        return len(self.former) + self.joined

    def numbers(self, replica: int) -> list[int]:
        """Under which a former replica's state is written: its own new number, and those of who joins with a copy of it."""
        own = self.former.index(replica)
        neighbours = {k: (k + 1) % self.replicas for k in range(len(self.former), self.replicas)}
        copied = [k for k, j in neighbours.items() if (j if j < len(self.former) else 0) == own]
        return [own, *copied]

    def dealt(self, rows: Sequence[Any]) -> list[Any]:
        """What the replicas had each one of, for those that there are now."""
        kept = {number: rows[j] for j in self.former for number in self.numbers(j)}
        return [kept[number] for number in range(self.replicas)]


def save_state(trainer: Trainer, path: str | Path, hand_over: HandOver | None = None) -> Path:
    """Write everything that `load_state` needs; see checkpoint.py for the files. Called by all processes of the run.

    Each writes the shards of its own workers; the chief writes the manifest and commits when all have written.
    """
    crew: Crew = trainer.crew if hand_over is None else hand_over.cluster
    if hand_over is None:
        trainer.collect()
    book = trainer.book.share(crew)
    if crew.chief:
        with Writer(path, trainer.steps) as writer:
            crew.broadcast([os.getpid(), trainer.steps])
            _agree_on_folder(crew, writer, path)
            _write_shards(trainer, writer, hand_over)
            _write_manifest(trainer, writer, book, hand_over)
            crew.barrier()  # all shards are written
            return Path(crew.broadcast(str(writer.commit())))
    owner, steps = crew.broadcast()  # those who were lost to each other may have counted different ones
    with Writer(path, steps, owner=owner) as writer:
        _agree_on_folder(crew, writer, path)
        _write_shards(trainer, writer, hand_over)
        crew.barrier()
        return Path(crew.broadcast())


def receive_hand_over(crew: Crew) -> Path:
    """What one that joins does while the others save what it goes on from: their calls, in their order."""
    crew.share(dataclasses.asdict(EpochBook()))
    crew.broadcast()
    crew.share(True)
    crew.barrier()
    return Path(crew.broadcast())


def _agree_on_folder(crew: Crew, writer: Writer, path: str | Path) -> None:
    """Raises BadCheckpoint if some process does not see the folder the chief has made."""
    blind = [str(rank) for rank, there in enumerate(crew.share(writer.there)) if not there]
    if blind:
        raise BadCheckpoint(
            f"Rank(s) {', '.join(blind)} do not see the folder {path} that rank 0 writes to; give one on a file system that "
            "all hosts share."
        )


def _write_shards(trainer: Trainer, writer: Writer, hand_over: HandOver | None) -> None:
    for weights in trainer.weights:
        tensors, described = _shard(weights)
        if weights.shard == weights.worker.place:
            replica, stage = weights.worker.place
            for number in [replica] if hand_over is None else hand_over.numbers(replica):
                writer.tensors(shard_name(number, stage), tensors)
                writer.json(shard_name(number, stage), described)


def _write_manifest(trainer: Trainer, writer: Writer, book: EpochBook, hand_over: HandOver | None) -> None:
    rule, changed = trainer.consensus, {}
    regularisers: Sequence[Regulariser] | None = trainer.regularisers
    if hand_over is not None:
        rule, changed = hand_over.rule, {"replicas": hand_over.replicas}
        regularisers = None if regularisers is None else hand_over.dealt(regularisers)
    chain, first = trainer.chains[0], trainer.weights[0].store
    if chain.like is not None:
        writer.tensors("example", {"like": chain.like})
    defaults: dict[str, Tensor] = {}
    optimizer = pack(describe_optimizer(first.optimizer), "optimizer", defaults)
    if defaults:
        writer.tensors("defaults", defaults)
    writer.json(
        "manifest",
        {
            "format": FORMAT,
            # a recipe does not tell of a loss of the user's own; that of a self-supervised rule is the rule's
            "recipe": chain.recipe if trainer.credit.self_supervised or chain[-1].loss is cross_entropy else None,
            "stages": len(chain),
            "credit": describe_method(trainer.credit),
            "consensus": describe_method(rule),
            "mitigation": None if trainer.mitigation is None else describe_method(trainer.mitigation),
            "optimizer": optimizer,
            "schedule": describe_schedule(first.scheduler),
            "options": {name: getattr(trainer, name) for name in _OPTIONS} | changed,
            "initial": trainer.initial,
            "regularisers": describe_regularisers(regularisers),
            "progress": {name: getattr(trainer, name) for name in _PROGRESS},
            "sent_before": dict(trainer.sent_before),
            "book": dataclasses.asdict(book),
            "clock": trainer.world.state() if isinstance(trainer.world, Simulated) else None,
        },
    )


def load_state(kind: type[Trainer], path: str | Path, given: Mapping[str, Any]) -> Trainer:
    """Make the trainer of a checkpoint, with the given parts in place of those described, and load its state."""
    reader = Reader(path)
    manifest = reader.manifest
    lacking = [key for key in _MANIFEST if key not in manifest]
    if lacking:
        raise BadCheckpoint(
            f"{reader.path / 'manifest.json'} lacks {', '.join(lacking)}; it was written by another version."
        )
    chain = _chain(reader, given["chain"], given["stages"])
    _alike_everywhere(chain, given["world"])
    defaults = reader.tensors("defaults") if (reader.path / "defaults.safetensors").exists() else {}
    trainer = kind(
        chain,
        credit=given["credit"] or restore_method(manifest["credit"], credit.ALL, "credit"),
        consensus=given["consensus"] or restore_method(manifest["consensus"], consensus.ALL, "consensus"),
        optimizer=given["optimizer"] or restore_optimizer(unpack(manifest["optimizer"], defaults)),
        schedule=given["schedule"] or restore_schedule(manifest["schedule"]),
        mitigation=given["mitigation"] or _mitigation(manifest["mitigation"]),
        regularisers=restore_regularisers(manifest.get("regularisers")),
        world=given["world"],
        device=given["device"],
        resident=given.get("resident"),
        **manifest["options"],
    )
    cut_anew = len(chain) != manifest["stages"]
    shards: dict[int, Shards] = {}
    for weights in trainer.weights:
        if cut_anew:
            replica = weights.worker.replica
            shards[replica] = shards.get(replica) or Shards(reader, replica)
            _load_cut_anew(weights, shards[replica], is_described(trainer.consensus, manifest["consensus"]))
        else:
            _load_shard(trainer, weights, reader)
    for name, value in manifest["progress"].items():
        setattr(trainer, name, value)
    if given["credit"] is not None:
        trainer.oracle = None  # whatever it asks was given on purpose
    trainer.begin_epoch()
    rule = trainer.consensus
    if rule.needs_equal_start and not rule.needs_processes and not is_described(rule, manifest["consensus"]):
        trainer.bring_together()
    if cut_anew:
        trainer.memory = []  # it was of other stages
    trainer.sent_before.update(manifest["sent_before"])
    here = [f"{worker.replica}.{worker.stage}" for worker in trainer.workers]
    book = EpochBook(**manifest["book"])
    if cut_anew:
        book.losses, book.notes = rename_losses(book.losses, manifest["stages"], len(chain)), {}
    trainer.book = book.part(here, trainer.crew.chief)
    if isinstance(trainer.world, Simulated) and manifest.get("clock") is not None and not cut_anew:
        trainer.world.restore(manifest["clock"])
    trainer.initial = manifest.get("initial", "same")  # for the books: the weights are the checkpoint's
    trainer.last_checkpoint = reader.path
    return trainer


def describe_regularisers(regularisers: Sequence[Regulariser] | None) -> list[dict[str, float]] | None:
    """As plain values, one for each replica."""
    return None if regularisers is None else [dataclasses.asdict(one) for one in regularisers]


def restore_regularisers(described: list[dict[str, float]] | None) -> list[Regulariser] | None:
    """The inverse; checkpoints of earlier versions have none."""
    return None if described is None else [Regulariser(**one) for one in described]


def _mitigation(described: Any) -> Any:
    return None if described is None else restore_method(described, mitigation.ALL, "mitigation")


def stage_tensors(chain: Chain, j: int) -> dict[str, Tensor]:
    """The tensors of stage j: `body.` with the user's own names, `head.` with the head's."""
    local = chain[j].body.state_dict(keep_vars=True)
    tensors = {f"body.{name}": local[inside] for name, stage, inside in chain.names if stage == j}
    head = chain[j].head
    if head is not None:
        tensors |= {f"head.{name}": x for name, x in head.state_dict(keep_vars=True).items()}
    return tensors


def _shard(weights: Weights) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A worker's tensors and the rest of its state; the optimizer's entries are under the parameters' names."""
    weights.worker.at_hand()
    mine = stage_tensors(weights.chain, weights.worker.stage)
    tensors = {name: whole(x.detach()) for name, x in mine.items()}
    scheduler = weights.store.scheduler
    names = _parameter_names(mine, weights)
    state = weights.store.optimizer.state_dict()
    state["state"] = {names[index]: whole_state(entries) for index, entries in state["state"].items()}
    described = {
        "version": weights.worker.version,
        "parameters": names,
        "optimizer": pack(state, "optimizer", tensors),
        "keeps_optimizer": weights.keeps_optimizer,
        "optimizer_of": None if weights.updates else list(weights.optimizer_of),
        "scheduler": None if scheduler is None else pack(scheduler.state_dict(), "scheduler", tensors),
        "in_flight": pack(state_in_flight(weights), "in flight", tensors),
        "carried": pack(laid_out(weights.carried()), "carried", tensors),
    }
    return tensors, described


def _parameter_names(tensors: Mapping[str, Tensor], weights: Weights) -> list[str]:
    """The names, in the checkpoint, of the optimizer's parameters in its own order."""
    known = {id(x): name for name, x in tensors.items()}
    return [known[id(x)] for group in weights.store.optimizer.param_groups for x in group["params"]]


def _load_shard(trainer: Trainer, weights: Weights, reader: Reader) -> None:
    name = shard_name(*weights.shard)
    if not reader.has(name):  # a rule whose replicas are equal, and not all saved
        name = shard_name(0, weights.shard.stage)
    weights.worker.at_hand("change")
    tensors, described = reader.tensors(name), reader.json(name)
    mine = stage_tensors(weights.chain, weights.worker.stage)
    copy_into(mine, {key: x for key, x in tensors.items() if key.startswith(("body.", "head."))}, name)
    weights.begin_at(described["version"])
    state = optimizer_state(reader, described, tensors)
    _put_back_optimizer(weights, mine, state if weights.updates else {**state, "state": {}})  # learning rates are all's
    if weights.store.scheduler is not None and described["scheduler"] is not None:
        weights.store.scheduler.load_state_dict(unpack(described["scheduler"], tensors))
    with random_state_kept(trainer.device):
        same = is_described(trainer.credit, reader.manifest["credit"])
        load_in_flight(trainer.credit, weights.stage, weights, unpack(described["in_flight"], tensors), same)
    same_rule = is_described(trainer.consensus, reader.manifest["consensus"])
    if weights.keeps_optimizer or described.get("keeps_optimizer"):
        same_rule = _same_keeper(trainer, reader, bool(state["state"]), described.get("keeps_optimizer", False))
    if described.get("carried") and same_rule:
        weights.load_carried(put_back(unpack(described["carried"], tensors), weights.worker.device))


def _same_keeper(trainer: Trainer, reader: Reader, state: bool, keeps: bool) -> bool:
    """Whether the state can be read: rules that keep it in a form of their own go on from their own checkpoints only."""
    before = reader.manifest["consensus"]["name"]
    if before != trainer.consensus.name and (state or keeps):
        raise BadCheckpoint(
            f"The optimizer's state in this checkpoint is in the form of {before}, which {trainer.consensus.name} cannot read; "
            f"resume with {before}."
        )
    return before == trainer.consensus.name


@torch.no_grad()
def _alike_everywhere(chain: Chain, world: World | None) -> None:
    """All weights are about to be read; until then processes that compare theirs must not find fresh random ones."""
    if world is not None and world.crew.size > 1:
        for parameter in chain.parameters():
            parameter.zero_()


def _load_cut_anew(weights: Weights, shards: Shards, same: bool) -> None:
    if shards.carries and (same or shards.keeps_optimizer):
        raise BadCheckpoint(
            "This run cannot go on with another number of stages, as its consensus rule carries weights or sums of its own "
            "stages from step to step; resume with the same number of stages, or under another consensus rule."
        )
    weights.worker.at_hand("change")
    mine = stage_tensors(weights.chain, weights.worker.stage)
    tensors, optimizer = shards.of(list(mine), _parameter_names(mine, weights))
    copy_into(mine, tensors, f"stage {weights.worker.stage}")
    weights.begin_at(shards.version)
    _put_back_optimizer(weights, mine, optimizer if weights.updates else {**optimizer, "state": {}})
    if weights.store.scheduler is not None and shards.scheduler is not None:
        weights.store.scheduler.load_state_dict(copy.deepcopy(shards.scheduler))


def _put_back_optimizer(weights: Weights, mine: Mapping[str, Tensor], state: dict[str, Any]) -> None:
    """Its entries are under the parameters' names."""
    index = {name: k for k, name in enumerate(_parameter_names(mine, weights))}
    entries = {index[name]: entry for name, entry in state["state"].items()}
    load_optimizer(weights.store.optimizer, {**state, "state": entries})


def _chain(reader: Reader, given: Chain | None, stages: int | None) -> Chain:
    """The chain given, or that of the checkpoint. Raises BadCheckpoint."""
    before = reader.manifest["stages"]
    if given is None:
        return _own_chain(reader) if stages in (None, before) else cut_chain_anew(reader, stages or 1)
    if len(given) != (before if stages is None else stages):
        raise BadCheckpoint(
            f"The checkpoint has {before} stages, the given chain {len(given)}; to go on with another number of stages say so: "
            f"Trainer.resume(path, chain=…, stages={len(given)})."
        )
    return given


def _own_chain(reader: Reader) -> Chain:
    recipe = reader.manifest["recipe"]
    if recipe is None:
        raise BadCheckpoint(
            "The checkpoint's model was made by your own code, and no code is ever read from a checkpoint; "
            "give the same model again: Trainer.resume(path, chain=ul.cut(model, …))."
        )
    example = reader.tensors("example")["like"]
    chain = from_recipe_of_chain(recipe, example)
    return chain.to(example.dtype) if example.is_floating_point() else chain
