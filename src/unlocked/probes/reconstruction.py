"""How far what a reversible network reconstructs is from what was there (PETRA; FACTS 1.12, 2.7).

    error = ‖x̃ − x‖ / ‖x‖

    x    the input of a reversible unit in the forward of a micro-batch (both streams)
    x̃    the same as it is computed from the unit's output in the backward, with the weights of that moment

An error has two sources: rounding, and the updates in between. The first is all there is at learning rate 0, with
PETRA(keep="weights"), and in `rounding`. Where a part is not reversible its input was kept, and the reconstruction begins anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..chain import Stage
from ..costs import untouched
from ..credit.petra import PETRA
from ..errors import InvalidChoice
from ..flight import InFlight
from ..reversible import is_reversible, units
from ..worker import Place, Worker
from .watching import leave, watch

if TYPE_CHECKING:
    from ..session import Trainer

T = TypeVar("T")


def distance(x: Tensor, true: Tensor) -> float:
    """‖x − true‖ / ‖true‖ over all elements, in float64."""
    return float((x.double() - true.double()).norm() / true.double().norm())


def rounding(body: nn.Module, x: Tensor) -> list[float]:
    """The errors of all reversible units' inputs, from the first unit to the last, if no weight has changed.

    Only the output of `body` is kept, and the inputs of what is not reversible. It runs in the mode it is in, without
    autograd, and is left without a trace. It should draw no random numbers (dropout 0).
    """
    row, inputs = units(body), []
    with torch.no_grad():
        with untouched(body):
            for unit in row:
                inputs.append(x)
                x = unit(x)
        errors = []
        with untouched(body):
            for unit, true in zip(reversed(row), reversed(inputs)):
                if is_reversible(unit):
                    x = unit.inverse(x)
                    errors.append(distance(x, true))
                else:
                    x = true
    return errors[::-1]


class Reconstructions:
    """Looks at the first micro-batch of every `every`-th step, until `close`.

    `records`: as `ReconstructionError` has them (callbacks.py). Raises InvalidChoice if the rule reconstructs nothing.
    """

    def __init__(self, trainer: Trainer, every: int, records: list[dict[str, Any]]) -> None:
        if not isinstance(trainer.credit, PETRA) or "output" not in trainer.credit.messages:
            keep = getattr(trainer.credit, "keep", None)
            raise InvalidChoice(
                f"{trainer.credit.name}{'' if keep is None else f'(keep={keep!r})'} reconstructs nothing; look at petra with "
                "keep='nothing' or keep='weights'."
            )
        self._trainer, self._every, self.records = trainer, every, records
        self._true: dict[tuple[Place, int], dict[nn.Module, Tensor]] = {}
        watch(trainer.workers, self._around)

    def close(self) -> None:
        """Look no more."""
        leave(self._trainer.workers, self._around)
        self._true.clear()

    @contextlib.contextmanager
    def _around(self, worker: Worker, kind: str, arguments: tuple[Any, ...]) -> Iterator[None]:
        key = worker.place, worker.micro_batch
        if kind == "F" and self._wanted(worker.micro_batch) and not worker.last:
            with _inputs(_the(Stage, arguments)) as self._true[key]:
                yield
        elif kind == "B" and key in self._true:
            errors: list[float] = []
            with _reconstructed(self._true.pop(key), errors):
                yield
            self._note(worker, _the(InFlight, arguments), errors)
        else:
            yield

    def _wanted(self, number: int) -> bool:
        step, part = divmod(number, self._trainer.accumulate)
        return part == 0 and (step + 1) % self._every == 0

    def _note(self, worker: Worker, entry: InFlight, errors: list[float]) -> None:
        if errors:
            when = {
                "step": entry.number // self._trainer.accumulate + 1,
                "replica": worker.replica,
                "stage": worker.stage,
            }
            delay = worker.version - entry.reading.version
            self.records.append({**when, "delay": delay, "error": errors[-1], "worst": max(errors)})


def _the(kind: type[T], arguments: tuple[Any, ...]) -> T:
    return next(x for x in arguments if isinstance(x, kind))


@contextlib.contextmanager
def _inputs(stage: Stage) -> Iterator[dict[nn.Module, Tensor]]:
    """What goes into the stage's reversible units meanwhile."""
    found: dict[nn.Module, Tensor] = {}

    def note(unit: nn.Module, given: tuple[Tensor, ...]) -> None:
        found[unit] = given[0].detach().clone()

    hooks = [unit.register_forward_pre_hook(note) for unit in units(stage.body) if is_reversible(unit)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _reconstructed(true: dict[nn.Module, Tensor], errors: list[float]) -> Iterator[None]:
    """Compare what units reconstruct meanwhile with what was there; the lowest unit of a stage comes last."""

    def compared(reverse: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], x: Tensor) -> Any:
        def call(z: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
            found = reverse(z, gradient)
            errors.append(distance(found[0].detach(), x))
            return found

        return call

    before = {unit: vars(unit).get("reverse") for unit in true}
    for unit, x in true.items():
        assert is_reversible(unit)
        vars(unit)["reverse"] = compared(unit.reverse, x)
    try:
        yield
    finally:
        for unit, old in before.items():
            if old is None:
                del vars(unit)["reverse"]
            else:
                vars(unit)["reverse"] = old
