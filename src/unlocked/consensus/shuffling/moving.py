"""How entries move at an update: drawn alike on every replica, taken out, exchanged, put back.

A layer is drawn from one seed made of (run seed, layer's name, update), so that the draw depends neither on what was before nor
on the cut. What a replica sends to another at an update is one message for each dtype, with the states that move along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ...rng import mix, seed_of
from ...rules.shuffle import chances, hits, permutations
from .layers import Layer, Part


class Place(NamedTuple):
    """Entries `where` (k,) of a tensor, counted as in a row."""

    tensor: Tensor
    where: Tensor


class Message(NamedTuple):
    """What moves of one dtype: the places, the values there in a row (k,), and the owners (N, k) of the new ones."""

    places: list[Place]
    values: Tensor
    owners: Tensor
    channel: str = "wash"

    def put(self, taken: Tensor) -> None:
        """Write the new values (k,)."""
        begin = 0
        for tensor, where in self.places:
            tensor.put_(where, taken[begin : begin + len(where)])
            begin += len(where)


class Shuffle:
    """The draws of a stage. `layers`: what is shuffled; `seed`: the run's; `replicas`: N."""

    def __init__(self, layers: Sequence[Layer], seed: int, replicas: int) -> None:
        self._layers, self._replicas = layers, replicas
        self._seeds = [seed_of(seed, "wash", layer.name) for layer in layers]
        self._parts = [part for layer in layers for part in layer.parts]
        self._begins = list(accumulate((part.tensor.numel() for part in self._parts), initial=0))
        self._edges = torch.tensor(self._begins)
        self._source = torch.Generator()

    def messages(self, update: int, also: Callable[[Tensor], Sequence[Tensor]]) -> list[Message]:
        """What moves after an update, none or one for each dtype. `also(tensor)`: what moves with a tensor beside its own."""
        indices, owners = self._drawn(update)
        edges = torch.searchsorted(indices, self._edges).tolist()
        indices, owners = (x.to(self._parts[0].tensor.device) for x in (indices, owners))
        found: dict[torch.dtype, list[tuple[Place, int, int]]] = {}
        planes = [_moving(part, also) for part in self._parts]
        for depth in range(max(map(len, planes))):  # all weights, then their first states, …: so spans join
            for k, (begin, end) in enumerate(pairwise(edges)):
                if begin < end and depth < len(planes[k]):
                    tensor = planes[k][depth]
                    place = Place(tensor, indices[begin:end] - self._begins[k])
                    found.setdefault(tensor.dtype, []).append((place, begin, end))
        channel = _channel([len(row) for row in planes])
        return [_message(rows, owners, channel) for rows in found.values()]

    def _drawn(self, update: int) -> tuple[Tensor, Tensor]:
        """Indices (k,) among the scalars of all layers in a row, ascending, and owners (N, k)."""
        indices, numbers, begin = [], [], 0
        for layer, seed in zip(self._layers, self._seeds):
            self._source.manual_seed(mix(seed, update))
            count = layer.size
            where = hits(count, layer.p, self._source)
            numbers.append(chances(len(where), self._replicas, self._source))
            indices.append(where.add_(begin))
            begin += count
        return torch.cat(indices), permutations(torch.cat(numbers, dim=1), self._replicas)


def _moving(part: Part, also: Callable[[Tensor], Sequence[Tensor]]) -> list[Tensor]:
    return [part.tensor.detach(), *part.beside, *also(part.tensor)]


def _channel(moving: Sequence[int]) -> str:
    """Named by what moves, where that is not alike for all tensors: so replicas with other states never meet."""
    return "wash" if len(set(moving)) == 1 else f"wash/{seed_of(*moving):x}"


def _message(rows: Sequence[tuple[Place, int, int]], owners: Tensor, channel: str) -> Message:
    places = [place for place, _, _ in rows]
    spans: list[list[int]] = []
    for _, begin, end in rows:
        if spans and spans[-1][1] == begin:
            spans[-1][1] = end
        else:
            spans.append([begin, end])
    columns = [owners[:, begin:end] for begin, end in spans]
    values = torch.cat([place.tensor.take(place.where) for place in places])
    return Message(places, values, columns[0] if len(columns) == 1 else torch.cat(columns, dim=1), channel)
