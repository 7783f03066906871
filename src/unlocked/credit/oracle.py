"""An oracle: a network trained before, which says how alike two views are.

It is frozen, in evaluation mode, and never part of what is trained or saved. It comes from the folder of a run of `simclr` (or
of any rule whose last stage has a projector), as encoder and projector, or from Python as a module x (B, …) → (B, E).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidChoice, UnlockedError
from ..modes import modes_kept


class Oracle:
    """Projections (B, E) of inputs (B, …), without gradient. `given`: a path or a module; `rule`: whose oracle, for messages.

    A path is read when the oracle is first asked. Raises InvalidChoice if there is none, or if it is no such network.
    """

    def __init__(self, given: Any, rule: str) -> None:
        self._given, self._rule = given, rule

    @functools.cached_property
    def _network(self) -> nn.Module:
        given = self._given
        if given is None:
            raise InvalidChoice(
                f"{self._rule} needs an oracle, a network trained before; give oracle=PATH, the folder of a run of simclr, or "
                "from Python a module that gives projections (B, E)."
            )
        network = given if isinstance(given, nn.Module) else self._read() if isinstance(given, (str, Path)) else None
        if network is None:
            raise InvalidChoice(
                f"{self._rule}'s oracle is a {type(given).__name__}; give the folder of a run of simclr, or a torch.nn.Module."
            )
        return network.requires_grad_(False) if network is not given else network

    def _read(self) -> nn.Module:
        try:
            return of_run(self._given)
        except UnlockedError as error:
            raise InvalidChoice(
                f"{self._rule}'s oracle {self._given} cannot be read: {error} It is needed whenever the run is opened; give "
                "the folder of a run of simclr, or put it back in its place."
            ) from error

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        network = self._network.to(x.device)
        floats = [p.dtype for p in network.parameters() if p.is_floating_point()]
        with modes_kept(network):
            network.eval()
            return network(x.to(floats[0]) if floats and x.is_floating_point() else x)

    def check(self, x: Tensor) -> None:
        """Raises InvalidChoice unless it can read inputs like x."""
        self._network  # noqa: B018  # what cannot be read says so itself
        try:
            seen = self(x)
        except UnlockedError:
            raise
        except Exception as error:  # a network may raise anything
            raise InvalidChoice(
                f"{self._rule}'s oracle cannot read inputs of shape {tuple(x.shape[1:])} ({error}); take one that was "
                "trained on such data."
            ) from error
        if not isinstance(seen, Tensor) or seen.dim() != 2 or len(seen) != len(x):
            shape = tuple(seen.shape) if isinstance(seen, Tensor) else type(seen).__name__
            raise InvalidChoice(f"{self._rule}'s oracle gives {shape} for {len(x)} inputs; it must give (B, E).")


def of_run(path: str | Path) -> nn.Module:
    """Encoder and projector of a finished run (its folder, or that of its checkpoints), on the CPU; the mean of its replicas.

    Raises InvalidChoice for a run without a projector, BadCheckpoint for a folder that holds no run.
    """
    from ..session import Trainer  # it needs the credit rules

    folder = Path(path).expanduser()
    inside = folder / "checkpoint"
    with torch.random.fork_rng(devices=[]):
        trainer = Trainer.resume(inside if inside.is_dir() else folder, device="cpu")
        chain = trainer.averaged()
    head = chain[-1].head
    if head is None:
        raise InvalidChoice(
            f"{path} holds a network without a projector, trained by {trainer.credit.name}; give a run of simclr."
        )
    return nn.Sequential(chain, head)
