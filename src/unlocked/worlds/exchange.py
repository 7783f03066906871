"""The exchanges of a group, as programs of one member: what it sends to whom, and in which order it sums.

    mean     a reduce-scatter and a gather. Member r owns the r-th part of the values: it gets that part from all others,
             sums in the order of the replicas, divides, and sends the result to all. 2(N−1)/N of the payload leaves a member.
    take     only entries whose owner is another member travel, from the owner to the taker.
    gather   everybody's tensor to everybody.

The order of the sum does not depend on who is first or where a member lives, so the numbers are the same in every world
(a backend's own all-reduce gives no such promise). Parts of different dtype are reduced one after the other.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ..flat import bounds, by_dtype
from ..rules.mean import ordered_sum


class Member(Protocol):
    """What a program of this file needs: its place among the others, and a way to each."""

    rank: int
    size: int

    def put(self, to: int, x: Tensor) -> None:
        """Send to a member; never waits."""

    def get(self, source: int) -> Awaitable[Tensor]:
        """The next tensor from a member."""


def mean_bytes(tensors: Sequence[Tensor], rank: int, size: int) -> int:
    """Payload bytes that leave member `rank` in a mean: its share of the scatter, and its part to all others."""
    sent = 0
    for positions in by_dtype(tensors):
        count = sum(tensors[position].numel() for position in positions)
        own = count * (rank + 1) // size - count * rank // size  # as `bounds` has it
        sent += (count - own + own * (size - 1)) * tensors[positions[0]].element_size()
    return sent


async def mean(member: Member, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Element-wise mean of each tensor over the members."""
    means: list[Tensor] = list(tensors)
    for positions in by_dtype(tensors):
        flat = await _flat_mean(member, torch.cat([tensors[position].reshape(-1) for position in positions]))
        for position, part in zip(positions, flat.split([tensors[position].numel() for position in positions])):
            means[position] = part.view(tensors[position].shape)
    return means


async def _flat_mean(member: Member, values: Tensor) -> Tensor:
    mine = (await reduce_scatter(member, values)).div_(member.size)
    return torch.cat(await gather(member, mine))


async def reduce_scatter(member: Member, values: Tensor) -> Tensor:
    """This member's part, as `bounds` says, of the sum of everybody's values (k,)."""
    parts = [values[begin:end] for begin, end in pairwise(bounds(len(values), member.size))]
    for other in range(member.size):
        if other != member.rank:
            member.put(other, parts[other])
    rows = [parts[member.rank] if other == member.rank else await member.get(other) for other in range(member.size)]
    return ordered_sum(rows)


def scatter_bytes(values: Tensor, rank: int, size: int) -> int:
    """Payload bytes that leave member `rank` in a reduce-scatter: all but its own part."""
    begin, end = bounds(values.numel(), size)[rank : rank + 2]
    return (values.numel() - (end - begin)) * values.element_size()


async def take(member: Member, values: Tensor, owners: Tensor) -> Tensor:
    """Entry i of the result is entry i of the values of member owners[rank, i]. `owners`: (N, k), alike everywhere."""
    others = [other for other in range(member.size) if other != member.rank]
    for other in others:
        wanted = _positions(owners[other], member.rank)
        if len(wanted):
            member.put(other, values.index_select(0, wanted))
    taken = values.clone()
    for other in others:
        where = _positions(owners[member.rank], other)
        if len(where):
            taken.index_copy_(0, where, await member.get(other))
    return taken


def _positions(row: Tensor, owner: int) -> Tensor:
    """Where `owner` stands in a row (k,), ascending. Indices are faster than a mask, which is turned into them twice."""
    return (row == owner).nonzero().view(-1)


def take_bytes(values: Tensor, owners: Tensor, rank: int) -> int:
    """Payload bytes that leave member `rank`: a permutation, so as many entries leave a member as come to it."""
    return int((owners[rank] != rank).sum()) * values.element_size()


async def gather(member: Member, x: Tensor) -> list[Tensor]:
    """Everybody's tensor, in the order of the members."""
    others = [other for other in range(member.size) if other != member.rank]
    for other in others:
        member.put(other, x)
    return [x if other == member.rank else await member.get(other) for other in range(member.size)]
