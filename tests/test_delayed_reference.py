"""The sequential reference of delayed pipelines, against torch's autograd and optimizers.

The second opinion (`recursion`) has no queues and no micro-steps: with v_j(m) the updates of stage j before the forward
of micro-batch m, its weights are W_j^{v_j(m)} at the forward and W_j^{⌊m/k⌋} at the backward, one micro-batch after the
other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from delayed_reference import (
    SGD,
    Adam,
    Batch,
    Network,
    Result,
    Semantics,
    Weights,
    reversible,
    run,
    stage_forward,
    stage_inverse,
    two_versions,
)

SEMANTICS: list[Semantics] = ["stash", "current", "replay", "reverse"]
OPTIMIZERS: dict[str, tuple[SGD | Adam, Callable[..., torch.optim.Optimizer]]] = {
    "sgd": (SGD(0.3), partial(torch.optim.SGD, lr=0.3)),
    "momentum": (SGD(0.1, 0.9, 0.01), partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)),
    "nesterov": (
        SGD(0.1, 0.8, 0.01, nesterov=True),
        partial(torch.optim.SGD, lr=0.1, momentum=0.8, weight_decay=0.01, nesterov=True),
    ),
    "adam": (
        Adam(0.05, (0.8, 0.95), 1e-4, 0.01),
        partial(torch.optim.Adam, lr=0.05, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.01),
    ),
    "adamw": (
        Adam(0.05, (0.8, 0.95), 1e-4, 0.1, decoupled=True),
        partial(torch.optim.AdamW, lr=0.05, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1),
    ),
}
FEATURES, WIDTH, CLASSES = 5, 4, 3


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights_of(layers: list[str], inputs: int, outputs: int, seed: int) -> Weights:
    """Random weights; the first layer with weights takes `inputs`, all give `outputs`."""
    weights: Weights = []
    for kind in layers:
        if kind in ("linear", "coupling", "matrix"):
            weights.append(normal(outputs, inputs, seed=seed + len(weights)) / inputs**0.5)
            inputs = outputs
        if kind in ("linear", "coupling"):
            weights.append(0.3 * normal(outputs, seed=seed + len(weights)))
    return weights


def plain(stages: int) -> Network:
    """A chain: two layers a stage, a linear classifier at the end of the last."""
    body = ["linear", "tanh", "linear", "tanh"]
    layers = [body] * (stages - 1) + [[*body, "linear"]]
    sizes = [FEATURES] + [WIDTH] * (stages - 1)
    weights = [weights_of(body, size, WIDTH, 100 * j) for j, size in enumerate(sizes)]
    weights[-1] += weights_of(["linear"], WIDTH, CLASSES, 999)
    return Network(layers, weights)


def coupled(stages: int) -> Network:
    """A stem that makes two streams, stages of one or two couplings, a classifier on both streams."""
    layers = [["matrix", "duplicate"], *(["coupling"] * (1 + j % 2) for j in range(stages - 2)), ["linear"]]
    sizes = [(FEATURES, WIDTH), *[(WIDTH, WIDTH)] * (stages - 2), (2 * WIDTH, CLASSES)]
    return Network(layers, [weights_of(names, *size, 100 * j) for j, (names, size) in enumerate(zip(layers, sizes))])


def data(count: int) -> list[Batch]:
    return [(normal(6, FEATURES, seed=m), torch.arange(6).add(m).remainder(CLASSES)) for m in range(count)]


def flat(stages: list[Weights]) -> Weights:
    return [w for stage in stages for w in stage]


def close(a: Any, b: Any, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- the second opinion ----------------------------------------------------------------------------------------------


def forward(layers: list[str], weights: Weights, h: Tensor) -> Tensor:
    """A stage with torch's own functions."""
    left = iter(weights)
    for kind in layers:
        if kind == "linear":
            h = F.linear(h, next(left), next(left))
        elif kind == "matrix":
            h = F.linear(h, next(left))
        elif kind == "tanh":
            h = h.tanh()
        elif kind == "duplicate":
            h = h.repeat(1, 2)
        else:
            x, tilde = h[:, : h.shape[1] // 2], h[:, h.shape[1] // 2 :]
            h = torch.cat([tilde + F.linear(x, next(left), next(left)).tanh(), x], dim=1)
    return h


def vjp(
    layers: list[str], weights: Weights, x: Tensor, d: Tensor, now: Weights | None = None
) -> tuple[Tensor, Weights]:
    """Gradients at `x` and of the weights, by autograd. With `now`, the backward finds these in place of `weights`."""
    leaves = [w.clone().requires_grad_() for w in weights]
    x = x.clone().requires_grad_()

    def pack(saved: Tensor) -> Any:
        for i, leaf in enumerate(leaves):
            if now is not None and (saved is leaf or saved._base is leaf):
                return i, saved is leaf
        return saved

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        assert now is not None
        return now[packed[0]] if packed[1] else now[packed[0]].T

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        below, *gradients = torch.autograd.grad(forward(layers, leaves, x), [x, *leaves], d)
    return below, gradients


def autograd(network: Network, batch: Batch, weights: list[Weights]) -> tuple[float, list[Weights]]:
    """Loss of the whole network, and the gradients of every stage."""
    leaves = [[w.clone().requires_grad_() for w in stage] for stage in weights]
    h = batch[0]
    for layers, stage in zip(network.layers, leaves):
        h = forward(layers, stage, h)
    loss = F.cross_entropy(h, batch[1])
    loss.backward()
    return loss.item(), [[w.grad for w in stage] for stage in leaves]


def rebuilt(layers: list[str], weights: Weights, h: Tensor) -> Tensor:
    """The input of couplings: (x̃ + F(x), x) ↦ (x, x̃)."""
    for w, b in reversed(list(zip(weights[::2], weights[1::2]))):
        p, x = h[:, : h.shape[1] // 2], h[:, h.shape[1] // 2 :]
        h = torch.cat([x, p - F.linear(x, w, b).tanh()], dim=1)
    return h


def updates_before_forward(m: int, delay: int, k: int, plain: int, backward_first: bool) -> int:
    """v_j(m); `plain` micro-batches of warm-up."""
    if m < plain or delay == 0:
        return m // k
    return max(plain, m - delay + backward_first) // k


def recursion(
    network: Network,
    batches: list[Batch],
    make: Callable[..., torch.optim.Optimizer],
    *,
    hop: int,
    semantics: Semantics,
    k: int = 1,
    shrink: float = 1.0,
    backward_first: bool = False,
    warm_up: int = 0,
) -> list[Weights]:
    """The weights in the end, by autograd and torch.optim."""
    stages = range(len(network.layers))
    top = stages[-1]
    history = [[weights] for weights in network.weights]
    leaves = [[w.clone().requires_grad_() for w in stage] for stage in network.weights]
    optimizers = [make(stage) for stage in leaves]
    for m, (x, y) in enumerate(batches):
        versions = [updates_before_forward(m, hop * (top - j), k, warm_up * k, backward_first) for j in stages]
        inputs = [x]
        for j in stages:
            inputs.append(forward(network.layers[j], history[j][versions[j]], inputs[-1]))
        logits = inputs.pop().clone().requires_grad_()
        (d,) = torch.autograd.grad(F.cross_entropy(logits, y), logits)
        message = logits
        for j in reversed(stages):
            layers, then, now = network.layers[j], history[j][versions[j]], history[j][m // k]
            d = d if j == top or m < warm_up * k else shrink * d
            rebuilds = semantics == "reverse" and reversible(layers)
            message = rebuilt(layers, now, message) if rebuilds else inputs[j]
            if semantics in ("stash", "current"):
                d, gradients = vjp(layers, then, inputs[j], d, now if semantics == "current" else None)
            else:
                d, gradients = vjp(layers, now, message, d)
            for leaf, g in zip(leaves[j], gradients):
                leaf.grad = g / k if m % k == 0 else leaf.grad + g / k
            if (m + 1) % k == 0:
                optimizers[j].step()
                history[j].append([leaf.detach().clone() for leaf in leaves[j]])
    return [versions[-1] for versions in history]


# ---- the parts -------------------------------------------------------------------------------------------------------


def test_couplings_are_undone_by_their_inverse() -> None:
    network = coupled(4)
    x = normal(6, 2 * WIDTH, seed=3)
    for layers, weights in zip(network.layers[1:-1], network.weights[1:-1]):
        output, _ = stage_forward(layers, weights, x)
        assert not torch.allclose(output, x)
        close(stage_inverse(layers, weights, output), x, 1e-14)


@pytest.mark.covering
@pytest.mark.parametrize("network", [plain(1), plain(4), coupled(2), coupled(5)], ids=["1", "4", "c2", "c5"])
@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_delay_it_is_backpropagation(network: Network, semantics: Semantics, optimizer: str) -> None:
    own, make = OPTIMIZERS[optimizer]
    batches, k = data(8), 2
    leaves = [[w.clone().requires_grad_() for w in stage] for stage in network.weights]
    theirs = make(flat(leaves))
    losses = []
    for m, batch in enumerate(batches):
        loss, gradients = autograd(network, batch, [[w.detach() for w in stage] for stage in leaves])
        losses.append(loss)
        for w, g in zip(flat(leaves), flat(gradients)):
            w.grad = g / k if m % k == 0 else w.grad + g / k
        if m % k == k - 1:
            theirs.step()
    result = run(network, batches, hop=0, semantics=semantics, k=k, optimizer=own)
    close(result.weights, [[w.detach() for w in stage] for stage in leaves])
    close(result.losses, losses)
    assert result.staleness == [[0] * 8] * len(network.layers)
    assert result.updates == [4] * len(network.layers)


@pytest.mark.covering(2)
@pytest.mark.parametrize("network", [plain(4), coupled(4)], ids=["plain", "coupled"])
@pytest.mark.parametrize("hop", [1, 2])
@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("backward_first", [False, True])
def test_with_no_learning_every_gradient_is_that_of_the_whole_network(
    network: Network, hop: int, semantics: Semantics, backward_first: bool
) -> None:
    batches = data(9)
    truth = [autograd(network, batch, network.weights) for batch in batches]
    result = run(
        network, batches, hop=hop, semantics=semantics, optimizer=SGD(0.0), backward_first=backward_first, shrink=0.5
    )
    top = len(network.layers) - 1
    close(result.losses, [loss for loss, _ in truth])
    for j, gradients in enumerate(result.gradients):
        close(gradients, [[0.5 ** (top - j) * g for g in whole[j]] for _, whole in truth])


# ---- against the second opinion --------------------------------------------------------------------------------------


@pytest.mark.covering(2)
@pytest.mark.parametrize("network", [plain(3), plain(5), coupled(3), coupled(5)], ids=["3", "5", "c3", "c5"])
@pytest.mark.parametrize("hop", [1, 2])
@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_weights_are_those_of_the_recursion(network: Network, hop: int, semantics: Semantics, optimizer: str) -> None:
    own, make = OPTIMIZERS[optimizer]
    batches = data(14)
    expected = recursion(network, batches, make, hop=hop, semantics=semantics)
    close(run(network, batches, hop=hop, semantics=semantics, optimizer=own).weights, expected)


@pytest.mark.covering(2)
@pytest.mark.parametrize("network", [plain(4), coupled(4)], ids=["plain", "coupled"])
@pytest.mark.parametrize("hop", [1, 2])
@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize(
    "options",
    [
        {"k": 3},
        {"shrink": 0.3},
        {"backward_first": True},
        {"warm_up": 2},
        {"k": 2, "shrink": 0.7, "backward_first": True, "warm_up": 3},
    ],
    ids=["k", "shrink", "backward_first", "warm_up", "all"],
)
def test_options_are_those_of_the_recursion(
    network: Network, hop: int, semantics: Semantics, options: dict[str, Any]
) -> None:
    own, make = OPTIMIZERS["momentum"]
    batches = data(17)
    expected = recursion(network, batches, make, hop=hop, semantics=semantics, **options)
    result = run(network, batches, hop=hop, semantics=semantics, optimizer=own, **options)
    close(result.weights, expected)


def test_the_semantics_differ_once_weights_move() -> None:
    batches = data(12)
    ends = [run(coupled(4), batches, hop=2, semantics=name).weights[0][0] for name in SEMANTICS]
    for i, a in enumerate(ends):
        for b in ends[:i]:
            assert (a - b).abs().max() > 1e-6


def test_two_versions_are_2bw() -> None:
    network, batches, m = plain(3), data(12), 3
    for own, make in (OPTIMIZERS["momentum"], OPTIMIZERS["adamw"]):
        leaves = [[w.clone().requires_grad_() for w in stage] for stage in network.weights]
        optimizer = make(flat(leaves))
        before = network.weights
        losses = []
        for t in range(4):
            now = [[w.detach().clone() for w in stage] for stage in leaves]
            truth = [autograd(network, batch, before) for batch in batches[m * t : m * (t + 1)]]
            losses += [loss for loss, _ in truth]
            for j, stage in enumerate(leaves):
                for i, w in enumerate(stage):
                    w.grad = sum(gradients[j][i] for _, gradients in truth) / m
            optimizer.step()
            before = now
        result = two_versions(network, batches, micro_batches=m, optimizer=own)
        close(result.weights, [[w.detach() for w in stage] for stage in leaves])
        close(result.losses, losses)
        assert result.staleness == [[0] * m + [1] * (len(batches) - m)] * 3
        assert result.updates == [4] * 3


def test_current_by_hand_for_two_stages() -> None:
    """Stage 0 is W1, tanh, W2, tanh; D_0 = 1. Its W2 has moved once when micro-batch 1 comes back."""
    network, batches = plain(2), data(2)
    w1, b1, w2, b2 = network.weights[0]
    rate = 0.5

    def through(batch: Batch, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
        h1 = torch.tanh(batch[0] @ w1.T + b1)
        return h1, torch.tanh(h1 @ w2.T + b2)

    (h1, h2), (k1, k2) = (through(batch, w1, b1, w2, b2) for batch in batches)  # no update before either forward
    top = network.weights[1]

    def from_above(h: Tensor, y: Tensor, top: Weights) -> tuple[Tensor, Weights]:
        leaf, leaves = h.clone().requires_grad_(), [w.clone().requires_grad_() for w in top]
        loss = F.cross_entropy(forward(network.layers[1], leaves, leaf), y)
        d, *gradients = torch.autograd.grad(loss, [leaf, *leaves])
        return d, gradients

    d0, gradients = from_above(h2, batches[0][1], top)
    d1, _ = from_above(k2, batches[1][1], [w - rate * g for w, g in zip(top, gradients)])

    def step(w: Weights, x: Tensor, h1: Tensor, h2: Tensor, d: Tensor) -> Weights:
        e2 = d * (1 - h2**2)
        e1 = (e2 @ w[2]) * (1 - h1**2)
        gradients = [e1.T @ x, e1.sum(0), e2.T @ h1, e2.sum(0)]
        return [a - rate * g for a, g in zip(w, gradients)]

    once = step([w1, b1, w2, b2], batches[0][0], h1, h2, d0)
    twice = step(once, batches[1][0], k1, k2, d1)
    result = run(network, batches, hop=1, semantics="current", optimizer=SGD(rate))
    close(result.weights[0], twice)


# ---- staleness, draining, hooks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("hop", [1, 2])
def test_staleness_is_the_micro_batches_in_flight(hop: int) -> None:
    delays = [hop * (3 - j) for j in range(4)]
    batches = data(12)
    first = run(plain(4), batches, hop=hop, semantics="stash")
    assert first.staleness == [[min(m, delay) for m in range(12)] for delay in delays]
    early = run(plain(4), batches, hop=hop, semantics="stash", backward_first=True)
    assert early.staleness == [[min(m, max(0, delay - 1)) for m in range(12)] for delay in delays]
    summed = run(plain(4), batches, hop=hop, semantics="stash", k=3)
    assert summed.staleness == [[m // 3 - max(0, m - delay) // 3 for m in range(12)] for delay in delays]
    assert summed.updates == [4] * 4
    warm = run(plain(4), batches, hop=hop, semantics="stash", k=2, warm_up=2)
    assert warm.staleness == [[m // 2 - max(min(m, 4), m - delay) // 2 for m in range(12)] for delay in delays]


@pytest.mark.parametrize("hop", [1, 2])
@pytest.mark.parametrize("backward_first", [False, True])
def test_without_draining_what_is_in_flight_is_left_out(hop: int, backward_first: bool) -> None:
    network, batches = coupled(4), data(9)
    options: dict[str, Any] = {"hop": hop, "semantics": "reverse", "backward_first": backward_first}
    full, cut = run(network, batches, **options), run(network, batches, **options, drain=False)
    assert cut.updates == [9 - hop * (3 - j) for j in range(4)]
    for j in range(4):
        close(cut.gradients[j], full.gradients[j][: cut.updates[j]])
    assert full.updates == [9] * 4


def test_what_is_left_of_k_makes_no_update() -> None:
    network, batches = plain(3), data(8)
    close(
        run(network, batches, hop=0, semantics="stash", k=3).weights,
        run(network, batches[:6], hop=0, semantics="stash", k=3).weights,
    )


def drifts(network: Network, batches: list[Batch], k: int) -> tuple[Result, dict[tuple[int, int], tuple[int, Weights]]]:
    """A run, and what its transform was told: by stage and micro-batch, τ and the drift."""
    seen: dict[tuple[int, int], tuple[int, Weights]] = {}
    counts = [0] * len(network.layers)

    def watch(stage: int, gradients: Weights, tau: int, drift: Weights) -> Weights:
        seen[stage, counts[stage]] = tau, drift
        counts[stage] += 1
        return gradients

    return run(network, batches, hop=2, semantics="current", k=k, transform=watch), seen


@pytest.mark.parametrize("k", [1, 2])
def test_the_transform_is_told_delay_and_drift(k: int) -> None:
    """With plain SGD the drift is −γ times the sum of the mean gradients of the updates in between."""
    network, batches = plain(4), data(10)
    result, seen = drifts(network, batches, k)
    close(result.weights, run(network, batches, hop=2, semantics="current", k=k).weights)
    for (j, m), (tau, drift) in seen.items():
        assert tau == result.staleness[j][m]
        between = result.gradients[j][k * (m // k - tau) : k * (m // k)]
        expected = [
            -SGD().rate / k * sum((g[i] for g in between), torch.zeros(1, dtype=torch.float64))
            for i in range(len(drift))
        ]
        close(drift, [e.expand_as(d) for e, d in zip(expected, drift)], 1e-12)


def test_the_transform_changes_what_is_summed() -> None:
    """A factor on every gradient is a factor on the rate of plain SGD."""
    network, batches = plain(3), data(8)
    options: dict[str, Any] = {"hop": 1, "semantics": "replay", "k": 2}
    halved = run(network, batches, **options, transform=lambda j, gradients, tau, drift: [g / 2 for g in gradients])
    close(halved.weights, run(network, batches, **options, optimizer=SGD(SGD().rate / 2)).weights)


def test_forwards_use_the_predicted_weights() -> None:
    network, batches = plain(3), data(5)
    halves = [[w / 2 for w in stage] for stage in network.weights]
    calls = []

    def predict(stage: int, weights: Weights, states: list[dict[str, Tensor]], updates: int) -> Weights:
        calls.append((stage, updates))
        return [w / 2 for w in weights]

    result = run(network, batches, hop=1, semantics="stash", optimizer=SGD(0.0, 0.9), predict=predict)
    truth = [autograd(network, batch, halves) for batch in batches]
    close(result.losses, [loss for loss, _ in truth])
    for j, gradients in enumerate(result.gradients):
        close(gradients, [whole[j] for _, whole in truth])
    assert calls == [(j, max(0, m - (2 - j))) for m in range(5) for j in range(3)]


def test_the_network_given_is_not_changed() -> None:
    network = coupled(4)
    kept = [[w.clone() for w in stage] for stage in network.weights]
    for optimizer, _ in OPTIMIZERS.values():
        run(network, data(6), hop=2, semantics="reverse", optimizer=replace(optimizer, rate=0.2))
        two_versions(network, data(6), micro_batches=2, optimizer=optimizer)
    assert all(torch.equal(a, b) for a, b in zip(flat(network.weights), flat(kept)))
