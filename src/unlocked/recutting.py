"""Go on with a run whose network is cut into another number of stages than when it was saved.

Shards name tensors and optimizer states by the user's parameter names, so those can be dealt out anew. What belongs to the old
cut cannot: auxiliary heads, per-stage groups of parameters, stages that were updated differently often.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .chain import Chain
from .checkpoint import Reader, shard_name, unpack
from .cutting import cut
from .errors import BadCheckpoint
from .models import from_recipe


def cut_anew(reader: Reader, stages: int) -> Chain:
    """The checkpoint's own network in `stages` stages. Raises BadCheckpoint if only the user's code can make it."""
    recipe = reader.manifest["recipe"]
    if recipe is None:
        raise BadCheckpoint(
            "The checkpoint's model was made by your own code; to go on with another number of stages give it, cut anew: "
            f"Trainer.resume(path, chain=ul.cut(model, {stages}, …), stages={stages})."
        )
    if "layout" in recipe:
        raise BadCheckpoint(
            "This network has neuron groups, which are not cut anew; go on with the stages it has: leave out stages=."
        )
    model, example = from_recipe(recipe["model"]), reader.tensors("example")["like"]
    return cut(model.to(example.dtype) if example.is_floating_point() else model, stages, like=example)


class Shards:
    """All shards of a replica, merged. Raises BadCheckpoint, in a sentence, for what cannot be cut anew."""

    def __init__(self, reader: Reader, replica: int) -> None:
        before = reader.manifest["stages"]
        own = [(shard_name(replica, stage), shard_name(0, stage)) for stage in range(before)]
        names = [mine if reader.has(mine) else first for mine, first in own]
        rows = [(reader.tensors(name), reader.json(name)) for name in names]
        self.tensors: dict[str, Tensor] = {}
        self.entries: dict[str, Any] = {}
        self.carries = self.keeps_optimizer = False  # what the consensus rule takes along; see Weights
        for tensors, described in rows:
            self.tensors |= {name: x for name, x in tensors.items() if name.startswith("body.")}
            state = optimizer_state(reader, described, tensors)
            self.entries |= state["state"]
            self.keeps_optimizer |= described.get("keeps_optimizer", False)
            self.carries |= _holds(unpack(described["carried"], tensors)) if "carried" in described else False
            self.group, self.version = state["param_groups"][0], described["version"]
            self.scheduler = None if described["scheduler"] is None else unpack(described["scheduler"], tensors)
            self._refuse(reader, rows[0][1], described, state, any(name.startswith("head.") for name in tensors))

    def _refuse(self, reader: Reader, first: Any, here: Any, state: Any, heads: bool) -> None:
        method, stages = reader.manifest["credit"]["name"], reader.manifest["stages"]
        carried = dict(here["in_flight"]["map"])  # as packed by checkpoint.py
        for wrong, reason in (
            (heads, f"{method}'s heads belong to the stages they were made for"),
            (len(state["param_groups"]) > 1, "the optimizer has several groups of parameters per stage"),
            (carried["queue"] or carried["pending"], f"{method} had micro-batches in flight when it was saved"),
            (
                carried["standing"] is not None,  # a version, which may be 0
                f"the next step of {method} reads the weights before its last update",
            ),
            (
                carried["mitigation"] not in (None, {"map": []}),
                "the mitigation's averages belong to the stages they were made for",
            ),
            (here["version"] != first["version"], "the stages have not been updated equally often"),
        ):
            if wrong:
                raise BadCheckpoint(
                    f"This run cannot go on with another number of stages, as {reason}; resume with {stages}."
                )

    def of(self, names: list[str], parameters: list[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors with these names, and an optimizer state for these parameters. Raises BadCheckpoint if one is missing."""
        missing = [name for name in names if name not in self.tensors]
        if missing:
            raise BadCheckpoint(f"The checkpoint has no {', '.join(missing[:5])}; it is of another network.")
        entries = {name: self.entries[name] for name in parameters if name in self.entries}
        group = {**self.group, "params": list(range(len(parameters)))}
        return {name: self.tensors[name] for name in names}, {"state": entries, "param_groups": [group]}


def optimizer_state(reader: Reader, described: Mapping[str, Any], tensors: dict[str, Tensor]) -> Any:
    """The state of the optimizer that has updated a shard's weights, which may have been another worker's."""
    keeper = described.get("optimizer_of")
    if keeper is None:
        return unpack(described["optimizer"], tensors)
    name = shard_name(*keeper)
    return unpack(reader.json(name)["optimizer"], reader.tensors(name))


def _holds(value: Any) -> bool:
    """Whether there is a tensor inside."""
    if isinstance(value, Mapping):
        return any(map(_holds, value.values()))
    return any(map(_holds, value)) if isinstance(value, list) else isinstance(value, Tensor)


def rename_losses(losses: Mapping[str, Any], before: int, now: int) -> dict[str, Any]:
    """The books' losses: without heads only the last stage has one."""
    last = f".{before - 1}"
    return {worker.removesuffix(last) + f".{now - 1}": loss for worker, loss in losses.items() if worker.endswith(last)}
