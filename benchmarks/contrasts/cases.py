"""What is trained, the most important first; and which orderings the theses find among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

Found = dict[str, Any]  # one run's line in the log
ORACLE = "ORACLE"  # in a case's options: the run of simclr at J = 1 of the same seed


class Case(NamedTuple):
    """A rule of `ul.credit` over J stages. few: an aside, with one seed only."""

    name: str
    stages: int
    rule: str
    options: dict[str, Any] = {}  # noqa: RUF012  # never changed
    few: bool = False

    @property
    def wants_oracle(self) -> bool:
        return ORACLE in self.options.values()


TEACHER = Case("SimCLR", 1, "SimCLR")


def _llm(name: str, stages: int, few: bool = False, **options: Any) -> Case:
    return Case(f"DGSSL-LLM{name}", stages, "DGSSLLLM", {"ratio": 0.95, "oracle": ORACLE, **options}, few)


def cases(stages: list[int]) -> Iterator[Case]:
    """The headline rows for these J, then the ablations at the greatest, then asides."""
    local = sorted(j for j in stages if j > 1)
    deepest = local[-1]
    yield TEACHER
    for j in (deepest, *local[:-1]):
        yield Case("DGSSL", j, "DGSSL")
        yield Case("subsampled", j, "SubsampledSimCLR")
    yield Case("subsampled", 1, "SubsampledSimCLR")
    for j in (deepest, *local[:-1]):
        yield _llm("", j, by="oracle")
    yield Case("DGSSL, 0c2f", deepest, "DGSSL", {"projector": "0c2f"})
    yield Case("oracle", deepest, "OracleSimCLR", {"oracle": ORACLE})
    yield _llm(", decreasing", deepest, by="oracle", order="decreasing")
    yield _llm(", positives only", deepest, by="oracle", positives_only=True)
    for which in ("negatives", "positives"):
        yield Case(f"subsampled, {which}", deepest, "SubsampledSimCLR", {"which": which})
    yield _llm(", own similarities", deepest, few=True, by="own")
    for name, loss in (("Barlow Twins", "barlow-twins"), ("VICReg", "vicreg")):
        yield Case(f"DGSSL, {name}", local[0], "DGSSL", {"loss": loss}, few=True)


# Linear evaluation on CIFAR-10 with a ResNet-50, %. F: Fournier 2024, Tables 3.1 and 3.2 (mean of five); P: Patel 2023, Tables
# 4.1, 4.3 and 4.4.
PUBLISHED = {
    ("SimCLR", 1): "F 92.1 ± 0.2; P 92.56",
    ("subsampled", 1): "F 91.4 ± 0.4",
    ("DGSSL", 4): "F 90.0 ± 0.1; P 91.03",
    ("DGSSL", 8): "F 87.5 ± 0.4; P 88.81",
    ("DGSSL", 16): "F 85.9 ± 0.3; P 87.44",
    ("subsampled", 4): "F 89.9 ± 0.3",
    ("subsampled", 8): "F 88.4 ± 0.4",
    ("subsampled", 16): "F 87.1 ± 0.4",
    ("oracle", 8): "F 89.1 at J = 16 (without: 85.6)",
    ("oracle", 16): "F 89.1 (without: 85.6)",
    ("DGSSL-LLM", 4): "P 91.96",
    ("DGSSL-LLM", 8): "P 90.37",
    ("DGSSL-LLM", 16): "P 89.8",
    ("DGSSL-LLM, decreasing", 8): "P 90.21",
    ("DGSSL-LLM, decreasing", 16): "P 89.15",
    ("DGSSL-LLM, positives only", 8): "P 88.66 at J = 16 (both: 89.8)",
    ("DGSSL-LLM, positives only", 16): "P 88.66",
}


class Ordering(NamedTuple):
    """A thesis finds `measure` greater for `more`, a (name, J), than for `less`."""

    claim: str
    source: str
    more: tuple[str, int]
    less: tuple[str, int]
    measure: str = "probe"


def orderings(stages: list[int]) -> Iterator[Ordering]:
    """Those that concern what `cases` trains."""
    local = sorted(j for j in stages if j > 1)
    deepest = local[-1]
    base, falls = ("SimCLR", 1), "accuracy falls with J"
    fewer = [(base, ("DGSSL", deepest)), *pairwise([base, *(("DGSSL", j) for j in local)])]
    for before, after in dict.fromkeys(fewer):  # of one J above 1 the two are the same
        yield Ordering(falls, "F T3.2, P T4.1", before, after)
    yield Ordering("subsampling helps a deep split", "F T3.2", ("subsampled", deepest), ("DGSSL", deepest))
    yield Ordering("subsampling costs accuracy end to end", "F T3.2", base, ("subsampled", 1))
    for j in local:
        yield Ordering("DGSSL-LLM beats DGSSL", "P T4.1", ("DGSSL-LLM", j), ("DGSSL", j))
    llm, both = ("DGSSL-LLM", deepest), ("subsampled", deepest)
    yield Ordering("increasing difficulty beats decreasing", "P T4.3", llm, ("DGSSL-LLM, decreasing", deepest))
    yield Ordering("both kinds of pairs beat positives only", "P T4.4", llm, ("DGSSL-LLM, positives only", deepest))
    yield Ordering("both kinds of pairs beat positives only", "F Fig. 3.6", both, ("subsampled, positives", deepest))
    yield Ordering("both kinds of pairs beat negatives only", "F Fig. 3.6", both, ("subsampled, negatives", deepest))
    yield Ordering("an oracle helps a deep split", "F T3.1 (J = 16)", ("oracle", deepest), ("DGSSL", deepest))
    yield Ordering("1c2f beats 0c2f", "P Fig. 4.4", ("DGSSL", deepest), ("DGSSL, 0c2f", deepest))
    collapses, raises = "local learning loses dimensions", "subsampling raises dimensionality"
    yield Ordering(collapses, "F Fig. 3.3", base, ("DGSSL", deepest), "rank")
    yield Ordering(raises, "F Fig. 3.3", both, ("DGSSL", deepest), "rank")
    yield Ordering(raises + " end to end", "F Fig. 3.3", ("subsampled", 1), base, "rank")
    yield Ordering("local features are better early", "F Fig. 3.5, P Fig. 4.7", ("DGSSL", deepest), base, "early")
    yield Ordering("negatives are lost with depth", "F Fig. 3.4", both, both, "negatives, first - last stage")
    yield Ordering("negatives are lost in training", "F Fig. 3.4", both, both, "negatives, first - last epoch")


def _negatives(row: Found, epoch: int, stage: int) -> float:
    return row["kept"][epoch]["negatives kept"][stage]


MEASURES: dict[str, tuple[str, Callable[[Found], float]]] = {
    "probe": ("% of the linear probe", lambda row: 100 * row["depths"][-1]["probe"]),
    "rank": ("effective rank at the last depth", lambda row: row["depths"][-1]["rank"]),
    "early": ("% of the linear probe after a quarter of the blocks", lambda row: 100 * early(row)),
    "negatives, first - last stage": (
        "% of negatives kept, first less last stage, in the last epoch",
        lambda row: 100 * (_negatives(row, -1, 0) - _negatives(row, -1, -1)),
    ),
    "negatives, first - last epoch": (
        "% of negatives kept, first less last epoch, at the last stage",
        lambda row: 100 * (_negatives(row, 0, -1) - _negatives(row, -1, -1)),
    ),
}


def early(row: Found) -> float:
    """The probe's accuracy after a quarter of the blocks."""
    return row["depths"][len(row["depths"]) // 4 - 1]["probe"]
