"""An oracle: a network trained before, which says how alike two views are.

It is frozen, in evaluation mode, and never part of what is trained or saved. It comes from the folder of a run of `simclr` (or
of any rule whose last stage has a projector), as encoder and projector, or from Python as a module x (B, …) → (B, E).

A folder is read when the oracle is first asked, so that a run can be opened without it: exported, merged, looked at.
"""

from __future__ import annotations

import functools
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..chain import Chain, Stage
from ..errors import InvalidChoice, UnlockedError
from ..flat import digest
from ..modes import modes_kept


class Oracle:
    """Projections (B, E) of inputs (B, …), without gradient. `given`: a path or a module; `rule`: whose oracle, for messages.

    A path is read when the oracle is first asked. Raises InvalidChoice if there is none, or if it is no such network.
    """

    def __init__(self, given: Any, rule: str) -> None:
        self._given, self._rule = given, rule
        self._answers: dict[tuple, tuple[tuple[int, ...], torch.dtype]] = {}  # shape of a row, on shapes alone

    @functools.cached_property
    def _network(self) -> nn.Module:
        self._refuse_what_is_none()
        return self._given if isinstance(self._given, nn.Module) else self._read().requires_grad_(False)

    def _refuse_what_is_none(self) -> None:
        given = self._given
        if given is None:
            raise InvalidChoice(
                f"{self._rule} needs an oracle, a network trained before; give oracle=PATH, the folder of a run of simclr, or "
                "from Python a module that gives projections (B, E)."
            )
        if not isinstance(given, (nn.Module, str, Path)):
            raise InvalidChoice(
                f"{self._rule}'s oracle is a {type(given).__name__}; give the folder of a run of simclr, or a torch.nn.Module."
            )

    @property
    def bytes(self) -> int:
        """Of its weights and buffers; 0 where it cannot be read."""
        try:
            return sum(x.nbytes for x in chain(self._network.parameters(), self._network.buffers()))
        except UnlockedError:
            return 0

    @property
    def digest(self) -> str:
        """Of its weights and buffers."""
        return digest(chain(self._network.parameters(), self._network.buffers()))

    def refuse_shared(self, trained: Chain) -> None:
        """Raises InvalidChoice if it has weights of the network that is trained: they would move."""
        moving = {weight for weight in trained.parameters() if weight.requires_grad}
        if isinstance(self._given, nn.Module) and not moving.isdisjoint(self._given.parameters()):
            raise InvalidChoice(
                f"{self._rule}'s oracle has weights of the network that is trained, but an oracle stays as it is; give "
                "copy.deepcopy(oracle)."
            )

    def _read(self) -> nn.Module:
        try:
            return _kept(Path(self._given).expanduser().absolute(), *_newest(self._given))
        except UnlockedError as error:
            place = Path(self._given).expanduser().absolute()
            raise InvalidChoice(
                f"{self._rule}'s oracle {self._given} cannot be read: {error} It was looked for at {place}, and is needed to "
                "train and to judge pairs; give the folder of a run of simclr, or put it back in its place."
            ) from error

    @functools.cached_property
    def _shapes(self) -> nn.Module:
        """A copy without values, whose weights count as a stage's do."""
        copy = Chain([Stage(self._network)]).blank("meta")[0].body
        for weight in copy.parameters():
            weight.requires_grad_(weight.is_floating_point())
        return copy.eval()

    def _input(self, x: Tensor) -> torch.dtype:
        """As what it is given x."""
        floats = (p.dtype for p in self._network.parameters() if p.is_floating_point())
        return next(floats, x.dtype) if x.dtype.is_floating_point else x.dtype

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        network = self._shapes if x.is_meta else self._network.to(x.device)
        with modes_kept(network):
            network.eval()
            return network(x.to(self._input(x)))

    def on_shapes(self, x: Tensor) -> tuple[nn.Module, Tensor]:
        """Itself without values, and an example of what it is given for inputs like x: for who counts what it costs."""
        return self._shapes, torch.empty((2, *x.shape[1:]), dtype=self._input(x), device="meta")

    def gives(self, x: Any) -> Any:
        """What comes out for a ghost (simulation/ghosts.py); float32 and 128 entries where that cannot be known."""
        from ..simulation.profile import profile  # it needs the credit rules

        key = (x.shape[1:], x.dtype)
        if key not in self._answers:
            try:
                network, like = self.on_shapes(x)
                (found,) = profile(Chain([Stage(network)], like)).stages
                self._answers[key] = found.output, found.dtype
            except Exception:  # made-up shapes, or a network that looks at values
                self._answers[key] = (128,), torch.float32
        shape, dtype = self._answers[key]
        return x.new_empty((len(x), *shape), dtype=dtype)

    def check_at_hand(self, x: Tensor) -> None:
        """As `check`, but of a path only that there is one: it is looked at when there are data to be trained on."""
        self._refuse_what_is_none()
        if isinstance(self._given, nn.Module):
            self.check(x)

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


def _newest(path: str | Path) -> tuple[tuple[Path, int], ...]:
    """What is in a run's folder, and since when: another answer once it has been trained on."""
    folder = Path(path).expanduser()
    return tuple((file, file.stat().st_mtime_ns) for file in sorted([*folder.glob("LATEST"), *folder.glob("*/LATEST")]))


@functools.lru_cache(maxsize=2)
def _kept(path: Path, *newest: tuple[Path, int]) -> nn.Module:
    """`of_run`, once for all rules that name the same run: plans make many."""
    return of_run(path)


def of_run(path: str | Path) -> nn.Module:
    """Encoder and projector of a finished run (its folder, or that of its checkpoints), on the CPU; the mean of its replicas.

    Raises InvalidChoice for a run without a projector, BadCheckpoint for a folder that holds no run.
    """
    from ..session import Trainer  # it needs the credit rules

    folder = Path(path).expanduser()
    inside = folder / "checkpoint"
    with torch.random.fork_rng(devices=[]):
        trainer = Trainer.resume(inside if inside.is_dir() else folder, device="cpu")
        network = trainer.averaged()
    head = network[-1].head
    if head is None:
        raise InvalidChoice(
            f"{path} holds a network without a projector, trained by {trainer.credit.name}; give a run of simclr."
        )
    return nn.Sequential(network, head)
