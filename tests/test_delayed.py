"""Delayed rules: their weights are those of the sequential reference, and their limits are what they say."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import unlocked as ul
from unlocked.reversible import Coupling, Split
from unlocked.simulation.costs import unit
from unlocked.simulation.simulating import simulate
from unlocked.timeline import Timeline
from unlocked.worlds import Simulated

import delayed_reference as reference
from delayed_cases import (
    CASES,
    OPTIMIZERS,
    UNSHRUNK,
    Case,
    expected,
    flat,
    gradients,
    micro_batch,
    name_of,
    pair_of,
    step_batch,
    train,
    weights_of,
)
from methods import assert_same, batch, mlp, momentum, state, trainer

every_case = pytest.mark.parametrize("case", CASES, ids=name_of)
every_unshrunk = pytest.mark.parametrize("case", UNSHRUNK.values(), ids=name_of)


def agree(case: Case, kind: str, stages: int, k: int, steps: int, optimizer: str, warm_up: int = 0) -> None:
    """The library's weights, staleness and last losses are the reference's."""
    k = max(k, case.fewest(stages))
    mine, torchs = OPTIMIZERS[optimizer]
    chain, network = pair_of(stages, kind)
    session = ul.Trainer(chain, credit=case.make(warm_up=warm_up), optimizer=torchs, accumulate=k)
    done = train(session, range(steps), k)
    wanted = expected(case, network, steps, k, mine, **({} if case.run is None else {"warm_up": warm_up}))
    close(weights_of(session), flat(wanted.weights))
    measured = done.staleness()
    assert [[tau for update in measured[0, j] for tau in update] for j in range(stages)] == wanted.staleness
    assert [worker.version for worker in session.workers] == wanted.updates == [steps] * stages


def close(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- the reference -----------------------------------------------------------------------------------------------------


@pytest.mark.covering
@every_case
@pytest.mark.parametrize("kind", ["plain", "coupled"])
@pytest.mark.parametrize(("stages", "k", "optimizer"), [(4, 1, "momentum"), (5, 3, "adam")])
def test_a_rule_is_its_sequential_reference(case: Case, kind: str, stages: int, k: int, optimizer: str) -> None:
    agree(case, kind, stages, k, 8, optimizer)


@given(
    case=st.sampled_from(CASES),
    kind=st.sampled_from(["plain", "coupled"]),
    stages=st.integers(1, 5),
    k=st.sampled_from([1, 2, 3, 5]),
    steps=st.integers(1, 9),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    warm_up=st.sampled_from([0, 1, 3]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_in_every_shape(**drawn: Any) -> None:
    if drawn["case"].run is None:
        drawn["warm_up"] = 0  # the reference of the two versions knows none
    agree(**drawn)


@pytest.mark.parametrize("case", [case for case in CASES if case.run is not None], ids=name_of)
def test_a_pipeline_that_is_drained_fills_anew(case: Case) -> None:
    """Plain SGD has no memory, so the reference can be run in pieces."""
    mine, torchs = OPTIMIZERS["sgd"]
    chain, network = pair_of(4, "coupled")
    session = ul.Trainer(chain, credit=case.make(), optimizer=torchs, accumulate=2)
    for piece in (range(0, 5), range(5, 6), range(6, 12)):
        train(session, piece, 2)
    for piece in (range(0, 5), range(5, 6), range(6, 12)):
        network = type(network)(network.layers, _piece(case, network, piece, mine))
    close(weights_of(session), flat(network.weights))


def _piece(case: Case, network: Any, steps: range, optimizer: Any) -> Any:
    batches = [micro_batch(m) for m in range(steps.start * 2, steps.stop * 2)]
    return reference.run(network, batches, k=2, optimizer=optimizer, **case.run).weights  # type: ignore[arg-type]


@pytest.mark.covering
@pytest.mark.parametrize("case", [case for case in CASES if case.run is None], ids=name_of)
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_draining_changes_no_number_of_two_versions(case: Case, optimizer: str) -> None:
    mine, torchs = OPTIMIZERS[optimizer]
    chain, network = pair_of(4, "plain")
    session = ul.Trainer(chain, credit=case.make(), optimizer=torchs, accumulate=3)
    for piece in (range(0, 1), range(1, 5), range(5, 7)):
        train(session, piece, 3)
    close(weights_of(session), flat(expected(case, network, 7, 3, mine).weights))


# ---- limits ------------------------------------------------------------------------------------------------------------


def rich(stages: int, dtype: torch.dtype = torch.float32, coupled: bool = False) -> ul.Chain:
    """BatchNorm and dropout everywhere; `coupled`: inside couplings, too, and units of both sorts in one stage."""
    if not coupled:
        return ul.cut(mlp(5, norm=True, dropout=0.3, dtype=dtype), stages, like=batch()[0].to(dtype))
    torch.manual_seed(0)

    def function() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3))

    model = nn.Sequential(
        nn.Linear(5, 6),
        Split(-1),
        Coupling(function(), -1),
        Coupling(function(), -1),
        nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Dropout(0.3)),
        Coupling(function(), -1),
        Coupling(function(), -1),
        nn.Linear(12, 3),
    ).to(dtype)
    return ul.cut(model, stages, like=batch()[0].to(dtype))


def session_of(credit: Any, chain: ul.Chain, **options: Any) -> ul.Trainer:
    options.setdefault("optimizer", momentum)
    return ul.Trainer(chain, credit=credit, seed=3, **options)


def end(session: ul.Trainer, steps: int = 7, size: int = 12) -> dict[str, Tensor]:
    """The state after so many steps and a drain."""
    dtype = next(session.chains[0].parameters()).dtype
    for step in range(steps):
        session.step(*batch(size, seed=step, dtype=dtype))
    session.drain()
    return state(session)


def ended(credit: Any, coupled: bool = False, dtype: torch.dtype = torch.float32, k: int = 1, **options: Any) -> Any:
    return end(session_of(credit, rich(4, dtype, coupled), accumulate=k, **options))


C = ul.credit
SAME = {
    "ddg is pipedream": (C.DDG(), C.PipeDream()),
    "features replay is delayed gradients": (C.FeaturesReplay(), C.DelayedGradients(keep="input")),
    "graph is input": (C.PipeDream(), C.PipeDream(keep="input")),
    "stash is snapshot": (C.PipeDream(), C.PipeDream(weights="snapshot")),
    "graph is input, two versions": (C.PipeDream2BW(), C.PipeDream2BW(keep="input")),
    "graph is input, petra": (C.PETRA(keep="graph"), C.PETRA(keep="input+weights")),
}


@pytest.mark.parametrize("coupled", [False, True], ids=["plain", "coupled"])
@pytest.mark.parametrize("pair", SAME.values(), ids=SAME)
def test_these_are_the_same_bit_for_bit(pair: tuple[Any, Any], coupled: bool) -> None:
    """With dropout, and BatchNorm's statistics."""
    k = 3 if isinstance(pair[0], C.PipeDream2BW) else 2
    assert_same(ended(pair[0], coupled, k=k), ended(pair[1], coupled, k=k))
    if k == 2:
        assert_same(ended(pair[0], coupled), ended(pair[1], coupled))


def test_petra_without_reversible_parts_replays() -> None:
    assert_same(ended(C.PETRA(), k=2), ended(C.PETRA(keep="input"), k=2))


def test_reconstructing_with_the_forwards_weights_is_exact_but_for_rounding() -> None:
    exact, rebuilt = (ended(C.PETRA(keep=keep), coupled=True, dtype=torch.float64) for keep in ("graph", "weights"))
    for name, x in exact.items():
        torch.testing.assert_close(rebuilt[name], x, rtol=1e-12, atol=1e-12)
    approximate = ended(C.PETRA(), coupled=True, dtype=torch.float64)
    assert any((approximate[name] - x).abs().max() > 1e-6 for name, x in exact.items())


@pytest.mark.covering
@every_case
@pytest.mark.parametrize("k", [1, 3])
def test_without_delay_a_rule_is_backpropagation_bit_for_bit(case: Case, k: int) -> None:
    """One stage, or a warm-up to the end."""
    k = max(k, case.fewest(4))
    wanted = ended(C.Backprop(), k=k)
    assert_same(ended(case.make(warm_up=7), k=k), wanted)
    if case.run is not None:  # one stage of the two versions is gradient descent with a delay
        whole = [end(session_of(rule, rich(1), accumulate=k)) for rule in (case.make(), C.Backprop())]
        assert_same(*whole)


@every_unshrunk
def test_a_pipeline_drained_after_every_step_is_backpropagation(case: Case) -> None:
    """All micro-batches of a step see the same weights then."""
    if case.run is None:
        return
    ends = []
    for rule in (case.make(), C.Backprop()):
        session = session_of(rule, rich(4), accumulate=3)
        for step in range(5):
            session.step(*batch(12, seed=step, dtype=torch.float32))
            session.drain()
        ends.append(state(session))
    assert_same(*ends)


def still(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


@pytest.mark.covering
@every_unshrunk
@pytest.mark.parametrize("coupled", [False, True], ids=["plain", "coupled"])
@pytest.mark.parametrize("k", [2])
def test_weights_that_stand_still_have_backpropagations_gradients_and_statistics(
    case: Case, coupled: bool, k: int
) -> None:
    """Dropout is replayed; BatchNorm counts every micro-batch once."""
    k = max(k, case.fewest(4))
    ends, rows = [], []
    for rule in (case.make(), C.Backprop()):
        session = session_of(rule, rich(4, torch.float64, coupled), accumulate=k, optimizer=still)
        rows.append(gradients(session))
        ends.append(end(session))
    assert_same(*ends)
    assert ends[0][_counter(ends[0])] == 7 * k
    if case.exact or not coupled:
        for mine, theirs in zip(*rows):
            assert len(mine) == len(theirs) == 7
            assert all(torch.equal(a, b) for a, b in zip(flat(mine), flat(theirs)))
    torch.testing.assert_close(*rows, rtol=1e-12, atol=1e-12)


def _counter(ended: dict[str, Tensor]) -> str:
    return next(name for name in ended if name.endswith("num_batches_tracked"))


# ---- 1F1B with flush ---------------------------------------------------------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("parts", [1, 3, 6])
def test_1f1b_is_gpipe_is_backpropagation_bit_for_bit(parts: int, stages: int) -> None:
    rules = [(C.OneFOneB(parts), 2), (C.GPipe(parts), 2), (C.Backprop(), 2 * parts)]
    ends = [end(session_of(rule, rich(stages), accumulate=k, clip=0.5), size=36) for rule, k in rules]
    assert_same(ends[0], ends[1])
    assert_same(ends[0], ends[2])


@pytest.mark.parametrize("stages", [1, 3, 5])
def test_1f1b_keeps_as_many_micro_batches_as_there_are_stages_from_here(stages: int) -> None:
    session = trainer(C.OneFOneB(7), stages=stages)
    session.step(*batch(14))
    for j in range(stages):
        assert deepest(session.timeline, j) == stages - j


def deepest(timeline: Timeline, stage: int) -> int:
    """The most micro-batches a stage has between the begin of their forward and their backward."""
    inside, most = 0, 0
    for act in timeline.of(0, stage):
        inside += {"F": 1, "B": -1}.get(act.kind, 0)
        most = max(most, inside)
    return most


# ---- the clock ---------------------------------------------------------------------------------------------------------


def timelines(case: Case, stages: int, steps: int = 16) -> list[Timeline]:
    """On unit costs, with shapes only and with tensors."""
    costs = unit(stages, forward=1.0, backward=2.0)
    k = case.fewest(stages)
    shapes = simulate(case.make(), costs=costs, steps=steps, accumulate=k)
    chain, _ = pair_of(stages, "coupled")
    session = ul.Trainer(chain, credit=case.make(), optimizer=momentum, accumulate=k, world=Simulated(costs=costs))
    acts: list[Any] = []
    for step in range(steps):
        session.step(*step_batch(step, k))
        acts += session.timeline.acts
    return [shapes, Timeline(acts)]


@pytest.mark.covering
@every_case
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_a_backward_comes_so_many_turns_after_its_forward(case: Case, stages: int) -> None:
    """J − 1 − j turns with hop 1, twice that with hop 2; that is how many micro-batches wait in between."""
    hop = 1 if case.run is None else case.run["hop"]
    for timeline in timelines(case, stages):
        for j in range(stages):
            depth = hop * (stages - 1 - j)
            turns = [(act.kind, act.micro_batch) for act in timeline.of(0, j) if act.kind in "FB"]
            last = max(m for kind, m in turns if kind == "B")
            forwards = [m for kind, m in turns if kind == "F"]
            assert last == forwards[-1] - depth
            if (case.run or {}).get("backward_first") and depth:
                steady = [pair for pair in turns if pair[1] >= 0][depth:]
                assert steady[:4] == [("B", 0), ("F", depth), ("B", 1), ("F", depth + 1)]
                assert deepest(timeline, j) == depth
            else:
                steady = turns[depth:]
                assert steady[:4] == [("F", depth), ("B", 0), ("F", depth + 1), ("B", 1)]
                assert deepest(timeline, j) == depth + 1


@pytest.mark.covering
@every_case
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5, 6])
def test_in_the_steady_state_nobody_waits(case: Case, stages: int) -> None:
    """A turn takes what the slowest stage's forward and backward take, whatever the number of stages."""
    costs = unit(stages, forward=1.0, backward=2.0)
    done = simulate(case.make(), costs=costs, steps=40, accumulate=case.fewest(stages))
    again = stages > 1 and recomputes(case)
    for j in range(stages):
        acts = [act for act in done.of(0, j) if act.kind in "FB"][-40:]
        ends = [act.end for act in acts if act.kind == "B"]
        assert (ends[-1] - ends[0]) / (len(ends) - 1) == pytest.approx(3.0 + again)
        if j < stages - 1 or not again:  # the last stage computes nothing twice, so it has time
            assert all(after.start == before.end for before, after in pairwise(acts))


def recomputes(case: Case) -> bool:
    """Whether a backward begins with another forward (below the last stage)."""
    names = ("features-replay", "fdg-replay", "petra", "petra-weights")
    return "input" in case.name or case.name in names
