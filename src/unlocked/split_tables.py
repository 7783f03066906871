"""Where published experiments cut their networks, as sizes of stages.

A part is what `cut` leaves whole: the stem, each residual block or layer, the classifier (an encoder has none). The papers name
the last block of each stage by (group, block); here a stage is the number of its parts. Of networks with a classifier:

    network    K                      last blocks, (group from 1, block from 0)                    from
    resnet110  2, 4                   (2, 8); (1, 11), (2, 7), (3, 3)          28, 28; 13, 14, 14, 15    W, P
    resnet110  3, 8, 16               in the table below                                            P (after W)
    resnet32   4                      (1, 2), (2, 1), (3, 0)                   4, 4, 4, 5              W
    resnet32   16                     every block; the stem is a stage of its own                   W
    resnet50   2, 3                   (3, 0); (2, 1), (3, 3)                                        P
    resnet50   4, 8, 16               in the table below; 16: every block                           P and F
    resnet18   8                      every block                                                   F
    vgg6a, vgg16a, vgg19a   5, 14, 17     every layer, the last with the classifier                 P

    W  Wang et al. 2021 (InfoPro; FACTS 1.4)    P  Patel's thesis, §4.3.1 and Figure A.1
    F  Fournier's thesis, Table A.1 and A.2; it counts blocks from 1 and names the same places as P

F's text counts 2 blocks in the last group of a ResNet-50, which has 3, and 15 places make the 16 stages it trains: they are
after every block but the last.

The others of K = 2, 4, 8, 16 for InfoPro's CIFAR ResNets are not in this library's sources: there the blocks are dealt out as
evenly as can be, stage k ending after ⌊blocks · k / K⌋. The InfoPro paper also has splits that balance memory: `cut(model, K,
like=x, balance="memory")` makes such.

    cut(model, 8, like=x, balance="published")              on the command line: --balance published
    cut(model, sizes=split_table("resnet32", 4).sizes, like=x)
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from .errors import InvalidChoice, choose

_BLOCKS: dict[str, tuple[int, ...]] = {  # per group; of a VGG its layers below the classifier
    "resnet18": (2, 2, 2, 2),
    "resnet32": (5, 5, 5),
    "resnet50": (3, 4, 6, 3),
    "resnet110": (18, 18, 18),
    "vgg6a": (5,),
    "vgg16a": (14,),
    "vgg19a": (17,),
}
_GUESSED = {"resnet32": (2, 4, 8, 16), "resnet110": (2, 4, 8, 16)}

_ENDS: dict[tuple[str, int], tuple[tuple[int, int], ...]] = {
    ("resnet110", 2): ((2, 8),),
    ("resnet110", 3): ((1, 17), (2, 17)),
    ("resnet110", 4): ((1, 11), (2, 7), (3, 3)),
    ("resnet110", 8): ((1, 4), (1, 11), (2, 0), (2, 7), (2, 14), (3, 3), (3, 10)),
    ("resnet110", 16): (
        *((1, block) for block in (1, 4, 7, 10, 13, 16)),
        *((2, block) for block in (1, 4, 7, 11, 15)),
        *((3, block) for block in (1, 5, 9, 13)),
    ),
    ("resnet32", 4): ((1, 2), (2, 1), (3, 0)),
    ("resnet50", 2): ((3, 0),),
    ("resnet50", 3): ((2, 1), (3, 3)),
    ("resnet50", 4): ((2, 0), (3, 0), (3, 4)),
    ("resnet50", 8): ((1, 1), (2, 0), (2, 2), (3, 0), (3, 2), (3, 4), (4, 0)),
}
_EVERY = {("resnet50", 16), ("resnet18", 8), ("vgg6a", 5), ("vgg16a", 14), ("vgg19a", 17)}


class Split(NamedTuple):
    """`sizes`: parts per stage, as `cut` takes them; `blocks`: residual blocks (of a VGG: layers) per stage; `published`:
    whether it is a paper's, not this library's guess."""

    sizes: list[int]
    blocks: list[int]
    published: bool


def split_table(network: str, stages: int, encoder: bool = False) -> Split:
    """The cut of a network into this many stages; `encoder`: of the network without its classifier (ul.models.encoder).

    Raises InvalidChoice for a network or a number of stages that no table has.
    """
    choose("network with published cuts", network, _BLOCKS)
    known = sorted({k for name, k in {*_ENDS, *_EVERY} if name == network} | set(_GUESSED.get(network, ())))
    if stages not in known:
        raise InvalidChoice(
            f"There are tables for {network} in {', '.join(map(str, known))} stages; given {stages}. Use cut(…, stages=…), "
            "which balances them itself."
        )
    groups, total = _BLOCKS[network], sum(_BLOCKS[network])
    stem_alone = network == "resnet32" and total + 1 == stages
    published = stem_alone or (network, stages) in _ENDS or (network, stages) in _EVERY
    if (network, stages) in _ENDS:
        ends = [sum(groups[: group - 1]) + block + 1 for group, block in _ENDS[network, stages]]
    else:
        even = stages - 1 if stem_alone else stages
        ends = [0] * stem_alone + [total * k // even for k in range(1, even)]
    blocks = [end - begin for begin, end in pairwise([0, *ends, total])]
    sizes = list(blocks)
    sizes[0] += network.startswith("resnet")  # the stem
    sizes[-1] += not encoder  # the classifier
    return Split(sizes, blocks, published)
