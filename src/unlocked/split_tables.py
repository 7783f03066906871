"""Where InfoPro cuts its CIFAR ResNets (Wang et al. 2021; FACTS 1.4), as sizes of stages.

A part is what `cut` leaves whole: the stem, each residual block, the classifier. The paper names the last block of each local
stage by (group, block); here a stage is the number of its parts:

    resnet110, K = 2     (2, 8)                        28, 28
    resnet110, K = 4     (1, 11), (2, 7), (3, 3)       13, 14, 14, 15
    resnet32,  K = 4     (1, 2), (2, 1), (3, 0)         4,  4,  4,  5
    resnet32,  K = 16    the stem, and every block      1 each, the last block with the classifier

The others of K = 2, 4, 8, 16 are not in this library's sources: there the blocks are dealt out as evenly as can be, stage k
ending after ⌊blocks · k / K⌋. The paper also has splits that balance memory: `cut(model, K, like=x, balance="memory")` makes
such.

    cut(model, sizes=split_table("resnet32", 4).sizes, like=x)
"""

from __future__ import annotations

from typing import NamedTuple

from .errors import InvalidChoice, choose

_BLOCKS = {"resnet32": 5, "resnet110": 18}  # per group
_GROUPS = 3
_STAGES = (2, 4, 8, 16)

_ENDS: dict[tuple[str, int], tuple[tuple[int, int], ...]] = {
    ("resnet110", 2): ((2, 8),),
    ("resnet110", 4): ((1, 11), (2, 7), (3, 3)),
    ("resnet32", 4): ((1, 2), (2, 1), (3, 0)),
}


class Split(NamedTuple):
    """`sizes`: parts per stage, as `cut` takes them; `blocks`: residual blocks per stage; `published`: whether it is the
    paper's, not this library's guess."""

    sizes: list[int]
    blocks: list[int]
    published: bool


def split_table(network: str, stages: int) -> Split:
    """The cut of "resnet32" or "resnet110" into 2, 4, 8 or 16 stages. Raises InvalidChoice for any other."""
    choose("network", network, _BLOCKS)
    if stages not in _STAGES:
        raise InvalidChoice(
            f"There are tables for {', '.join(map(str, _STAGES))} stages; given {stages}. Use cut(…, stages=…)."
        )
    per_group = _BLOCKS[network]
    total = _GROUPS * per_group
    if total + 1 == stages:  # the stem is a stage of its own
        blocks = [0] + [1] * total
    else:
        given = _ENDS.get((network, stages))
        ends = (
            [(group - 1) * per_group + block + 1 for group, block in given]
            if given is not None
            else [total * k // stages for k in range(1, stages)]
        )
        blocks = [end - begin for begin, end in zip([0, *ends], [*ends, total])]
    sizes = list(blocks)
    sizes[0] += 1  # the stem
    sizes[-1] += 1  # the classifier
    return Split(sizes, blocks, (network, stages) in _ENDS or total + 1 == stages)
