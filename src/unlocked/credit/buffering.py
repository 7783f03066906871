"""What a stage of asynchronous DGL keeps, and how features travel to it.

A message of features is one tensor, or two if they are quantised: the largest magnitude of every block of 256 values, then
codes in int8 of the features' own shape (rules/compression.py). They are kept as they came and turned back into values when
they are used, so a buffer of M micro-batches costs M × their bytes on the wire.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..consensus.averaging.codecs import Int8
from ..consensus.base import Weights
from ..rng import mix
from ..rules.replay import Replay
from ..work import work
from ..worker import Worker

if TYPE_CHECKING:
    from .async_dgl import AsyncDGL

_CODEC = Int8()


class Kept(NamedTuple):
    """A micro-batch in a buffer: its number, targets, the network's input where the loss reads it, and the features as sent."""

    number: int
    y: Tensor
    x: Tensor | None
    features: list[Tensor]


class Buffered:
    """A stage's buffer, and where the stage is.

    turns: micro-batches it has learned from since training began. made: those of this epoch. forwarded: micro-batches of this
    epoch that were only passed on. waited: seconds of this epoch with nothing usable in the buffer.
    """

    def __init__(self, rule: AsyncDGL) -> None:
        self.replay: Replay[Kept] = Replay(rule.buffer, rule.policy, rule.reuse)
        self.turns = self.made = self.forwarded = 0
        self.waited = 0.0

    def take(self, worker: Worker, fresh: bool = False) -> Kept | None:
        """What the policy says; a uniform one draws by the stage's turn."""
        return self.replay.take(mix(worker.seed, self.turns), fresh=fresh)

    def features_of(self, kept: Kept, weights: Weights) -> Tensor:
        """The stage's input."""
        if len(kept.features) == 1:
            return kept.features[0]
        return weights.move(restored, kept.features, weights.parameters[0].dtype)

    def end_epoch(self) -> dict[str, Any]:
        """Drop what nobody used; what there is to tell about the epoch: see own_rates.py."""
        self.replay.drop_unused()
        told = {"updates": self.made, "forwarded": self.forwarded, "waited": self.waited, **self.replay.close_books()}
        self.made = self.forwarded = 0
        self.waited = 0.0
        return told

    def state(self) -> dict[str, Any]:
        """For a checkpoint: tensors and plain values."""
        entries = [{"uses": entry.uses, **entry.what._asdict()} for entry in self.replay.entries]
        left = {str(uses): count for uses, count in self.replay.left.items()}
        books = {"received": self.replay.received, "left": left, "forwarded": self.forwarded, "waited": self.waited}
        return {"entries": entries, "turns": self.turns, "made": self.made, **books}

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse; a smaller buffer keeps the newest entries."""
        self.turns, self.made, self.forwarded = state["turns"], state["made"], state["forwarded"]
        self.waited = state["waited"]
        for entry in state["entries"]:
            self.replay.put(Kept(entry["number"], entry["y"], entry["x"], list(entry["features"])), entry["uses"])
        self.replay.received = state["received"]
        self.replay.left.clear()
        self.replay.left.update({int(uses): count for uses, count in state["left"].items()})


# ---- features on their way -------------------------------------------------------------------------------------------


def _ghosts(weights: Weights, h: Tensor) -> list[Tensor]:
    blocks = -(-h.numel() // _CODEC.block)
    return [h.new_empty(blocks, dtype=torch.float32), h.new_empty(h.shape, dtype=torch.int8)]


@work(gives=_ghosts)
def quantised(h: Tensor) -> list[Tensor]:
    """The largest magnitudes and the codes; these have the shape of `h`."""
    largest, codes = _CODEC.encode(h.reshape(-1))
    return [largest, codes.view(h.shape)]


@work(gives=lambda weights, features, dtype: features[1].new_empty(features[1].shape, dtype=dtype))
def restored(features: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The features, as values of this type."""
    largest, codes = features
    like = torch.empty(0, dtype=dtype, device=codes.device)
    return _CODEC.decode([largest, codes.reshape(-1)], like).view(codes.shape)


async def send_features(quantise: str, worker: Worker, weights: Weights, h: Tensor, ending: str = "") -> None:
    """To the stage above; the last message is the one on channel "activation"."""
    if worker.last:
        return
    if quantise == "none":
        await worker.above.send("activation" + ending, h)
        return
    largest, codes = weights.move(quantised, h)
    await worker.above.send("activation/scales" + ending, largest)
    await worker.above.send("activation" + ending, codes)


async def receive_features(quantise: str, worker: Worker, ending: str = "") -> list[Tensor]:
    """From the stage below."""
    features = [] if quantise == "none" else [await worker.below.recv("activation/scales" + ending)]
    return [*features, await worker.below.recv("activation" + ending)]
