"""DiLoCo (Douillard et al., 2023), and streaming DiLoCo (Douillard et al., 2025).

    θ_n   H inner updates from x (AdamW in the paper; its state stays local)
    Δ ← (1/N) Σ_n (x − θ_n)                               the outer gradient
    m ← μ m + Δ;   x ← x − η (Δ + μ m)                    outer SGD with Nesterov momentum, η = 0.7, μ = 0.9
    θ_n ← x

Streaming: the weights are P fragments (`fragments`), fragment p of layers l ≡ p (mod P) in forward order, the p-th that a stage
has exchanged pH/P updates after the first one (P: as many as it has); an exchange takes τ updates (`overlap`), and then

    θ_n ← (1−a) x + a θ_n                                 a: `mixing`, the share of the replica's own weights

x, m, Δ and θ are the fragment's. With τ > 0 and a = 0 what was learned during the exchange is lost to θ_n, though not to the
next Δ's of the paper's a = 0.5.

Limits: H = 1, μ = 0, η = 1, P = 1 is parameter averaging; N = 1 is lookahead with momentum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..chain import Chain
from ..errors import InvalidChoice
from ..flat import flat
from ..rules.outer import nesterov
from ..worker import Worker
from .averaging.exchange import Sends
from .averaging.rule import Averaging
from .averaging.weights import Averaged, Fragment, Rows, in_place
from .base import Properties, Store, Weights
from .slowmo import check_outer


class _Outer(Averaged):
    """outer: (x, m) of each fragment, a row per dtype, from the beginning of training on."""

    rule: DiLoCo
    sends: ClassVar[Sends] = "rows"

    def __init__(self, worker: Worker, chain: Chain, store: Store, rule: DiLoCo) -> None:
        super().__init__(worker, chain, store, rule)
        self._outer: list[list[tuple[Tensor, Tensor]]] | None = None

    def split(self) -> list[list[nn.Parameter]]:
        return fragments(self.chain, self.worker.stage, self.parameters, self.rule.fragments)

    def begin(self) -> list[list[tuple[Tensor, Tensor]]]:
        """From the weights that training begins with."""
        if self._outer is None:
            rows = [flat(fragment.parameters) for fragment in self.fragments]
            self._outer = [[(x, x.new_zeros(len(x))) for x in row] for row in rows]
        return self._outer

    def shared_state(self) -> list[Tensor]:
        return [x for row in self.begin() for pair in row for x in pair]

    def update(self) -> None:
        self.begin()
        super().update()

    def _of(self, fragment: Fragment) -> list[tuple[Tensor, Tensor]]:
        assert self._outer is not None
        return self._outer[self.fragments.index(fragment)]

    def sent(self, fragment: Fragment) -> Rows:
        return [x - theta for (x, _), theta in zip(self._of(fragment), flat(fragment.parameters))]

    def receive(self, fragment: Fragment, mean: Rows, begun: Rows | None) -> None:
        outer, rule = self._of(fragment), self.rule
        for (x, m), gradient in zip(outer, mean):
            nesterov(x, gradient, m, rule.outer_lr, rule.outer_momentum, rule.nesterov)
        for parameter, x in zip(fragment.parameters, in_place(fragment, [x for x, _ in outer])):
            parameter.detach().lerp_(x, 1.0 - rule.mixing)

    def carried(self) -> dict[str, Any]:
        outer = None if self._outer is None else [[list(pair) for pair in row] for row in self._outer]
        return super().carried() | {"outer": outer}

    def load_carried(self, state: Mapping[str, Any]) -> None:
        super().load_carried(state)
        rows = state["outer"]
        self._outer = None if rows is None else [[(x, m) for x, m in row] for row in rows]


def fragments(chain: Chain, stage: int, parameters: list[nn.Parameter], count: int) -> list[list[nn.Parameter]]:
    """The weights of a stage in up to `count` fragments: layer l of the network goes to fragment l mod `count`.

    What is in no layer of the network (heads, and stages known by their shapes only) goes by its place in the stage.
    """
    layer = {id(x): k for k, (_, _, row) in enumerate(chain.layers()) for x in row}
    parts = (chain[stage].body, chain[stage].head)
    own = [
        x for part in parts if part is not None for _, x in part.named_parameters() if x.requires_grad
    ]  # of a ghost: its module's
    layers = [layer.get(id(x)) for x in own] if len(own) == len(parameters) else [None] * len(parameters)
    found: list[list[nn.Parameter]] = [[] for _ in range(count)]
    for place, (x, k) in enumerate(zip(parameters, layers)):
        found[(place if k is None else k) % count].append(x)
    return found


@dataclass(frozen=True, kw_only=True)
class DiLoCo(Averaging):
    """Rounds of local training, whose mean progress an outer optimizer takes as a gradient.

    Args:
        outer_lr, outer_momentum, nesterov: of the outer SGD: η > 0, μ in [0, 1).
        fragments: P ≥ 1 (streaming).
        mixing: a in [0, 1), the share of its own weights that a replica keeps at the end of an exchange.
        period, staggered, overlap, compression: see averaging/rule.py; what is compressed is x − θ_n.
    """

    outer_lr: float = 0.7
    outer_momentum: float = 0.9
    nesterov: bool = True
    fragments: int = 1
    mixing: float = 0.0
    period: int | tuple[int, ...] = 100

    name: ClassVar[str] = "diloco"
    properties: ClassVar[Properties] = Properties(
        title="DiLoCo, streaming DiLoCo (Douillard et al. 2023, 2025)",
        source="METHODS D4",
        barrier="all replicas, every H updates (overlapped: none until the mean is there)",
        bytes="2(N−1)/N Ψ_P / H",
        replicas="differ between averagings",
        result="mean of the replicas",
    )
    shares_data: ClassVar[bool] = True
    reads_layers: ClassVar[bool] = True
    needs_equal_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_outer("outer_lr", self.outer_lr, "outer_momentum", self.outer_momentum)
        if not (isinstance(self.fragments, int) and self.fragments >= 1):
            raise InvalidChoice(f"fragments={self.fragments!r} is not possible; give a whole number of at least 1.")
        if not 0 <= self.mixing < 1:
            raise InvalidChoice(f"mixing={self.mixing} is no share to keep; give a number of at least 0 and below 1.")

    @property
    def channels(self) -> list[str]:
        more = [f"{self.name}/{k}/{half}" for k in range(1, self.fragments) for half in ("parts", "means")]
        return [*super().channels, *more]

    def weights(self, worker: Worker, chain: Chain, store: Store, seed: int) -> Weights:
        return _Outer(worker, chain, store, self)
