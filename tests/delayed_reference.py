"""Delayed pipelines, one micro-batch after the other, in float64: what every way of running them must agree with.

Written from the formulas with plain matrix products: no autograd, no torch.optim, nothing of the library.

A network is J stages, a stage a row of layers by name with its weights in the order of `Module.parameters()`:

    linear      h ↦ h Wᵀ + b                                    weights W, b
    matrix      h ↦ h Wᵀ                                        weight W
    tanh        h ↦ tanh h
    duplicate   h ↦ (h, h), two streams side by side in the last dimension
    coupling    (x, x̃) ↦ (x̃ + F(x), x),  F(x) = tanh(x Wᵀ + b)  weights W, b; inverse: (p, q) ↦ (q, p − F(q))

The last stage's output are logits; the loss is the mean cross-entropy of a micro-batch.

Micro-step s = 0, 1, 2, …: the forward of micro-batch s through all stages, each with its own current weights; then
stage j does the backward of its oldest micro-batch if more than D_j = hop · (J − 1 − j) are in flight, so that of
micro-batch m at micro-step m + D_j. hop = 1: PipeDream, DDG, features replay; 2: FDG, PETRA; 0: backpropagation. The
mean of k gradients of a stage makes one update of it.

What a backward sees (`semantics`), where W_F, W_B are the weights at the micro-batch's forward and at its backward:

    stash     activations of the forward, W_F
    current   activations of the forward, W_B
    replay    the stage's input of the forward, the rest anew with W_B
    reverse   as replay, but a stage of couplings only rebuilds its input from its output, which comes with the gradient
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Weights = list[Tensor]
Batch = tuple[Tensor, Tensor]  # inputs (B, features) float64, classes (B,) int64
Semantics = Literal["stash", "current", "replay", "reverse"]
Transform = Callable[[int, Weights, int, Weights], Weights]
Predict = Callable[[int, Weights, list[dict[str, Tensor]], int], Weights]
COUNT = {"linear": 2, "matrix": 1, "tanh": 0, "duplicate": 0, "coupling": 2}


@dataclass(frozen=True)
class Network:
    """`layers[j]`: names of stage j's layers. `weights[j]`: its tensors, in order; never changed in place."""

    layers: list[list[str]]
    weights: list[Weights]


@dataclass(frozen=True)
class SGD:
    """v ← μv + g + λθ (v = 0 at first);  θ ← θ − γv, with Nesterov's θ ← θ − γ(g + λθ + μv)."""

    rate: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def step(self, theta: Tensor, g: Tensor, state: dict[str, Tensor], count: int) -> Tensor:
        g = g + self.weight_decay * theta
        state["v"] = v = self.momentum * state.get("v", torch.zeros_like(g)) + g
        return theta - self.rate * (g + self.momentum * v if self.nesterov else v)


@dataclass(frozen=True)
class Adam:
    """m ← β1 m + (1 − β1) g;  u ← β2 u + (1 − β2) g²;  θ ← θ − γ [m / (1 − β1^n)] / (√(u / (1 − β2^n)) + ε).

    Weight decay λ adds λθ to g or, `decoupled` (AdamW), begins with θ ← θ − γλθ.
    """

    rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False

    def step(self, theta: Tensor, g: Tensor, state: dict[str, Tensor], count: int) -> Tensor:
        if self.decoupled:
            theta = theta - self.rate * self.weight_decay * theta
        else:
            g = g + self.weight_decay * theta
        zero = torch.zeros_like(g)
        state["m"] = m = self.betas[0] * state.get("m", zero) + (1 - self.betas[0]) * g
        state["u"] = u = self.betas[1] * state.get("u", zero) + (1 - self.betas[1]) * g * g
        m, u = m / (1 - self.betas[0] ** count), u / (1 - self.betas[1] ** count)
        return theta - self.rate * m / (u.sqrt() + self.epsilon)


@dataclass
class Result:
    """What a run leaves. Lists are by stage.

    weights: after the last update. staleness: per micro-batch, updates of the stage between its forward and the update
    that its gradient enters. gradients: per micro-batch, before `transform` and without the factor 1/k. updates: how
    many. losses: per micro-batch, at its forward (one list, not by stage).
    """

    weights: list[Weights]
    staleness: list[list[int]]
    gradients: list[list[Weights]]
    updates: list[int]
    losses: list[float]


# ---- one layer, one stage --------------------------------------------------------------------------------------------


def layer_forward(kind: str, w: Weights, h: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The layer's output and what its backward needs."""
    if kind == "linear":
        return h @ w[0].T + w[1], (h,)
    if kind == "matrix":
        return h @ w[0].T, (h,)
    if kind == "tanh":
        h = torch.tanh(h)
        return h, (h,)
    if kind == "duplicate":
        return torch.cat([h, h], dim=-1), ()
    x, tilde = h.chunk(2, dim=-1)
    f = torch.tanh(x @ w[0].T + w[1])
    return torch.cat([tilde + f, x], dim=-1), (x, f)


def layer_backward(kind: str, w: Weights, saved: tuple[Tensor, ...], d: Tensor) -> tuple[Tensor, Weights]:
    """From the gradient `d` at the layer's output: that at its input, and those of its weights."""
    if kind == "linear":
        return d @ w[0], [d.T @ saved[0], d.sum(dim=0)]
    if kind == "matrix":
        return d @ w[0], [d.T @ saved[0]]
    if kind == "tanh":
        return d * (1 - saved[0] ** 2), []
    upper, lower = d.chunk(2, dim=-1)
    if kind == "duplicate":
        return upper + lower, []
    x, f = saved
    a = upper * (1 - f**2)
    return torch.cat([lower + a @ w[0], upper], dim=-1), [a.T @ x, a.sum(dim=0)]


def split(layers: list[str], weights: Weights) -> list[tuple[str, Weights]]:
    """Each layer with its own weights."""
    parts, i = [], 0
    for kind in layers:
        parts.append((kind, weights[i : i + COUNT[kind]]))
        i += COUNT[kind]
    return parts


def stage_forward(layers: list[str], weights: Weights, h: Tensor) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """The stage's output and what each of its layers saves."""
    saved = []
    for kind, w in split(layers, weights):
        h, kept = layer_forward(kind, w, h)
        saved.append(kept)
    return h, saved


def stage_backward(
    layers: list[str], weights: Weights, saved: list[tuple[Tensor, ...]], d: Tensor
) -> tuple[Tensor, Weights]:
    """The gradient at the stage's input, and those of its weights in their order."""
    gradients: Weights = []
    for (kind, w), kept in reversed(list(zip(split(layers, weights), saved))):
        d, own = layer_backward(kind, w, kept, d)
        gradients = own + gradients
    return d, gradients


def stage_inverse(layers: list[str], weights: Weights, h: Tensor) -> Tensor:
    """The input of a stage of couplings, from its output."""
    for _, w in reversed(split(layers, weights)):
        p, q = h.chunk(2, dim=-1)
        h = torch.cat([q, p - torch.tanh(q @ w[0].T + w[1])], dim=-1)
    return h


def reversible(layers: list[str]) -> bool:
    return all(kind == "coupling" for kind in layers)


def cross_entropy(logits: Tensor, y: Tensor) -> tuple[float, Tensor]:
    """The mean over the micro-batch, and its gradient at the logits: (softmax − one-hot) / B."""
    shifted = logits - logits.max(dim=-1, keepdim=True).values
    log_p = shifted - shifted.exp().sum(dim=-1, keepdim=True).log()
    one_hot = torch.zeros_like(logits)
    one_hot[torch.arange(len(y)), y] = 1.0
    return float(-(log_p * one_hot).sum() / len(y)), (log_p.exp() - one_hot) / len(y)


# ---- the pipeline ----------------------------------------------------------------------------------------------------


@dataclass
class InFlight:
    """A micro-batch at a stage between its forward and its backward."""

    number: int
    x: Tensor
    saved: list[tuple[Tensor, ...]]
    weights: Weights
    version: int


@dataclass
class Stage:
    layers: list[str]
    weights: Weights
    state: list[dict[str, Tensor]]
    version: int = 0
    in_flight: deque[InFlight] = field(default_factory=deque)
    summed: Weights | None = None
    pending: int = 0
    messages: dict[int, tuple[Tensor | None, Tensor]] = field(default_factory=dict)  # from above: (output, gradient)
    staleness: list[int] = field(default_factory=list)
    gradients: list[Weights] = field(default_factory=list)


class _Pipeline:
    def __init__(
        self,
        network: Network,
        semantics: Semantics,
        k: int,
        optimizer: SGD | Adam,
        shrink: float,
        transform: Transform | None,
        predict: Predict | None,
    ) -> None:
        self.stages = [Stage(names, list(w), [{} for _ in w]) for names, w in zip(network.layers, network.weights)]
        self.semantics, self.k, self.optimizer, self.shrink = semantics, k, optimizer, shrink
        self.transform, self.predict = transform, predict
        self.plain = 0  # micro-batches below this number are of the warm-up
        self.losses: list[float] = []

    def forward(self, s: int, batch: Batch) -> None:
        h, y = batch
        for j, stage in enumerate(self.stages):
            x, weights = h, stage.weights
            if self.predict is not None:
                weights = self.predict(j, weights, stage.state, stage.version)
            h, saved = stage_forward(stage.layers, weights, x)
            stage.in_flight.append(InFlight(s, x, saved, weights, stage.version))
        loss, d = cross_entropy(h, y)
        self.losses.append(loss)
        self.stages[-1].messages[s] = (None, d)

    def backward(self, j: int) -> None:
        """Of the oldest micro-batch in flight at stage j, and the update if it is the k-th."""
        stage = self.stages[j]
        oldest = stage.in_flight.popleft()
        output, d = stage.messages.pop(oldest.number)
        if j < len(self.stages) - 1 and oldest.number >= self.plain:
            d = self.shrink * d
        x = oldest.x
        if self.semantics == "stash":
            below, gradients = stage_backward(stage.layers, oldest.weights, oldest.saved, d)
        elif self.semantics == "current":
            below, gradients = stage_backward(stage.layers, stage.weights, oldest.saved, d)
        else:
            if self.semantics == "reverse" and reversible(stage.layers):
                assert output is not None, "the last stage is not made of couplings"
                x = stage_inverse(stage.layers, stage.weights, output)
            _, saved = stage_forward(stage.layers, stage.weights, x)
            below, gradients = stage_backward(stage.layers, stage.weights, saved, d)
        if j > 0:
            self.stages[j - 1].messages[oldest.number] = (x, below)
        self.collect(j, gradients, oldest)

    def collect(self, j: int, gradients: Weights, oldest: InFlight) -> None:
        stage = self.stages[j]
        tau = stage.version - oldest.version
        stage.staleness.append(tau)
        stage.gradients.append(gradients)
        if self.transform is not None:
            drift = [now - then for now, then in zip(stage.weights, oldest.weights)]
            gradients = self.transform(j, gradients, tau, drift)
        shares = [g / self.k for g in gradients]
        stage.summed = shares if stage.summed is None else [a + b for a, b in zip(stage.summed, shares)]
        stage.pending += 1
        if stage.pending == self.k:
            self.update(stage, stage.summed)
            stage.summed, stage.pending = None, 0

    def update(self, stage: Stage, gradients: Weights) -> None:
        stage.version += 1
        stage.weights = [
            self.optimizer.step(theta, g, state, stage.version)
            for theta, g, state in zip(stage.weights, gradients, stage.state)
        ]


def run(
    network: Network,
    batches: Sequence[Batch],
    *,
    hop: int,
    semantics: Semantics,
    k: int = 1,
    optimizer: SGD | Adam = SGD(),
    shrink: float = 1.0,
    backward_first: bool = False,
    warm_up: int = 0,
    drain: bool = True,
    transform: Transform | None = None,
    predict: Predict | None = None,
) -> Result:
    """Train `network` on one micro-batch per micro-step.

    k: micro-batches per update of a stage; what is left of them at the end makes no update.
    shrink: β of FDG; a stage multiplies by it the gradient that comes from above, so that stage j sees β^(J−1−j) of it.
    backward_first: FDG's order; a stage with D_j > 0 begins a micro-step with the backward of its oldest micro-batch if
    D_j are in flight, updates, and then does its forward. So its forwards see one update more.
    warm_up: updates done as plain backpropagation first: for the first warm_up · k micro-batches D_j = 0 and β = 1.
    drain: whether micro-batches in flight at the end still get their backwards.
    transform: called as transform(stage, gradients, tau, drift) for each micro-batch; gives the gradients to be summed.
    `tau`: its staleness. `drift`: weights at the backward less those its forward used.
    predict: called as predict(stage, weights, states, updates) before each forward; gives the weights the forward uses.
    `states`: of the optimizer, per weight: "v", or "m" and "u"; empty before the first update.
    """
    pipeline = _Pipeline(network, semantics, k, optimizer, shrink, transform, predict)
    pipeline.plain = warm_up * k
    top = len(pipeline.stages) - 1
    downwards = range(top, -1, -1)
    for s, batch in enumerate(batches):
        delays = [0 if s < pipeline.plain else hop * (top - j) for j in range(top + 1)]
        early = [j for j in downwards if backward_first and delays[j] > 0]
        for j in early:
            if len(pipeline.stages[j].in_flight) >= delays[j]:
                pipeline.backward(j)
        pipeline.forward(s, batch)
        for j in downwards:
            if j not in early and len(pipeline.stages[j].in_flight) > delays[j]:
                pipeline.backward(j)
    if drain:
        for j in downwards:
            while pipeline.stages[j].in_flight:
                pipeline.backward(j)
    return _result(pipeline)


def two_versions(
    network: Network,
    batches: Sequence[Batch],
    *,
    micro_batches: int,
    optimizer: SGD | Adam = SGD(),
) -> Result:
    """PipeDream-2BW: θ_{t+1} = OPT(θ_t, 1/m Σ_b ∇ℓ(b, θ_{t−1})), θ_{−1} = θ_0, m = `micro_batches` per update.

    The whole network at once; micro-batches left over at the end make no update.
    """
    pipeline = _Pipeline(network, "stash", micro_batches, optimizer, 1.0, None, None)
    downwards = range(len(pipeline.stages) - 1, -1, -1)
    before = now = [stage.weights for stage in pipeline.stages]
    for s, batch in enumerate(batches):
        for stage, weights in zip(pipeline.stages, before):
            stage.weights, stage.version = weights, max(0, s // micro_batches - 1)
        pipeline.forward(s, batch)
        for stage, weights in zip(pipeline.stages, now):
            stage.weights, stage.version = weights, s // micro_batches
        for j in downwards:
            pipeline.backward(j)
        if (s + 1) % micro_batches == 0:
            before, now = now, [stage.weights for stage in pipeline.stages]
    return _result(pipeline)


def _result(pipeline: _Pipeline) -> Result:
    return Result(
        weights=[stage.weights for stage in pipeline.stages],
        staleness=[stage.staleness for stage in pipeline.stages],
        gradients=[stage.gradients for stage in pipeline.stages],
        updates=[stage.version for stage in pipeline.stages],
        losses=pipeline.losses,
    )
