"""Asynchronous gossip SGD: AD-PSGD (Lian et al., 2018) on any graph (Oyallon §5.4, Eq. 5.22 with η = 0; FACTS 2.4).

    dx_i = −½ Σ_j (x_i − x_j) dM_ij(t) + Δ_i dN_i(t)

x_i weights of replica i; M_ij a Poisson clock of the edge (i, j), λ_ij exchanges per gradient; Δ_i what its optimizer does with
the gradient that has just been computed. Gradients and exchanges go on at the same time: a gradient is of the weights as they
were when it began (gossiping/weights.py). Exchanges leave the mean of the weights where it is. The optimizer's state is not
exchanged; BatchNorm's statistics are with the policy `batchnorm="average"`, as weights.

Limits: a graph of one replica is ordinary training; with a learning rate of 0 it is randomized gossip (graphs/gossip), whose
distance to the mean decays as e^{−t/2χ₁}. A²CiD² (acid.py) with η = 0 is this rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..chain import Chain
from ..errors import InvalidChoice, choose
from ..graphs import Graph
from ..worker import Worker
from .base import Properties, Store, Weights
from .gossiping.available import Available
from .gossiping.observing import summary, usage
from .gossiping.rule import OnGraph
from .gossiping.weights import Gossiped

Pairing = Literal["clocks", "available"]


@dataclass(frozen=True, kw_only=True)
class Gossip(OnGraph):
    """Average with one neighbour at a time, while the gradient is computed.

    Args:
        graph, rates, rate: see gossiping/rule.py.
        pairing: who meets whom. "clocks": as drawn before, so that the numbers are the same in every world, but a slow replica
            keeps its neighbours waiting. "available": whoever is free; nobody waits, and a fast replica does more of the
            batches; for processes, and the simulated clock.
    """

    pairing: Pairing = "clocks"

    name: ClassVar[str] = "gossip"
    properties: ClassVar[Properties] = Properties(
        title="Asynchronous gossip (Lian et al. 2018)",
        source="O §5.4",
        barrier="none; pairs of neighbours",
        bytes="λ Ψ_P, λ exchanges per gradient",
        replicas="differ, close to their mean",
        result="mean of the replicas",
    )
    needs_equal_start: ClassVar[bool] = True
    observes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("pairing", self.pairing, ("clocks", "available"))

    @property
    def free(self) -> bool:
        return self.pairing == "available"

    def check(self, credit: Any, accumulate: int) -> None:
        """Raises InvalidChoice: gradients of earlier updates under replicas that run freely."""
        if self.free and credit.crossing:
            raise InvalidChoice(
                f"{self.name}(pairing='available') goes with rules whose gradients come within a step, but those of "
                f"{credit.name} come later; take pairing='clocks'."
            )

    def told(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        replicas = len({row["replica"] for row in rows})
        return summary(rows) | usage(self.graph_of(replicas), rows)

    def parameters(self, graph: Graph) -> tuple[float, float]:
        """(η, α̃) on this graph. Here: no momentum."""
        return 0.0, 0.5

    def weights(self, worker: Worker, chain: Chain, store: Store, seed: int) -> Weights:
        return (Available if self.free else Gossiped)(worker, chain, store, self, seed)
