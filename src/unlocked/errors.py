"""Errors that are sentences: what was given, what is allowed, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class UnlockedError(Exception):
    """Base of every error this library raises on purpose. Its text is a whole sentence for the user."""


class InvalidChoice(UnlockedError, ValueError):
    """A value that is not allowed; the sentence names the allowed ones and the nearest."""


class CannotCut(UnlockedError, ValueError):
    """The model cannot be split as asked."""


class HeadTooLarge(UnlockedError, ValueError):
    """An auxiliary head costs more than its FLOP budget."""


class NonFiniteLoss(UnlockedError, ArithmeticError):
    """A stage's loss is NaN or infinite. On the CPU training stops before its weights are touched."""


class Deadlock(UnlockedError, RuntimeError):
    """Every worker waits for another one."""


class DoesNotFit(UnlockedError, MemoryError):
    """A simulated device would need more memory than it has."""


class BadData(UnlockedError, ValueError):
    """A data set that cannot be read as described."""


class BadCheckpoint(UnlockedError, ValueError):
    """A checkpoint that is missing, incomplete, or of another run."""


class CannotJoin(UnlockedError, ConnectionError):
    """The processes of a run do not come together: no rendezvous, a wrong count, or they were told different things."""


class LostProcess(UnlockedError, ConnectionError):
    """Another process of the run died, hangs, or failed; the sentence names it.

    `located`: whether the sentence says already from where to go on.
    """

    located = False


class LostPeer(UnlockedError, ConnectionError):
    """A replica that this one was to hear from is gone, but training goes on without it."""


class MembersChanged(UnlockedError):
    """Processes of the run are lost, or others join; what there is has been saved, and those who are left go on from there.

    `cluster`: of those who go on, this process among them; `folder`: of the checkpoint; `record`: what happened. Go on with
    `Trainer.resume(folder, world=Distributed(cluster))` and `fit`; `unlocked train` does so by itself.
    """

    def __init__(self, sentence: str, cluster: Any, folder: Any, record: dict[str, Any]) -> None:
        super().__init__(sentence)
        self.cluster, self.folder, self.record = cluster, folder, record


def choose(what: str, given: str, allowed: Iterable[str]) -> str:
    """`given` if it is among `allowed`; otherwise an InvalidChoice that names the nearest one.

    Example sentence: Unknown head 'mpl'; did you mean 'mlp'? Allowed are: cnn, linear, mlp.
    """
    names = sorted(allowed)
    if given in names:
        return given
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise InvalidChoice(f"Unknown {what} {given!r}{hint} Allowed are: {', '.join(names)}.")
