"""Table 5.1 of Fournier's thesis: what the programs of its ten rows really do is what it says."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import nn

import unlocked as ul
from unlocked.simulation.costs import unit
from unlocked.simulation.cyclic_table import ROWS, Measured, measure
from unlocked.simulation.cyclic_table.held import Held, activations, peak, uses_of, weights_that_move
from unlocked.simulation.cyclic_table.measuring import VALUES, run
from unlocked.simulation.cyclic_table.rows import Rule
from unlocked.simulation.cyclic_table.sent import chain_of, steps_of_mean
from unlocked.simulation.cyclic_table.zero_dp import ZeroDP, children, parent
from unlocked.simulation.simulating import simulate

SIZES = (2, 3, 4)
BY_NAME = {row.name: row for row in ROWS}
CYCLIC = [row.name for row in ROWS if "cyclic" in row.name]


@cache
def measured(name: str, count: int, rule: Rule = "v2") -> Measured:
    return measure(BY_NAME[name], count, rule)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("name", BY_NAME)
def test_every_row_is_what_the_table_says(name: str, count: int) -> None:
    row = BY_NAME[name]
    found, table = measured(name, count), row.table(count)
    for column, value in row.expected(count).items():
        assert getattr(found, column) == value, column
    differing = [column for column, value in row.expected(count).items() if getattr(table, column) != value]
    assert differing == list(row.differs) and (row.notes or not differing)
    if table.collective is None:
        assert found.steps == 0
    elif table.collective:
        assert found.steps >= math.ceil(math.log2(count))
    else:
        assert found.steps == 1


def test_only_zero_dp_sends_more_than_the_table_says() -> None:
    assert [row.name for row in ROWS if row.differs] == ["ZeRO-DP"] and len(ROWS) == 10


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("name", BY_NAME)
def test_no_row_loses_time(name: str, count: int) -> None:
    """A step is 2N units; a device that holds activations whenever it can is N(N+1)/2 for model parallelism, not N²."""
    found = measured(name, count)
    assert found.step == 2 * count
    assert found.occupied == (Fraction(count + 1, 2 * count) if name == "DP with MP" else 1)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("name", CYCLIC)
def test_v1_has_the_same_table_but_two_versions_of_the_weights(name: str, count: int) -> None:
    row = BY_NAME[name]
    found = measured(name, count, "v1")
    assert {column: getattr(found, column) for column in row.expected(count)} == row.expected(count)
    whole = Fraction(1, count) if row.device == "worker" or row.states == "move" else 1
    assert found.step == 2 * count and found.steps <= 1 and found.versions == 2 * whole


@pytest.mark.parametrize("count", SIZES)
def test_what_is_really_held_and_sent(count: int) -> None:
    n = Fraction(count)
    found = {name: measured(name, count) for name in BY_NAME}
    held = {name: one.versions for name, one in found.items()}
    assert held["single-GPU DP"] == n and 1 < held["single-GPU, cyclic"] < 2
    assert [held[name] for name in ("multi-GPU DP", "multi-GPU, cyclic", "DP with MP", "MP, cyclic")] == [
        1,
        1,
        1 / n,
        1 / n,
    ]
    assert {held[name] for name in ("PP, CDP-v1", "PP, CDP-v2", "ZeRO-DP", "ZeRO, cyclic")} == {2 / n}
    assert 0 < found["multi-GPU, cyclic"].waiting < 1 and found["multi-GPU DP"].waiting == 0
    share = (n - 1) / n
    assert found["multi-GPU, cyclic"].volumes == {"gradients": share, "weights": share}
    assert found["MP, cyclic"].volumes == {"gradients": share / 2, "weights": share / 2}
    assert found["ZeRO-DP"].volumes == {"gradients": share, "weights": 2 * share}
    assert found["ZeRO, cyclic"].volumes == {"gradients": 2 * share**2, "older": share**2, "weights": 2 * share}


@pytest.mark.parametrize("count, zero", [(2, 2), (3, 3), (4, 4)])
def test_collectives_take_as_many_steps_as_their_messages_wait(count: int, zero: int) -> None:
    """2(N−1) for the exchange; for ZeRO-DP at stage 0 a sum up the tree (its branches side by side) and a broadcast."""
    found = {name: measured(name, count).steps for name in BY_NAME}
    assert found["multi-GPU DP"] == found["DP with MP"] == 2 * (count - 1) and found["ZeRO-DP"] == zero


@pytest.mark.parametrize("rule, stages", [("v1", {0, 1, 2}), ("v2", {0, 1})])
def test_an_older_version_moves_with_the_stages_that_somebody_reads_it_of(rule: Rule, stages: set[int]) -> None:
    """Under v2 the last stage is always seen as it is."""
    timeline = run(BY_NAME["ZeRO, cyclic"], 3, rule)
    rows = weights_that_move(timeline, uses_of(timeline, 1), 3, 4 * VALUES)
    assert {row.stage for row in rows if row.what == "older"} == stages
    for stage in range(3):
        mine = sorted(row[3:] for row in rows if row.stage == stage and row.what == "newest")
        assert all(one[1] <= other[0] for one, other in pairwise(mine))  # never at two replicas


@pytest.mark.parametrize("count", SIZES)
def test_all_at_once_on_one_device_peaks_like_data_parallelism(count: int) -> None:
    """The cyclic program itself, begun without its stagger."""
    rule = ul.consensus.CDP(form="single-device", staggered=False)
    timeline = simulate(ul.credit.Backprop(), rule, costs=unit(count), replicas=count, steps=5)
    rows = activations(uses_of(timeline, 1), lambda place: 0)
    assert peak(rows, (4.0 * count, 8.0 * count)) == count * count


def test_a_peak_counts_different_things_at_one_moment_and_what_ends_goes_first() -> None:
    rows = [
        Held(0, 0, "a", 0, 2),
        Held(0, 0, "b", 2, 4),
        Held(0, 1, "b", 3, 4),
        Held(0, 1, "b", 3, 5),
        Held(1, 0, "c", 0, 9),
    ]
    assert peak(rows, (0, 9)) == 2 and peak(rows, (0, 3)) == 1 and peak(rows, (4, 9)) == 1
    assert peak([Held(0, j, j, 0, 9) for j in range(3)], (1, 2)) == 3  # from before the window


# ---- steps of communication ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_a_chain_is_as_long_as_its_messages_wait(size: int) -> None:
    """The exchange: 2(N−1). A ring: N−1 hops. A binomial tree: ⌈log2 N⌉ rounds, and each node has its message once."""
    x = torch.zeros(1)

    async def ring(member):  # type: ignore[no-untyped-def]
        if member.rank:
            await member.get(member.rank - 1)
        if member.rank < size - 1:
            member.put(member.rank + 1, x)

    async def tree(member):  # type: ignore[no-untyped-def]
        if member.rank:
            await member.get(parent(member.rank))
        for child in children(member.rank, size):
            member.put(child, x)

    assert steps_of_mean(size) == 2 * (size - 1)
    assert chain_of(ring, size) == size - 1
    assert chain_of(tree, size) == math.ceil(math.log2(size))
    assert sorted(child for node in range(size) for child in children(node, size)) == list(range(1, size))
    assert all(parent(child) == node for node in range(size) for child in children(node, size))


# ---- the baseline that is nowhere else -------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_zero_dp_trains_as_an_all_reduce_does(replicas: int) -> None:
    def train(rule: ul.consensus.Consensus) -> ul.Trainer:
        torch.manual_seed(0)
        model = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(4, 4), nn.Tanh()))).double()
        x, y = torch.randn(12, 4).double(), torch.randint(4, (12,))
        chain = ul.cut(model, stages=3, like=x[:2])

        def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            return torch.optim.Adam(parameters, lr=0.1)

        session = ul.Trainer(chain, consensus=rule, replicas=replicas, optimizer=adam)
        for _ in range(4):
            session.step(x, y)
        return session

    expected, found = train(ul.consensus.AllReduce(bucket_mb=0)), train(ZeroDP())
    for one, other in zip(found.weights, expected.weights):
        if one.updates:
            assert one.worker.replica == one.worker.stage % replicas
            for a, b in zip(one.parameters, other.parameters):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
