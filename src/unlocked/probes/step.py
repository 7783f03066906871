"""One update of a trainer under both meters of memory, and what they say as plain JSON.

A record of an update:

    phase, step   when it was: the phase of the credit rule, the number of the update
    samples       of an update, per replica
    optimizer     its class
    meter         "storages" (every tensor was followed) or "allocator" (of the accelerator: whole processes only)
    processes     per process: rank, peak and categories (live bytes at the worst moment), saved (most bytes kept for backward),
                  curve ([seconds, live bytes], thinned)
    workers       per worker: replica, stage, rank, saved (most bytes kept for backward), versions (most bytes of old weights),
                  and the sizes of its parameters (with buffers), gradients and optimizer state; peak and categories of what it
                  made, where tensors were followed
    predicted     per stage: see predicted.py; only in the files of a run
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..consensus.base import Weights
from ..sharding import local
from ..worker import Place
from .live import BUFFERS, GRADIENTS, INPUTS, OPTIMIZER, OTHER, PARAMETERS, SAVED, LiveBytes, Meter, Share, live_meter
from .memory import SavedBytes
from .thinning import thin

if TYPE_CHECKING:
    from ..session import Trainer

Shares = Mapping[int, tuple[Tensor, Tensor]]
Record = dict[str, Any]


class Metering:
    """Meters updates one after the other; what is kept for backward is followed from the first to the last of them."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.saved = SavedBytes()
        self.records: list[Record] = []

    @property
    def wanted(self) -> int:
        """Updates until one is worth keeping: an optimizer makes its state in the first. Under a delayed rule the pipeline must
        be full, and the weights that all micro-batches in flight have seen must be different ones."""
        return 2 + self._trainer.credit.filling(self._trainer.stages, self._trainer.accumulate)

    def update(self, shares: Shares) -> dict[str, float]:
        """`trainer.update`, whose losses and weights are the same as without."""
        trainer, saved = self._trainer, self.saved
        live = live_meter(trainer.device)
        live.register(INPUTS, [x for pair in shares.values() for x in pair])
        for weights in trainer.weights:
            _register(live, weights)
        copies = _Copies(saved)
        saved.restart(ignore=[local(x) for chain in trainer.chains for x in (*chain.parameters(), *chain.buffers())])
        saved.on_save = lambda x: live.mark(SAVED, x)
        with contextlib.ExitStack() as stack:
            stack.enter_context(live)
            stack.enter_context(saved)
            for weights in trainer.weights:
                copies.look(weights)
                stack.callback(_marking(live, weights, copies).remove)
            losses = trainer.update(shares)
            for weights in trainer.weights:  # what the first update has made
                for x in weights.optimizer_state():
                    live.mark(OPTIMIZER, x)
        self.records.append(_record(trainer, shares, live, saved, copies))
        return losses


class _Copies:
    """The most bytes of old weights that each worker has kept. They are weights: nothing counts them as saved for backward."""

    def __init__(self, saved: SavedBytes) -> None:
        self._saved = saved
        self.most: dict[Place, int] = {}

    def look(self, weights: Weights) -> None:
        versions, place = weights.versions, weights.worker.place
        self._saved.disregard(x for row in versions.kept.values() for x in row)
        self.most[place] = max(self.most.get(place, 0), versions.copies)


def _marking(live: Meter, weights: Weights, copies: _Copies) -> Any:
    """Before an update all gradients are in place, also those that PyTorch's parallel training puts there by itself, and
    today's weights have been copied if they will be wanted."""

    def mark(*_: Any) -> None:
        copies.look(weights)
        for parameter in weights.parameters:
            if parameter.grad is not None:
                live.mark(GRADIENTS, parameter.grad)

    return weights.store.optimizer.register_step_pre_hook(mark)


def _register(live: Meter, weights: Weights) -> None:
    place = weights.worker.place
    live.register(PARAMETERS, weights.stage.parameters(), place)
    live.register(BUFFERS, weights.stage.buffers(), place)
    live.register(OPTIMIZER, weights.optimizer_state(), place)
    live.register(SAVED, _in_flight(weights), place)
    live.register(OTHER, [x for row in weights.versions.kept.values() for x in row], place)


def _in_flight(weights: Weights) -> list[Tensor]:
    """What a delayed rule has kept in earlier updates."""
    found: list[Tensor | None] = []
    for entry in () if weights.flight is None else weights.flight.queue:
        found += [entry.x, *entry.kept.values()]
        found += [] if entry.saved is None or entry.x is None else entry.saved.kept(without=entry.x)
    return [x for x in found if x is not None]


def _record(trainer: Trainer, shares: Shares, live: Meter, saved: SavedBytes, copies: _Copies) -> Record:
    rank, seconds = trainer.crew.rank, [when for when, _ in live.curve]
    levels = [level for _, level in live.curve]
    process = {"rank": rank, "peak": live.peak, "categories": live.categories, "saved": saved.peak}
    process["curve"] = [[round(seconds[k], 6), levels[k]] for k in thin(levels)]
    return {
        "phase": trainer.phase,
        "step": trainer.steps,
        "samples": len(next(iter(shares.values()))[0]),
        "optimizer": type(trainer.weights[0].store.optimizer).__name__,
        "meter": "storages" if isinstance(live, LiveBytes) else "allocator",
        "processes": [process],
        "workers": [_worker(weights, rank, live, saved, copies) for weights in trainer.weights],
    }


def _worker(weights: Weights, rank: int, live: Meter, saved: SavedBytes, copies: _Copies) -> Record:
    place: Place = weights.worker.place
    share = live.workers.get(place, Share(0, {}, {}))
    known = {
        "replica": place.replica,
        "stage": place.stage,
        "rank": rank,
        "saved": saved.workers.get(place, 0),
        "versions": copies.most[place],
        "parameters": _bytes([*weights.stage.parameters(), *weights.stage.buffers()]),
        "optimizer_state": _bytes(weights.optimizer_state()),
    }
    if not live.workers:
        return known
    return known | {
        "gradients": share.most.get(GRADIENTS, 0),
        "peak": share.peak,
        "categories": share.categories,
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of distinct places in memory: stacked members (credit/stacking.py) share a storage, but no place in it."""
    places = {(x.untyped_storage()._cdata, x.storage_offset()): x.nbytes for x in map(local, tensors)}
    return sum(places.values())


def merged(records: Sequence[Sequence[Record]]) -> list[Record]:
    """The records of all processes, one for each phase, from those of each process."""
    whole: dict[int, Record] = {}
    for record in (record for row in records for record in row):
        known = whole.setdefault(record["phase"], {**record, "processes": [], "workers": []})
        known["processes"] = [*known["processes"], *record["processes"]]
        known["workers"] = [*known["workers"], *record["workers"]]
    for record in whole.values():
        record["workers"].sort(key=lambda worker: (worker["replica"], worker["stage"]))
    return [whole[phase] for phase in sorted(whole)]


def live_peak(records: Iterable[Record]) -> int | None:
    """Most live bytes of one process."""
    return max((process["peak"] for record in records for process in record["processes"]), default=None)
