"""Heads that read weights of another stage, which go on changing there.

    the lender s sends θ^s at the start of its step t, as it is after t updates        if t mod period = 0
    the borrower j takes it at the start of its own step t

A head says what it reads by being, or holding, a `Borrower`. The weights travel as messages, on channel "lent", so every world
gives the same numbers. No gradient goes back, and the lender's weights are never changed by the borrower.

Limits: with period 1 a stage cannot begin step t before the lender has ended step t − 1: a lock from above that local learning
had got rid of. With a longer period that happens in one step of `period` only, and what is read is up to period − 1 updates
old.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..chain import Chain, Loan, Stage
from ..consensus.base import Consensus, Weights
from ..errors import InvalidChoice
from ..flat import blank, by_dtype, flat, views
from ..work import work
from ..worker import Link, Place, Worker


class Borrower(nn.Module, ABC):
    """A part of a head that reads weights of the stage `source`, in every step whose number `period` divides."""

    source: int
    period: int
    needs_news: ClassVar[bool] = True  # False: it is of use if nothing ever comes

    @abstractmethod
    def wanted(self, source: Stage) -> list[str]:
        """The names, in the source's stage, of the parameters and buffers it reads."""

    @abstractmethod
    def receive(self, lent: Sequence[Tensor]) -> None:
        """They have come, in the order and the shapes of `wanted`. Must copy what it keeps."""


def borrower_of(stage: Stage) -> Borrower | None:
    """The borrowing part of a stage's head, if it has one. Raises InvalidChoice if it has several."""
    found = [] if stage.head is None else [part for part in stage.head.modules() if isinstance(part, Borrower)]
    if len(found) > 1:
        raise InvalidChoice(f"A head has {len(found)} parts that read another stage's weights; one is possible.")
    return found[0] if found else None


def arrange_loans(chain: Chain) -> None:
    """Note on every stage what it lends to whom, and what it borrows. Raises InvalidChoice for a stage that is not there."""
    for stage in chain:
        stage.lends, stage.borrows = (), None
    for j, stage in enumerate(chain):
        if (borrower := borrower_of(stage)) is None:
            continue
        if not 0 <= borrower.source < len(chain) or borrower.source == j:
            raise InvalidChoice(
                f"The head of stage {j} reads weights of stage {borrower.source}; it must be another one of {len(chain)}."
            )
        source = chain[borrower.source]
        names = borrower.wanted(source)
        likes = [tensors_of(source)[name].detach().to("meta") for name in names]
        loan = Loan(j, borrower.source, borrower.period, tuple(names), tuple(likes))
        source.lends, stage.borrows = (*source.lends, loan), loan


def check_loans(chain: Chain, consensus: Consensus) -> None:
    """Raises InvalidChoice under a rule that puts a stage's weights into place only when its forward reads them."""
    if consensus.in_a_row and any(stage.borrows is not None for stage in chain):
        raise InvalidChoice(
            f"A head here reads another stage's weights at the start of a step, but under {consensus.name} those of a step are "
            "not in place before its forward; take a head of its own, or another rule for the replicas."
        )


async def exchange(worker: Worker, stage: Stage, batch: Batch, weights: Weights) -> None:
    """At the start of a step: lend what others read of this stage, take what its own head reads."""
    step, part = divmod(batch.number, weights.store.accumulate)
    if part:
        return
    for loan in stage.lends:
        if step % loan.period == 0:
            for row in weights.move(lent, stage, loan):
                await Link(worker, Place(worker.replica, loan.borrower)).send("lent", row)
    debt = stage.borrows
    if debt is not None and step % debt.period == 0:
        link = Link(worker, Place(worker.replica, debt.lender))
        rows = [await link.recv("lent") for _ in by_dtype(debt.likes)]
        weights.move(receive, stage, debt, rows)


@work(gives=lambda weights, stage, loan: blank(loan.likes))
def lent(stage: Stage, loan: Loan) -> list[Tensor]:
    """What is lent, as rows of values."""
    named = tensors_of(stage)
    return flat([named[name] for name in loan.names])


@work()
@torch.no_grad()
def receive(stage: Stage, loan: Loan, rows: Sequence[Tensor]) -> None:
    """Hand it to the head."""
    borrower = borrower_of(stage)
    assert borrower is not None
    borrower.receive(views(rows, loan.likes))


def tensors_of(stage: Stage) -> dict[str, Tensor]:
    """Parameters and buffers by their names in the stage."""
    return {**dict(stage.named_parameters()), **dict(stage.named_buffers())}
