"""Which stage is in memory: brought when it is asked for, put away when another one is.

    asked for j:   put i away   its tensors are emptied, and written if they may have changed
                   bring j      its tensors are filled again
                   look ahead   the stage that came after j the last time is read beforehand

All reading and writing is done by one thread, in order, so a stage is never read before it is written, and with `prefetch` all
goes on beside the computing: then one more stage is in memory, the last one being written or the next one being read.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..chain import Stage
from ..probes.memory import disregard
from ..worker import Purpose
from .contents import Form, blank, contents, empty, fill, form, refuse_shared_memory, row_of
from .heap import Heap
from .shelves import Shelf


class Away(NamedTuple):
    """A stage that is not in memory: the tensors emptied, and how they lay."""

    tensors: list[Tensor]
    forms: list[Form]


class Coming(NamedTuple):
    """A stage that is being read."""

    stage: int
    rows: list[Tensor]
    done: Future[None]


class Residence:
    """Keeps one of the stages it was given in memory.

    Args: `shelf`: where the others wait. prefetch: whether to read and write beside the computing. device: where to compute.
    """

    def __init__(self, shelf: Shelf, prefetch: bool, device: torch.device | None = None) -> None:
        self._shelf, self._prefetch = shelf, prefetch
        self._device = device if device is not None else torch.device("cpu")
        self._thread = ThreadPoolExecutor(1, "unlocked-residence")
        self._stages: dict[int, Stage] = {}
        self._optimizers: dict[int, torch.optim.Optimizer] = {}
        self._away: dict[int, Away] = {}
        self._after: dict[int, int] = {}
        self._here: int | None = None
        self._changed = False
        self._marks: list[tuple[int, int]] = []  # of the stage in memory, as it came
        self._coming: Coming | None = None
        self._writing: Future[None] | None = None
        self._heap = Heap()
        self._stream = _stream(self._device)

    @property
    def here(self) -> int | None:
        """The stage in memory."""
        return self._here

    def take(self, number: int, stage: Stage) -> None:
        """Look after this stage from now on; it is in memory afterwards. Raises InvalidChoice for tensors that share memory."""
        if number in self._stages:
            self.ensure(number, "change")
            return
        self._put_away()
        refuse_shared_memory(stage, number)
        stage.to(self._device)
        self._stages[number], self._here, self._changed = stage, number, True
        stage.body.register_forward_pre_hook(_Asking(self, number))

    def updated_by(self, number: int, optimizer: torch.optim.Optimizer) -> None:
        """What this optimizer keeps belongs to the stage."""
        self._optimizers[number] = optimizer

    def move(self, device: torch.device) -> None:
        """Let stages compute on this device from now on."""
        if device != self._device:
            self._put_away()
            self._drop_coming()
            self._device, self._stream = device, _stream(device)

    def ensure(self, number: int, purpose: Purpose = "compute") -> None:
        """Have this stage in memory: to look at its tensors, change them, or compute, which changes them in training mode.

        Raises DamagedFile: it cannot be read, or the one before could not be written.
        """
        if number != self._here:
            before = self._here
            self._put_away()
            self._bring(number)
            if before is not None:
                self._after[before] = number
            if self._prefetch:
                self._look_ahead(self._after.get(number, (number + 1) % len(self._stages)))
        if purpose != "look" and not self._changed:
            self._changed = purpose == "change" or _trains(self._stages[number])

    # ---- putting away ----------------------------------------------------------------------------------------------

    def _put_away(self) -> None:
        if self._here is None:
            return
        number, changed = self._here, self._changed
        tensors = contents(self._stages[number], self._optimizers.get(number))
        changed = changed or _marks(tensors) != self._marks  # some modules change their buffers when they are judged
        forms = [form(x) for x in tensors]
        rows = [row_of(x) for x in tensors]
        for x in tensors:
            empty(x)
        self._away[number], self._here, self._changed = Away(tensors, forms), None, False
        if changed:
            self._wait_for_writing()
            self._writing = self._submit(self._store, number, rows)
            if not self._prefetch:
                self._wait_for_writing()
        self._heap.look_after(sum(like.extent * like.dtype.itemsize for like in forms))

    def _wait_for_writing(self) -> None:
        if self._writing is not None:
            self._writing.result()  # stays: a stage that could not be written is lost, whoever asks
            self._writing = None

    def _store(self, number: int, rows: list[Tensor]) -> None:
        try:
            self._shelf.store(number, rows)
        finally:
            if self._stream is not None:
                self._stream.synchronize()  # copies go on beside; until they are done, this memory must be nobody else's
            rows.clear()  # the thread keeps its arguments a little longer than it needs them

    # ---- bringing --------------------------------------------------------------------------------------------------

    def _bring(self, number: int) -> None:
        if self._coming is not None and self._coming.stage != number:
            self._drop_coming()
        coming = self._coming or self._begin(number)
        self._coming = None
        coming.done.result()
        away = self._away[number]
        for x, row, like in zip(away.tensors, coming.rows, away.forms, strict=True):
            fill(x, row, like)
        disregard(away.tensors)  # they are weights: no meter is to count them as saved for backward
        self._here, self._marks = number, _marks(away.tensors)

    def _begin(self, number: int) -> Coming:
        rows = blank(self._away[number].forms, self._device)
        return Coming(number, rows, self._submit(self._shelf.fetch, number, rows))

    def _look_ahead(self, number: int) -> None:
        if number != self._here and number in self._away and self._coming is None:
            self._coming = self._begin(number)

    def _drop_coming(self) -> None:
        if self._coming is not None:
            self._coming.done.cancel()
            wait([self._coming.done])  # what came of it is nobody's concern
            self._coming = None

    # ---- the thread ------------------------------------------------------------------------------------------------

    def _submit(self, move: Callable[[int, list[Tensor]], None], number: int, rows: list[Tensor]) -> Future[None]:
        if self._stream is None:
            return self._thread.submit(move, number, rows)
        reached = torch.cuda.current_stream(self._device).record_event()  # of what uses, or has used, that memory
        return self._thread.submit(self._on_stream, reached, move, number, rows)

    def _on_stream(
        self, reached: Any, move: Callable[[int, list[Tensor]], None], number: int, rows: list[Tensor]
    ) -> None:
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(reached)
            move(number, rows)
            self._stream.synchronize()


class _Asking:
    """A hook before a forward: it asks for the stage. Copies of the module are ordinary ones, and ask for nothing."""

    def __init__(self, residence: Residence | None, number: int) -> None:
        self._residence, self._number = residence, number

    def __call__(self, module: nn.Module, given: Any) -> None:
        if self._residence is not None:
            self._residence.ensure(self._number)

    @property
    def asks(self) -> bool:
        """Whether it is no copy."""
        return self._residence is not None

    def __deepcopy__(self, memo: Any) -> _Asking:
        return _Asking(None, self._number)


def looked_after(stage: Stage) -> bool:
    """Whether a residence looks after this stage."""
    return any(isinstance(hook, _Asking) and hook.asks for hook in stage.body._forward_pre_hooks.values())


def _marks(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """Which tensors there are, and how often each was changed in place."""
    return [(id(x), 0 if x.is_inference() else x._version) for x in tensors]


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _trains(stage: nn.Module) -> bool:
    return stage.training or any(part.training for part in stage.modules())
