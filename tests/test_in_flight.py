"""What is in flight between two steps: saved and put back bit for bit, given up after a failure, emptied on demand."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unlocked as ul
from unlocked.errors import BadCheckpoint, NonFiniteLoss
from unlocked.reversible import Coupling, Split
from unlocked.worlds import Simulated

from delayed_cases import BY_NAME, CASES, UNSHRUNK, Case, gradients, name_of
from methods import assert_same, batch, data, mlp, momentum, state

C, M = ul.credit, ul.mitigation
MITIGATIONS = {
    "staleness": M.StalenessAware(),
    "gap": M.GapAware(decay=0.9),
    "adaptive": M.DelayCompensation(lam=0.5, adaptive=True),
    "prediction": M.WeightPrediction(),
}
STEPS = 6
every_case = pytest.mark.parametrize("case", CASES, ids=name_of)


def convolutional(seed: int = 0) -> ul.Chain:
    """Three stages in channels-last, with BatchNorm, dropout, and couplings in the middle one."""
    torch.manual_seed(seed)

    def block(channels: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2)]

    bodies = [
        nn.Sequential(*block(3), Split(1)),
        nn.Sequential(
            Coupling(nn.Sequential(*block(4)), 1), Coupling(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.2)), 1)
        ),
        nn.Sequential(*block(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    ]
    laid_out: list[Any] = [body.to(memory_format=torch.channels_last) for body in bodies]  # type: ignore[call-overload]
    stages = [ul.Stage(body) for body in laid_out]
    return ul.Chain(stages, like=images(0)[0])


def images(step: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(step)
    x = torch.randn(6, 3, 5, 5, generator=source).to(memory_format=torch.channels_last)
    return x, torch.randint(3, (6,), generator=source)


def dense(seed: int = 0) -> ul.Chain:
    model = mlp(5, norm=True, dropout=0.2, dtype=torch.float32)
    return ul.cut(model, 4, like=batch()[0].float())


def session_of(credit: Any, chain: ul.Chain | None = None, **options: Any) -> ul.Trainer:
    options.setdefault("optimizer", momentum)
    return ul.Trainer(convolutional() if chain is None else chain, credit=credit, seed=1, **options)


def go(session: ul.Trainer, steps: Iterable[int]) -> None:
    for step in steps:
        if session.replicas == 1:
            session.step(*images(step))
        else:
            shares = [images(10 * step + n) for n in range(session.replicas)]
            session.step([x for x, _ in shares], [y for _, y in shares])


def everything(session: ul.Trainer) -> dict[str, Tensor]:
    """Weights, buffers, states of the optimizers, versions; nothing is drained."""
    found = state(session)
    for weights in session.weights:
        found[f"{weights.worker.place} version"] = torch.tensor(weights.worker.version)
        for k, entry in enumerate(weights.store.optimizer.state.values()):
            found |= {f"{weights.worker.place} {k} {name}": x.clone() for name, x in entry.items() if x is not None}
    return found


def drained(session: ul.Trainer) -> dict[str, Tensor]:
    session.drain()
    return everything(session)


# ---- saved and resumed -------------------------------------------------------------------------------------------------


def saved_after(steps: Iterable[int], make: Any, folder: Path, world: Any = None) -> None:
    """A run that is saved after so many steps, and runs that go on from there, end as one that never was."""
    whole, saving = make(), make()
    go(whole, range(STEPS))
    for step in range(STEPS):
        go(saving, [step])
        if step + 1 in steps:
            saving.save(folder / str(step + 1))
    wanted = drained(whole)
    assert_same(drained(saving), wanted)
    for step in steps:
        resumed = ul.Trainer.resume(
            folder / str(step), convolutional(seed=5), optimizer=momentum, world=None if world is None else world()
        )
        go(resumed, range(step, STEPS))
        assert_same(drained(resumed), wanted)


@pytest.mark.covering
@every_case
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_pipeline_goes_on_where_it_was(case: Case, k: int, tmp_path: Path) -> None:
    """Filling, and full."""
    k = max(k, case.fewest(3))
    steps = {1: (1, 2, 3, 4, 5), 2: (1, 4), 3: (2, 5)}[k]
    saved_after(steps, partial(session_of, case.make(), accumulate=k), tmp_path)


@pytest.mark.covering
@every_case
@pytest.mark.parametrize("name", MITIGATIONS)
def test_a_mitigated_pipeline_goes_on_where_it_was(case: Case, name: str, tmp_path: Path) -> None:
    if case.run is None and name == "prediction":
        return
    k = case.fewest(3) if case.run is None else 1 + len(case.name) % 2
    make = partial(session_of, case.make(), accumulate=k, mitigation=MITIGATIONS[name])
    saved_after((3,), make, tmp_path)


@pytest.mark.covering
@pytest.mark.parametrize("name", ["pipedream", "petra", "petra-graph", "delayed", "2bw", "fdg-replay"])
@pytest.mark.parametrize("consensus", [ul.consensus.AllReduce(), ul.consensus.WASH(p=0.3)])
def test_replicas_go_on_where_they_were(name: str, consensus: Any, tmp_path: Path) -> None:
    case = BY_NAME[name]
    make = partial(session_of, case.make(), consensus=consensus, replicas=2, accumulate=case.fewest(3))
    saved_after((2, 5), make, tmp_path)


@pytest.mark.parametrize("case", [BY_NAME[name] for name in ("pipedream", "petra", "2bw", "fdg")], ids=name_of)
def test_it_goes_on_in_another_world(case: Case, tmp_path: Path) -> None:
    make = partial(session_of, case.make(), accumulate=case.fewest(3))
    saved_after((1, 4), make, tmp_path, Simulated)
    simulated = session_of(case.make(), accumulate=case.fewest(3), world=Simulated())
    usual = make()
    for session in (simulated, usual):
        go(session, range(4))
    simulated.save(tmp_path / "simulated")
    resumed = ul.Trainer.resume(tmp_path / "simulated", convolutional(), optimizer=momentum)
    for session in (resumed, usual):
        go(session, range(4, 6))
    assert_same(drained(resumed), drained(usual))


@every_case
def test_saved_twice_resumed_twice_and_after_a_drain(case: Case, tmp_path: Path) -> None:
    whole, saving = (session_of(case.make(), accumulate=case.fewest(3)) for _ in range(2))
    for session in (whole, saving):
        go(session, range(3))
    saving.save(tmp_path / "1")
    saving.save(tmp_path / "2")
    resumed = ul.Trainer.resume(tmp_path / "2", convolutional(5), optimizer=momentum)
    resumed.save(tmp_path / "3")
    resumed = ul.Trainer.resume(tmp_path / "3", convolutional(6), optimizer=momentum)
    for session in (whole, saving, resumed):
        go(session, [3])
        session.drain()
    resumed.save(tmp_path / "4")
    resumed = ul.Trainer.resume(tmp_path / "4", convolutional(7), optimizer=momentum)
    for session in (whole, saving, resumed):
        go(session, [4, 5])
    wanted = drained(whole)
    assert_same(drained(saving), wanted)
    assert_same(drained(resumed), wanted)


@pytest.mark.parametrize("name", ["pipedream", "delayed", "petra", "fdg-replay"])
def test_a_number_of_stages_can_change_only_when_nothing_is_in_flight(name: str, tmp_path: Path) -> None:
    session = session_of(BY_NAME[name].make(), dense())
    for step in range(3):
        session.step(*batch(seed=step, dtype=torch.float32))
    session.save(tmp_path / "full")
    two = ul.cut(mlp(5, norm=True, dropout=0.2, dtype=torch.float32), 2, like=batch()[0].float())
    resume = partial(ul.Trainer.resume, chain=two, stages=2, optimizer=momentum)
    with pytest.raises(BadCheckpoint, match="had micro-batches in flight when it was saved; resume with 4"):
        resume(tmp_path / "full")
    session.drain()
    session.save(tmp_path / "empty")
    resumed = resume(tmp_path / "empty")
    x, y = batch(seed=9, dtype=torch.float32)
    resumed.step(x, y)
    session.chains[0].eval()
    assert torch.isfinite(session.chains[0](x)).all()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"credit": C.PipeDream2BW()}, "the next step of pipedream-2bw reads the weights before its last update"),
        ({"credit": C.PipeDream(), "mitigation": M.GapAware()}, "the mitigation's averages belong to the stages"),
        ({"credit": C.PipeDream(), "mitigation": M.StalenessAware()}, None),
    ],
    ids=["standing", "averages", "no averages"],
)
def test_what_else_is_carried_forbids_another_number_of_stages(
    options: Any, reason: str | None, tmp_path: Path
) -> None:
    """After the first step what stands is version 0, which counts."""
    session = ul.Trainer(dense(), optimizer=momentum, accumulate=3, **options)
    session.step(*batch(dtype=torch.float32))
    session.drain()
    session.save(tmp_path)
    two = ul.cut(mlp(5, norm=True, dropout=0.2, dtype=torch.float32), 2, like=batch()[0].float())
    if reason is None:
        ul.Trainer.resume(tmp_path, chain=two, stages=2, optimizer=momentum).step(*batch(dtype=torch.float32))
        return
    with pytest.raises(BadCheckpoint, match=reason):
        ul.Trainer.resume(tmp_path, chain=two, stages=2, optimizer=momentum)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (C.PipeDream(), C.Backprop()),
        (C.PipeDream(), C.PETRA()),
        (C.PipeDream(), C.PipeDream(keep="input")),
        (C.DelayedGradients(keep="input"), C.DelayedGradients()),
        (C.PETRA(), C.PETRA(keep="graph")),
        (C.PETRA(), C.PipeDream()),
        (C.FDG(), C.FDG(shrink=0.1)),
    ],
    ids=str,
)
def test_what_is_in_flight_belongs_to_its_rule(before: Any, after: Any, tmp_path: Path) -> None:
    session = session_of(before)
    go(session, range(3))
    session.save(tmp_path / "full")
    with pytest.raises(BadCheckpoint, match="micro-batches in flight"):
        ul.Trainer.resume(tmp_path / "full", convolutional(), optimizer=momentum, credit=after)
    session.drain()
    session.save(tmp_path / "empty")
    resumed = ul.Trainer.resume(tmp_path / "empty", convolutional(), optimizer=momentum, credit=after)
    go(resumed, [3])


@pytest.mark.parametrize("part", [nn.Sequential(nn.Tanh(), nn.Tanh()), nn.Identity()])
def test_another_network_does_not_make_the_graph_again(part: nn.Module, tmp_path: Path) -> None:
    session = session_of(C.PipeDream())
    go(session, range(3))
    session.save(tmp_path)
    other = convolutional()
    body: Any = other[0].body
    body[2] = part  # keeps more for its backward, or less
    with pytest.raises(BadCheckpoint, match=r"Stage 0 does not make the graph again .* of micro-batch 1"):
        ul.Trainer.resume(tmp_path, other, optimizer=momentum)


# ---- emptied -----------------------------------------------------------------------------------------------------------


@every_case
def test_draining_twice_is_draining_once(case: Case) -> None:
    session = session_of(case.make(), accumulate=case.fewest(3))
    go(session, range(4))
    assert len(session.drain())
    assert all(not len(weights.flight) and not weights.pending for weights in session.weights)
    assert not any(session.world._boxes.values())  # type: ignore[attr-defined]
    once = everything(session)
    assert {x.item() for name, x in once.items() if name.endswith("version")} == {4}
    assert not len(session.drain())
    assert_same(everything(session), once)


def test_there_is_nothing_to_drain_without_delay() -> None:
    for rule in (C.Backprop(), C.GPipe(2), C.OneFOneB(2)):
        session = session_of(rule)
        go(session, range(2))
        before = everything(session)
        assert not len(session.drain())
        assert_same(everything(session), before)


def by_hand(case: Case, drains: bool, k: int) -> dict[str, Tensor]:
    """Two epochs, step by step."""
    session = session_of(case.make(), dense(), accumulate=k)
    for epoch in range(2):
        for x, y in data(48, dtype=torch.float32).batches(12, epoch=epoch, seed=session.seed):
            session.step(x, y)
        if drains:
            session.drain()
    session.drain()
    return state(session)


@pytest.mark.parametrize("case", [BY_NAME[name] for name in ("pipedream", "petra", "2bw", "fdg-replay")], ids=name_of)
def test_an_epoch_ends_with_a_drain_or_does_not(case: Case, tmp_path: Path) -> None:
    """drain="end": two epochs are one long one, whether validated and saved in between or not."""
    k, ends = case.fewest(4), {}
    for drain in ("epoch", "end"):
        for validated in (False, True):
            session = session_of(case.make(drain=drain), dense(), accumulate=k)
            more = {"validate": data(12, 9, torch.float32), "checkpoint": tmp_path / drain} if validated else {}
            session.fit(data(48, dtype=torch.float32), epochs=2, batch_size=12, **more)
            ends[drain, validated] = state(session)
            assert not any(len(weights.flight) for weights in session.weights)
    assert_same(ends["end", False], ends["end", True])
    assert_same(ends["epoch", False], ends["epoch", True])
    assert_same(ends["end", False], by_hand(case, False, k))
    assert_same(ends["epoch", False], by_hand(case, True, k))
    if case.run is not None:
        with pytest.raises(AssertionError):
            assert_same(ends["end", False], ends["epoch", False])


# ---- given up ----------------------------------------------------------------------------------------------------------


def still(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def fail(session: ul.Trainer) -> None:
    x, y = images(99)
    with pytest.raises(NonFiniteLoss):
        session.step(torch.full_like(x, float("nan")), y)


@pytest.mark.covering
@pytest.mark.parametrize("case", UNSHRUNK.values(), ids=name_of)
@pytest.mark.parametrize("before", [1, 4])
def test_after_a_step_that_failed_the_pipeline_fills_anew(case: Case, before: int, tmp_path: Path) -> None:
    """No message and no gradient is left: the gradients from then on are backpropagation's, the run that of a fresh trainer."""
    k = max(2, case.fewest(3))
    session = session_of(case.make(), accumulate=k, optimizer=still)
    go(session, range(before))
    fail(session)
    assert all(
        weights.flight is None and not weights.pending and not weights.versions.kept for weights in session.weights
    )
    assert all(x.grad is None for x in session.chains[0].parameters())
    assert not any(session.world._boxes.values())  # type: ignore[attr-defined]
    twin = session_of(C.Backprop(), accumulate=k, optimizer=still)
    twin.steps = session.steps
    mine, theirs = gradients(session), gradients(twin)
    for one in (session, twin):
        go(one, range(before, before + 5))
        one.drain()
    torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-5)
    if case.exact:
        for a, b in zip(mine, theirs):
            assert len(a) == len(b) == 5
            assert all(torch.equal(x, z) for row, other in zip(a, b) for x, z in zip(row, other))


@pytest.mark.covering
@every_case
@pytest.mark.parametrize("mitigation", [None, M.GapAware()])
def test_a_run_goes_on_after_a_failure_as_a_resumed_one(case: Case, mitigation: Any, tmp_path: Path) -> None:
    session = session_of(case.make(), accumulate=case.fewest(3), mitigation=mitigation)
    go(session, range(4))
    fail(session)
    with torch.no_grad():  # a failed forward has left its mark on the statistics
        for x in session.chains[0].buffers():
            if x.is_floating_point():
                x.nan_to_num_(1.0)
    session.save(tmp_path)
    resumed = ul.Trainer.resume(tmp_path, convolutional(3), optimizer=momentum)
    for one in (session, resumed):
        go(one, range(4, 8))
    wanted = drained(session)
    assert_same(drained(resumed), wanted)
    assert all(torch.isfinite(x).all() for x in wanted.values())
