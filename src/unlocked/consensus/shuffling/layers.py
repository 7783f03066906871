"""Which tensors of a stage are shuffled, and how often: WASH's layers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...chain import Chain, Stage
from ...errors import InvalidChoice
from ...rules.shuffle import Schedule, layer_probability


class Part(NamedTuple):
    """A tensor that is shuffled; entries of `beside`, tensors of its shape, move with its own."""

    tensor: Tensor
    beside: tuple[Tensor, ...] = ()


class Layer(NamedTuple):
    """`name`: for the seed, the same for every cut of the network; p_l; what is shuffled of the layer."""

    name: str
    p: float
    parts: list[Part]

    @property
    def size(self) -> int:
        """Scalars d_l."""
        return sum(part.tensor.numel() for part in self.parts)


@dataclass(frozen=True)
class Selection:
    """What is shuffled: the arguments of WASH. affine: BatchNorm's weights and biases are; statistics: its running ones are."""

    p: float
    schedule: Schedule
    layers: str
    affine: bool
    statistics: bool
    only: str | None
    skip: str | None

    def takes(self, name: str) -> bool:
        """Whether the tensor of this name is shuffled."""
        wanted = self.only is None or re.search(self.only, name) is not None
        return wanted and (self.skip is None or re.search(self.skip, name) is None)


def layers_of(chain: Chain, selection: Selection, stage: int) -> list[Layer]:
    """The layers of a stage that are ever shuffled: those of its body, and its head, which goes like the last of them."""
    names, rows = _names(chain, stage), _rows(chain, selection, stage)
    untouched = set() if selection.affine else {id(x) for norm in _norms(chain[stage]) for x in norm.parameters()}
    layers = [Layer(name, p, []) for name, p, _ in rows]
    for layer, (_, _, tensors) in zip(layers, rows):
        free = (x for x in tensors if x.requires_grad and id(x) not in untouched)
        layer.parts.extend(Part(x) for x in free if selection.takes(names[id(x)]))
    if selection.statistics and layers:
        for k, part in _statistics(chain[stage], [tensors for _, _, tensors in rows]):
            if selection.takes(names.get(id(part.tensor), "")):
                layers[k].parts.append(part)
    return [layer for layer in layers if layer.p > 0.0 and layer.parts]


def refuse_an_empty_selection(chain: Chain, selection: Selection) -> None:
    """Raises InvalidChoice if names are given and nothing of the whole network is selected."""
    if not isinstance(chain, Chain) or (selection.only is None and selection.skip is None):
        return  # where nothing is computed only the worker's own stage is known
    always = replace(selection, p=1.0, schedule="constant")
    if not any(layers_of(chain, always, stage) for stage in range(len(chain))):
        raise InvalidChoice(
            f"Nothing is left to shuffle with only={selection.only!r} and skip={selection.skip!r}; names are like "
            f"{', '.join(name for name, _, _ in chain.names[:3])}. Give regular expressions that find a part of such names."
        )


def of_head(stage: int, inside: str) -> str:
    """What a tensor of a head is called in `only` and `skip`."""
    return f"stages.{stage}.head.{inside}"


def _names(chain: Chain, stage: int) -> dict[int, str]:
    """The names of a stage's tensors, by their identity."""
    user = {(j, inside): name for name, j, inside in chain.names}
    body, head = chain[stage].body, chain[stage].head
    buffers = body.named_buffers() if isinstance(body, nn.Module) else ()  # a ghost has none
    names = {
        id(x): user.get((stage, inside), inside) for inside, x in itertools.chain(body.named_parameters(), buffers)
    }
    if head is not None:
        names |= {id(x): of_head(stage, inside) for inside, x in (*head.named_parameters(), *head.named_buffers())}
    return names


def _rows(chain: Chain, selection: Selection, stage: int) -> list[tuple[str, float, list[nn.Parameter]]]:
    """(name, p_l, parameters) of the stage's layers and its head; l and L count those of the whole network."""
    names, every = _names(chain, stage), chain.layers(selection.layers)
    rows = [
        (names[id(own[0])], layer_probability(selection.p, index, len(every), selection.schedule), own)
        for index, (j, _, own) in enumerate(every)
        if j == stage
    ]
    head = chain[stage].head
    if head is not None:
        rows.append((f"head {stage}", rows[-1][1] if rows else 0.0, list(head.parameters())))
    return rows


def _norms(stage: Stage) -> Iterator[_BatchNorm]:
    return (module for module in stage.modules() if isinstance(module, _BatchNorm))


def _statistics(stage: Stage, rows: list[list[nn.Parameter]]) -> Iterator[tuple[int, Part]]:
    """(row, mean with variance) of every BatchNorm: in the row of its weights, or of those before it if it has none.

    A channel's mean and variance move together: apart they would describe no distribution.
    """
    places = {id(x): k for k, own in enumerate(rows) for x in own}
    k = 0
    for module in stage.modules():
        for x in module.parameters(recurse=False):
            k = places.get(id(x), k)
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            yield k, Part(module.running_mean, (module.running_var,))
