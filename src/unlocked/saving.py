"""What a session saves, and how it is put back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import consensus, credit
from .chain import Chain
from .checkpoint import FORMAT, Reader, Writer, copy_into, pack, unpack
from .consensus.base import Weights
from .cutting import from_recipe_of_chain
from .errors import BadCheckpoint
from .loop import EpochBook
from .restore import (
    describe_method,
    describe_optimizer,
    describe_schedule,
    restore_method,
    restore_optimizer,
    restore_schedule,
)

if TYPE_CHECKING:
    from .session import Trainer

_OPTIONS = ("replicas", "seed", "clip", "accumulate", "precision", "batchnorm", "schedule_every")
_MANIFEST = (
    "recipe",
    "stages",
    "credit",
    "consensus",
    "optimizer",
    "schedule",
    "options",
    "progress",
    "bytes_sent",
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
)


def save_state(trainer: Trainer, path: str | Path) -> Path:
    """Write everything that `load_state` needs; see checkpoint.py for the files."""
    chain = trainer.chains[0]
    first = trainer.weights[0].store
    with Writer(path, trainer.steps) as writer:
        for weights in trainer.weights:
            tensors, described = _shard(weights)
            writer.tensors(_name(weights), tensors)
            writer.json(_name(weights), described)
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
                "recipe": chain.recipe,
                "stages": len(chain),
                "credit": describe_method(trainer.credit),
                "consensus": describe_method(trainer.consensus),
                "optimizer": optimizer,
                "schedule": describe_schedule(first.scheduler),
                "options": {name: getattr(trainer, name) for name in _OPTIONS},
                "progress": {name: getattr(trainer, name) for name in _PROGRESS},
                "bytes_sent": dict(trainer.bytes_sent),
                "book": dataclasses.asdict(trainer.book),
            },
        )
        return writer.commit()


def load_state(kind: type[Trainer], path: str | Path, given: Mapping[str, Any]) -> Trainer:
    """Make the trainer of a checkpoint, with the given parts in place of those described, and load its state."""
    reader = Reader(path)
    manifest = reader.manifest
    lacking = [key for key in _MANIFEST if key not in manifest]
    if lacking:
        raise BadCheckpoint(
            f"{reader.path / 'manifest.json'} lacks {', '.join(lacking)}; it was written by another version."
        )
    chain = given["chain"] if given["chain"] is not None else _chain(reader)
    if len(chain) != manifest["stages"]:
        raise BadCheckpoint(f"The checkpoint has {manifest['stages']} stages, the given chain {len(chain)}.")
    defaults = reader.tensors("defaults") if (reader.path / "defaults.safetensors").exists() else {}
    trainer = kind(
        chain,
        credit=given["credit"] or restore_method(manifest["credit"], credit.ALL, "credit"),
        consensus=given["consensus"] or restore_method(manifest["consensus"], consensus.ALL, "consensus"),
        optimizer=given["optimizer"] or restore_optimizer(unpack(manifest["optimizer"], defaults)),
        schedule=given["schedule"] or restore_schedule(manifest["schedule"]),
        world=given["world"],
        device=given["device"],
        **manifest["options"],
    )
    for weights in trainer.weights:
        _load_shard(weights, reader)
    for name, value in manifest["progress"].items():
        setattr(trainer, name, value)
    trainer.bytes_sent.update(manifest["bytes_sent"])
    trainer.book = EpochBook(**manifest["book"])
    return trainer


def _name(weights: Weights) -> str:
    return f"replica-{weights.worker.replica}-stage-{weights.worker.stage}"


def stage_tensors(chain: Chain, j: int) -> dict[str, Tensor]:
    """The tensors of stage j: `body.` with the user's own names, `head.` with the head's."""
    local = chain[j].body.state_dict(keep_vars=True)
    tensors = {f"body.{name}": local[inside] for name, stage, inside in chain.names if stage == j}
    head = chain[j].head
    if head is not None:
        tensors |= {f"head.{name}": x for name, x in head.state_dict(keep_vars=True).items()}
    return tensors


def _shard(weights: Weights) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = stage_tensors(weights.chain, weights.worker.stage)
    scheduler = weights.store.scheduler
    described = {
        "version": weights.worker.version,
        "optimizer": pack(weights.store.optimizer.state_dict(), "optimizer", tensors),
        "scheduler": None if scheduler is None else pack(scheduler.state_dict(), "scheduler", tensors),
    }
    return tensors, described


def _load_shard(weights: Weights, reader: Reader) -> None:
    name = _name(weights)
    tensors, described = reader.tensors(name), reader.json(name)
    mine = stage_tensors(weights.chain, weights.worker.stage)
    copy_into(mine, {key: x for key, x in tensors.items() if key.startswith(("body.", "head."))}, name)
    weights.worker.version = described["version"]
    weights.store.optimizer.load_state_dict(unpack(described["optimizer"], tensors))
    if weights.store.scheduler is not None and described["scheduler"] is not None:
        weights.store.scheduler.load_state_dict(unpack(described["scheduler"], tensors))


def _chain(reader: Reader) -> Chain:
    recipe = reader.manifest["recipe"]
    if recipe is None:
        raise BadCheckpoint(
            "The checkpoint's model was made by your own code, and no code is ever read from a checkpoint; "
            "give the same model again: Trainer.resume(path, chain=ul.cut(model, …))."
        )
    example = reader.tensors("example")["like"]
    chain = from_recipe_of_chain(recipe, example)
    return chain.to(example.dtype) if example.is_floating_point() else chain
