"""One update of a trainer under both meters of memory, and what they say as plain JSON.

A record of an update:

    phase, step   when it was: the phase of the credit rule, the number of the update
    samples       of an update, per replica
    optimizer     its class
    meter         "storages" (every tensor was followed) or "allocator" (of the accelerator: whole processes only)
    processes     per process: rank, peak and categories (live bytes at the worst moment), saved (most bytes kept for backward),
                  curve ([seconds, live bytes], thinned)
    workers       per worker: replica, stage, rank, saved (most bytes kept for backward), and the sizes of its parameters (with
                  buffers), gradients and optimizer state; peak and categories of what it made, where tensors were followed
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
from .live import BUFFERS, GRADIENTS, INPUTS, OPTIMIZER, PARAMETERS, SAVED, LiveBytes, Meter, Share, live_meter
from .memory import SavedBytes
from .thinning import thin

if TYPE_CHECKING:
    from ..session import Trainer

Shares = Mapping[int, tuple[Tensor, Tensor]]
Record = dict[str, Any]


def metered_update(trainer: Trainer, shares: Shares) -> tuple[dict[str, float], SavedBytes, Record]:
    """`trainer.update`, whose losses and weights are the same as without; the meter of saved bytes; the record."""
    live = live_meter(trainer.device)
    live.register(INPUTS, [x for pair in shares.values() for x in pair])
    for weights in trainer.weights:
        _register(live, weights)
    fixed = [local(x) for chain in trainer.chains for x in (*chain.parameters(), *chain.buffers())]
    with contextlib.ExitStack() as stack:
        stack.enter_context(live)
        saved = stack.enter_context(SavedBytes(ignore=fixed, on_save=lambda x: live.mark(SAVED, x)))
        for weights in trainer.weights:
            stack.callback(_marking(live, weights).remove)
        losses = trainer.update(shares)
        for weights in trainer.weights:  # what the first update has made
            for x in optimizer_state(weights):
                live.mark(OPTIMIZER, x)
    return losses, saved, _record(trainer, shares, live, saved)


def _marking(live: Meter, weights: Weights) -> Any:
    """Before an update all gradients are in place, also those that PyTorch's parallel training puts there by itself."""

    def mark(*_: Any) -> None:
        for parameter in weights.parameters:
            if parameter.grad is not None:
                live.mark(GRADIENTS, parameter.grad)

    return weights.store.optimizer.register_step_pre_hook(mark)


def _register(live: Meter, weights: Weights) -> None:
    place = weights.worker.place
    live.register(PARAMETERS, weights.stage.parameters(), place)
    live.register(BUFFERS, weights.stage.buffers(), place)
    live.register(OPTIMIZER, optimizer_state(weights), place)


def optimizer_state(weights: Weights) -> list[Tensor]:
    """The tensors a worker's optimizer keeps."""
    states = weights.store.optimizer.state.values()
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def _record(trainer: Trainer, shares: Shares, live: Meter, saved: SavedBytes) -> Record:
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
        "workers": [_worker(weights, rank, live, saved) for weights in trainer.weights],
    }


def _worker(weights: Weights, rank: int, live: Meter, saved: SavedBytes) -> Record:
    place: Place = weights.worker.place
    share = live.workers.get(place, Share(0, {}, {}))
    known = {
        "replica": place.replica,
        "stage": place.stage,
        "rank": rank,
        "saved": saved.workers.get(place, 0),
        "parameters": _bytes([*weights.stage.parameters(), *weights.stage.buffers()]),
        "optimizer_state": _bytes(optimizer_state(weights)),
    }
    if not live.workers:
        return known
    return known | {
        "gradients": share.most.get(GRADIENTS, 0),
        "peak": share.peak,
        "categories": share.categories,
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of distinct storages."""
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in map(local, tensors)}
    return sum(storages.values())


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
