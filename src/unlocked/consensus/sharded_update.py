"""An optimizer that is split among the replicas (Rajbhandari et al., 2020: ZeRO-1).

A stage's trained values, laid end to end, are split into N parts as even as can be (they need not begin or end with a tensor).
Replica r keeps part r a second time and steps it with the user's own optimizer, so that the optimizer's state takes 1/N of its
memory on each replica. Groups of parameters keep their options; a parameter that had no part in any loss is left alone. Between
steps the user's optimizer holds the whole parameters and no state: what a checkpoint has of it are parts.

The optimizer must work on every number by itself, keep all it remembers in its `state`, and make that in its first step.
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidChoice
from ..flat import bounds, by_dtype
from ..mitigation import Mitigation
from ..rules.accumulation import Piece, pieces_of
from ..versions import copied

_NOT_BY_ELEMENT = ("Adafactor", "LBFGS", "Muon", "SparseAdam")


class Shard:
    """One replica's part of a stage's values, and the optimizer's state for it.

    clipped: the parameters in groups that are clipped by their norm each. pieces: the parts of parameters it consists of, as
    parameters of their own. `rows`: the positions of the parameters of each dtype; there is one exchange for each.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        clipped: Sequence[Sequence[nn.Parameter]],
        optimizer: torch.optim.Optimizer,
        mitigation: Mitigation | None,
        rank: int,
        size: int,
    ) -> None:
        self._parameters, self._optimizer = parameters, optimizer
        self.rows = by_dtype(parameters)
        self._where: list[list[Piece]] = []
        for positions in self.rows:
            sizes = [parameters[k].numel() for k in positions]
            begin, end = bounds(sum(sizes), size)[rank : rank + 2]
            self._where.append([piece._replace(of=positions[piece.of]) for piece in pieces_of(sizes, begin, end)])
        self._whole = [piece for row in self._where for piece in row]
        self._index = [piece.of for piece in self._whole]
        group = {id(x): number for number, row in enumerate(clipped) for x in row}
        self._clipped, self._norms = [group[id(parameters[k])] for k in self._index], len(clipped)
        self.pieces = [nn.Parameter(self._part(piece).clone()) for piece in self._whole]
        self._groups = self._grouped()
        optimizer.state.clear()  # what it has made for the whole parameters; it makes it again
        self.state: defaultdict[Any, Any] = defaultdict(dict)
        self.seen = _Seen(self.pieces)  # what a mitigation sees
        with self._at_work():
            self.mitigating = None if mitigation is None else mitigation.start(optimizer, self.seen)  # type: ignore[arg-type]

    def _part(self, piece: Piece) -> Tensor:
        return self._parameters[piece.of].detach().reshape(-1)[piece.begin : piece.end]

    def _grouped(self) -> list[list[nn.Parameter]]:
        """The pieces of each of the optimizer's groups, in the order of its parameters."""
        at = {id(x): k for k, x in enumerate(self._parameters)}
        return [
            [piece for x in group["params"] for piece, k in zip(self.pieces, self._index) if k == at[id(x)]]
            for group in self._optimizer.param_groups
        ]

    # ---- stepping --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _at_work(self, scale: float = 1.0) -> Iterator[None]:
        """The user's optimizer has the pieces inside, and `scale` times its learning rate."""
        optimizer = self._optimizer
        kept = [(group["params"], group["lr"]) for group in optimizer.param_groups]
        elsewhere, optimizer.state = optimizer.state, self.state
        for group, pieces in zip(optimizer.param_groups, self._groups):
            group["params"] = pieces
            if scale != 1.0:
                group["lr"] = group["lr"] * scale
        try:
            yield
        finally:
            self.state, optimizer.state = optimizer.state, elsewhere
            for group, (parameters, rate) in zip(optimizer.param_groups, kept):
                group["params"], group["lr"] = parameters, rate

    @torch.no_grad()
    def follow(self) -> None:
        """Take today's values of the parameters, which somebody may have changed between two steps."""
        for mine, piece in zip(self.pieces, self._whole):
            mine.copy_(self._part(piece))

    @torch.no_grad()
    def take(self, parts: Sequence[Tensor], samples: int, used: Sequence[bool]) -> list[float]:
        """The mean gradient of the own part is `parts` (a row per dtype) / `samples`; returns each group's squared norm.

        `used`: which parameters had a part in the loss.
        """
        rows = [part.split([piece.end - piece.begin for piece in row]) for part, row in zip(parts, self._where)]
        means = [x / samples for row in rows for x in row]
        gradients = [mean if used[k] else None for mean, k in zip(means, self._index)]
        if self.mitigating is not None:
            gradients = self.mitigating.compensate(gradients, None, 1, 1.0)  # type: ignore[arg-type]
        for piece, gradient in zip(self.pieces, gradients):
            piece.grad = gradient
        squares = [0.0] * self._norms
        for number, gradient in zip(self._clipped, gradients):
            if gradient is not None:
                squares[number] += float(gradient.double().square().sum())
        return squares

    @torch.no_grad()
    def clip(self, factors: Sequence[float]) -> None:
        """Multiply the gradients taken, of each group by its factor."""
        for piece, number in zip(self.pieces, self._clipped):
            if piece.grad is not None:
                piece.grad = piece.grad * factors[number]

    @torch.no_grad()
    def step(self, scale: float = 1.0) -> list[Tensor]:
        """The optimizer's step with the gradients taken; the new values of the own part, a row per dtype."""
        taken = [piece.grad for piece in self.pieces]
        for piece, gradient in zip(self.pieces, taken):  # copies: some optimizers write into gradients
            piece.grad = None if gradient is None else gradient.clone()
        if self.mitigating is not None:
            self.seen.before = copied(self.pieces)
        with self._at_work(scale):
            (self._optimizer if self.mitigating is None else self.mitigating).step()
        for piece, gradient in zip(self.pieces, taken):  # the same gradients may be used again
            piece.grad = gradient
        return self.values()

    @torch.no_grad()
    def foresee(self, scale: float = 1.0) -> list[Tensor]:
        """What `step` would give; everything is as it was afterwards."""
        optimizer = self._optimizer
        values = copied(self.pieces)
        state = {piece: _copied(entry) for piece, entry in self.state.items()}
        options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        before = self.seen.before
        found = self.step(scale)
        for piece, value in zip(self.pieces, values):
            piece.copy_(value)
        self.state.clear()
        self.state.update(state)
        for group, known in zip(optimizer.param_groups, options):
            group.update(known)
        self.seen.before = before
        return found

    def drop_gradients(self) -> None:
        """They were used."""
        for piece in self.pieces:
            piece.grad = None

    def values(self) -> list[Tensor]:
        """The own part, a row per dtype (empty where this replica has none of it); copies."""
        rows, begin = [], 0
        for positions, row in zip(self.rows, self._where):
            mine = [piece.detach() for piece in self.pieces[begin : begin + len(row)]]
            begin += len(row)
            rows.append(torch.cat(mine) if mine else self._parameters[positions[0]].detach().new_empty(0))
        return rows

    # ---- keeping ---------------------------------------------------------------------------------------------------

    def carried(self) -> dict[str, Any]:
        """The optimizer's entries of every piece, and the values before the last step, where a mitigation wants them."""
        state = [dict(self.state[piece]) if self.state.get(piece) else None for piece in self.pieces]
        return {"state": state, "before": self.seen.before}

    def load(self, carried: Mapping[str, Any]) -> None:
        """The inverse; the parameters are in place."""
        self.follow()
        self.seen.before = carried["before"]
        numbers = {id(piece): k for k, piece in enumerate(self.pieces)}
        with self._at_work():
            described = self._optimizer.state_dict()
            order = [numbers[id(piece)] for group in self._groups for piece in group]
            entries = {k: carried["state"][number] for k, number in enumerate(order)}
            described["state"] = {k: entry for k, entry in entries.items() if entry is not None}
            self._optimizer.load_state_dict(described)


class _Seen:
    """The pieces as a mitigation sees them; with `Versions`' names. `before`: their values before the last step."""

    def __init__(self, pieces: list[nn.Parameter]) -> None:
        self.parameters, self.keeps = pieces, False
        self.before: list[Tensor] | None = None

    def today(self) -> list[Tensor]:
        """The newest values."""
        return [piece.detach() for piece in self.parameters]

    def weights(self, reading: Any) -> list[Tensor]:
        """Those that the gradient at hand was computed with: one step ago."""
        return self.today() if self.before is None else self.before


def _copied(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x.clone() if isinstance(x, Tensor) else copy.copy(x) for name, x in entry.items()}


def refuse_optimizer(rule: str, optimizer: torch.optim.Optimizer | None) -> None:
    """Raises InvalidChoice for an optimizer that is known not to work on every number by itself."""
    kind = type(optimizer).__name__
    if kind in _NOT_BY_ELEMENT:
        raise InvalidChoice(
            f"{rule} splits the optimizer's work among the replicas number by number, which {kind} does not allow: what it "
            "does to a number depends on others; take SGD, Adam, AdamW or another that works on each by itself."
        )
