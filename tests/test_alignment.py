"""The instruments that look at gradients and reconstructions while a network trains: they are right, and change nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import unlocked as ul
from unlocked.callbacks import GradientCosine, ReconstructionError
from unlocked.errors import BadData, InvalidChoice
from unlocked.probes.alignment import cosine, norm
from unlocked.probes.reconstruction import distance, rounding
from unlocked.probes.watching import Watched
from unlocked.report import write_report
from unlocked.reversible import Coupling, Split

import methods as m

J = 4
Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def sgd(lr: float) -> Optimizer:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def plain(dropout: float = 0.0) -> nn.Sequential:
    return m.mlp(depth=4, norm=True, dropout=dropout)


def reversible(dropout: float = 0.0, last: int = 3) -> nn.Sequential:
    """Four stages' worth of couplings, one part in the middle that is not reversible; float64."""
    torch.manual_seed(0)

    def part() -> Coupling:
        return Coupling(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(dropout)))

    middle = [part(), part(), part(), nn.Linear(12, 12), part(), part(), part()]
    return nn.Sequential(nn.Linear(5, 6), Split(), *middle, nn.Linear(12, last)).double()


def looked(
    credit: ul.credit.Credit, probe: ul.callbacks.Callback | None, samples: int = 96, epochs: int = 1, **options: object
) -> ul.Trainer:
    """Train in batches of 12 per replica, the probe looking on if there is one."""
    options.setdefault("stages", J)
    options.setdefault("model", plain())
    trainer = m.trainer(credit, **options)
    trainer.fit(m.data(samples), epochs, batch_size=12, callbacks=[] if probe is None else [probe])
    return trainer


def by_stage(records: list[dict], key: str, step: int | None = None) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for record in records:
        if step is None or record["step"] == step:
            found.setdefault(record["stage"], []).append(record[key])
    return found


def assert_exact(records: list[dict], stages: set[int], ratio: Callable[[int], float] = lambda stage: 1.0) -> None:
    assert {record["stage"] for record in records} == stages
    for record in records:
        assert record["cosine"] == pytest.approx(1.0, abs=1e-12), record
        assert record["ratio"] == pytest.approx(ratio(record["stage"]), rel=1e-12), record


# ---- the cosine ---------------------------------------------------------------------------------------------------------


def test_cosine_and_norm_are_those_of_the_concatenation() -> None:
    a, b = (
        [torch.tensor([3.0]), None, torch.tensor([[0.0, 4.0]])],
        [torch.tensor([1.0]), torch.ones(2), torch.zeros(1, 2)],
    )
    assert norm(a) == 5.0 and cosine(a, b) == pytest.approx(3 / (5 * 3**0.5))
    assert cosine(a, [None, None, None]) is None


BACKPROPAGATION = {
    "backprop": (ul.credit.Backprop(), {}),
    "dropout": (ul.credit.Backprop(), {"model": plain(0.3)}),
    "accumulated": (ul.credit.Backprop(), {"accumulate": 3}),
    "clipped": (ul.credit.Backprop(), {"clip": 1e-3}),
    "gpipe": (ul.credit.GPipe(3), {"accumulate": 2}),
    "1f1b": (ul.credit.OneFOneB(2), {}),
    "interlocking": (ul.credit.Interlocking(J - 1, head="linear", budget=None), {}),
    "replicas": (ul.credit.Backprop(), {"replicas": 3, "samples": 216}),
    "averaged": (ul.credit.Backprop(), {"replicas": 2, "consensus": ul.consensus.AllReduce(), "samples": 120}),
    "wash": (ul.credit.Backprop(), {"replicas": 2, "consensus": ul.consensus.WASH(p=0.3)}),
    "one stage": (ul.credit.PipeDream(), {"stages": 1}),
    "warm-up": (ul.credit.PETRA(warm_up=100), {"model": reversible(), "stages": 4}),
}


@pytest.mark.parametrize("name", BACKPROPAGATION)
def test_backpropagation_has_cosine_and_ratio_1_at_every_stage(name: str) -> None:
    """Also while it learns, whatever becomes of the gradient afterwards, and on every replica."""
    credit, options = BACKPROPAGATION[name]
    options = {"model": plain(), **options}
    options["model"] = copy.deepcopy(options["model"])
    probe = GradientCosine(every=2)
    trainer = looked(credit, probe, optimizer=sgd(0.2), **options)
    assert_exact(probe.records, set(range(trainer.stages)))
    expected = {(s, n) for s in range(2, trainer.steps + 1, 2) for n in range(trainer.replicas)}
    assert {(record["step"], record["replica"]) for record in probe.records} == expected
    assert len(probe.records) == len(expected) * trainer.stages


STANDING_STILL = [
    ul.credit.PipeDream(),
    ul.credit.PipeDream(keep="input"),
    ul.credit.PipeDream2BW(),
    ul.credit.DelayedGradients(),
    ul.credit.FeaturesReplay(),
    ul.credit.FDG(shrink=1.0),
    ul.credit.PETRA(),
]


@pytest.mark.covering
@pytest.mark.parametrize("credit", STANDING_STILL, ids=str)
@pytest.mark.parametrize("accumulate", [1, 3, 4])
def test_a_delay_does_not_matter_while_the_weights_stand_still(credit: ul.credit.Credit, accumulate: int) -> None:
    """Learning rate 0, with dropout: so the probe takes each update's own micro-batches, and their own masks."""
    if credit.name == "pipedream-2bw" and accumulate < J - 1:
        pytest.skip("it wants a micro-batch for each hop")
    probe = GradientCosine(every=1)
    model = reversible(0.2) if isinstance(credit, ul.credit.PETRA) else plain(0.2)
    looked(credit, probe, epochs=2, model=model, optimizer=sgd(0.0), accumulate=accumulate)
    assert_exact(probe.records, set(range(J)))
    depth = J - 1 if credit.hop == 1 else 2 * (J - 1)
    first = -(-(depth + accumulate) // accumulate)  # the step in which stage 0 has had its first backwards
    assert min(record["step"] for record in probe.records if record["stage"] == 0) == first


@pytest.mark.parametrize("kind", [ul.credit.FDG, ul.credit.DDG, ul.credit.FeaturesReplay])
def test_the_ratio_shows_the_shrinking(kind: Callable[..., ul.credit.Credit]) -> None:
    """β^{J−1−j} at stage j."""
    probe = GradientCosine(every=1)
    looked(kind(shrink=0.7), probe, optimizer=sgd(0.0))
    assert_exact(probe.records, set(range(J)), ratio=lambda stage: 0.7 ** (J - 1 - stage))


def test_late_gradients_of_moving_weights_are_told_from_exact_ones() -> None:
    """The last stage of pipedream has no delay, but the stages below it have; the more the further down, on the whole."""
    probe = GradientCosine(every=1)
    looked(ul.credit.PipeDream(), probe, samples=480, optimizer=sgd(0.3), model=m.mlp(depth=6))
    means = {stage: sum(row) / len(row) for stage, row in by_stage(probe.records, "cosine").items()}
    assert means[J - 1] == pytest.approx(1.0, abs=0.05)
    assert means[0] < means[J - 1] - 0.05


def test_against_gradients_computed_by_hand() -> None:
    """Pipedream's first stage in step 5: the micro-batch of step 2, at the weights of the end of step 4."""
    probe, model = GradientCosine(every=5), m.mlp()
    trainer = m.trainer(ul.credit.PipeDream(), stages=J, model=model, optimizer=sgd(0.3))
    probe.on_start(trainer, 1)
    weights, used = trainer.weights[0], []
    update = weights.update
    weights.update = lambda: (used.append([x.grad.clone() for x in weights.parameters]), update())  # type: ignore[method-assign]
    for step in range(1, 6):
        before = copy.deepcopy(model)
        trainer.step(*m.batch(12, seed=step))
        probe.on_step(trainer, {})
    x, y = m.batch(12, seed=2)
    nn.functional.cross_entropy(before(x), y).backward()
    exact = [p.grad for p in list(before.parameters())[: len(used[-1])]]
    a, b = (torch.cat([g.flatten() for g in row]) for row in (used[-1], exact))
    (record,) = [record for record in probe.records if record["stage"] == 0]
    assert record["cosine"] == pytest.approx(float(nn.functional.cosine_similarity(a, b, dim=0)), abs=1e-12)
    assert record["ratio"] == pytest.approx(float(a.norm() / b.norm()), rel=1e-12)
    assert 0 < record["cosine"] < 0.999


def test_dgl_follows_the_networks_loss_in_its_last_stage_only() -> None:
    """Heads below are no part of the network, so their gradients do not count."""
    probe = GradientCosine(every=2)
    looked(ul.credit.DGL(head="linear", budget=None), probe, optimizer=sgd(0.1), model=plain(0.2))
    found = by_stage(probe.records, "cosine")
    assert found.keys() == set(range(J)) and found[J - 1] == pytest.approx([1.0] * 4, abs=1e-12)
    assert all(value < 0.99 for stage in range(J - 1) for value in found[stage])


def test_a_gradient_of_the_other_sign_has_cosine_minus_1() -> None:
    """A gradient that is turned on its way to the update, not in the network: by a hook of the weights."""
    probe = GradientCosine(every=1)
    trainer = m.trainer(ul.credit.Backprop(), stages=2, optimizer=sgd(0.1))
    for x in trainer.chains[0][0].parameters():
        x.register_hook(lambda gradient: -3 * gradient)
    trainer.fit(m.data(24), 1, batch_size=12, callbacks=[probe])
    assert by_stage(probe.records, "cosine")[0] == pytest.approx([-1.0, -1.0], abs=1e-12)
    assert by_stage(probe.records, "ratio")[0] == pytest.approx([3.0, 3.0], rel=1e-12)
    assert by_stage(probe.records, "cosine")[1] == pytest.approx([1.0, 1.0], abs=1e-12)


def test_mitigated_gradients_are_looked_at_after_their_mitigation() -> None:
    """Staleness-aware: divided by the delay, J − 1 − j in the steady state."""
    probe = GradientCosine(every=8)
    looked(ul.credit.PipeDream(), probe, optimizer=sgd(0.0), mitigation=ul.mitigation.StalenessAware())
    assert_exact(probe.records, set(range(J)), ratio=lambda stage: 1 / max(1, J - 1 - stage))


def test_the_step_after_an_emptied_pipeline_begins_with_the_weights_it_left() -> None:
    """Only the last stage is updated in it, by a gradient that is not late; what the emptying did belongs to no step."""
    probe = GradientCosine(every=4)
    trainer = m.trainer(ul.credit.PipeDream(), stages=J, optimizer=sgd(0.5))
    probe.on_start(trainer, 1)
    for step in range(4):
        if step == 3:
            trainer.drain()
        trainer.step(*m.batch(12, seed=step))
        probe.on_step(trainer, {})
    assert_exact(probe.records, {J - 1})


def test_only_micro_batches_whose_update_is_to_come_are_kept() -> None:
    """2(J − 1) of PETRA's first stage, and those that wait for the rest of their update; none of backpropagation's."""
    for credit, expected in ((ul.credit.PETRA(), 6 + 6 % 4), (ul.credit.Backprop(), 0)):
        probe = GradientCosine(every=3)
        trainer = m.trainer(credit, stages=J, model=reversible(), optimizer=sgd(0.1), accumulate=4)
        probe.on_start(trainer, 1)
        for step in range(7):
            trainer.step(*m.batch(12, seed=step))
            probe.on_step(trainer, {})
        assert len(probe._alignment._batches[0]) == expected


def test_a_frozen_batchnorm_stays_frozen_in_the_probe() -> None:
    model = plain()
    probe = GradientCosine(every=1)
    trainer = m.trainer(ul.credit.Backprop(), stages=2, model=model, optimizer=sgd(0.1))
    probe.on_start(trainer, 1)
    for part in model.modules():  # after the probe has made its copy
        part.train(not isinstance(part, nn.BatchNorm1d))
    trainer.step(*m.batch(12))
    probe.on_step(trainer, {})
    assert_exact(probe.records, {0, 1})


def test_a_zero_gradient_has_no_cosine() -> None:
    probe, model = GradientCosine(every=1), m.mlp(depth=2)
    with torch.no_grad():
        model[-1].weight.zero_()
    looked(ul.credit.Backprop(), probe, stages=2, model=model, optimizer=sgd(0.0), samples=12)
    assert [record["cosine"] for record in probe.records if record["stage"] == 0] == [None]


# ---- reconstruction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "lr"), [("nothing", 0.0), ("weights", 0.2)])
def test_without_other_weights_only_rounding_is_left(keep: str, lr: float) -> None:
    probe = ReconstructionError(every=2)
    looked(ul.credit.PETRA(keep=keep), probe, model=reversible(0.2), optimizer=sgd(lr))
    assert len(probe.records) >= 6
    assert all(0 < record["worst"] < 1e-13 and record["error"] <= record["worst"] for record in probe.records)


def test_with_updates_in_between_the_error_is_that_of_todays_weights() -> None:
    """Two stages (cut so that the first is stem, split and one coupling): by hand."""
    torch.manual_seed(0)
    unit = Coupling(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    model = nn.Sequential(nn.Sequential(nn.Linear(5, 6), Split(), unit), nn.Linear(12, 3)).double()
    probe = ReconstructionError(every=1)
    trainer = m.trainer(ul.credit.PETRA(), stages=2, model=model, optimizer=lambda p: torch.optim.SGD(p, lr=0.3))
    expected, old = [], {}
    probe.on_start(trainer, 1)
    for step in range(6):
        x = m.batch(12, seed=step)[0]
        with torch.no_grad():
            z = model[0][1](model[0][0](x))
            old[step] = z, unit(z)
            before = copy.deepcopy(unit)
        trainer.step(x, m.batch(12, seed=step)[1])
        if step >= 2:
            true, out = old[step - 2]
            # what comes down is the output itself: the last stage kept its input
            expected.append(distance(before.inverse(out), true))
    probe.on_stop(trainer, "finished")
    assert [record["error"] for record in probe.records] == pytest.approx(expected, rel=1e-9, abs=1e-14)
    assert [record["delay"] for record in probe.records] == [0, 1, 2, 2]
    assert [record["step"] for record in probe.records] == [1, 2, 3, 4]
    assert expected[-1] > 1e-3


def test_one_micro_batch_of_a_step_and_the_lowest_unit_are_looked_at() -> None:
    """Weights that stand still: the error is that of the rounding, of the step's first micro-batch."""
    torch.manual_seed(0)
    row = [Coupling(nn.Sequential(nn.Linear(6, 6), nn.Tanh())) for _ in range(4)]
    model = nn.Sequential(nn.Sequential(nn.Linear(5, 6), Split(), *row), nn.Linear(12, 3)).double()
    probe = ReconstructionError(every=2)
    chain = ul.Chain([ul.Stage(model[0]), ul.Stage(model[1])])
    trainer = ul.Trainer(chain, credit=ul.credit.PETRA(), optimizer=sgd(0.0), accumulate=2)
    probe.on_start(trainer, 1)
    for step in range(4):
        trainer.step(*m.batch(12, seed=step))
    trainer.drain()
    assert [record["step"] for record in probe.records] == [2, 4]
    errors = rounding(model[0], m.batch(12, seed=1)[0][:6])
    assert (probe.records[0]["error"], probe.records[0]["worst"]) == (errors[0], max(errors)) and errors[0] != errors[
        -1
    ]


def test_a_larger_learning_rate_reconstructs_worse() -> None:
    worst = []
    for lr in (0.01, 0.1):
        probe = ReconstructionError(every=1)
        looked(ul.credit.PETRA(), probe, samples=240, model=reversible(), optimizer=sgd(lr))
        worst.append(max(record["worst"] for record in probe.records))
    assert worst[1] > 3 * worst[0] > 0


def test_rounding_of_a_whole_body() -> None:
    """One error per reversible unit; a part that is not reversible begins anew; nothing is touched."""
    model, x = reversible(), m.batch(12)[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exact, rough = rounding(model, x), rounding(copy.deepcopy(model).float(), x.float())
    assert len(exact) == len(rough) == 6
    assert max(exact) < 1e-14 and all(1e-9 < error < 1e-5 for error in rough)
    m.assert_same(before, dict(model.state_dict()))


def test_rounding_sees_what_an_inverse_misses() -> None:
    class _Off(Coupling):
        def inverse(self, z: Tensor) -> Tensor:
            return super().inverse(z) * 1.5

    unit = _Off(nn.Linear(3, 3))
    assert rounding(nn.Sequential(unit), torch.randn(2, 6)) == pytest.approx([0.5], rel=1e-5)


@pytest.mark.parametrize("credit", [ul.credit.Backprop(), ul.credit.PETRA(keep="input")], ids=str)
def test_what_reconstructs_nothing_is_refused(credit: ul.credit.Credit) -> None:
    with pytest.raises(InvalidChoice, match="reconstructs nothing"):
        looked(credit, ReconstructionError(every=1), model=reversible())


# ---- nothing changes ----------------------------------------------------------------------------------------------------

CREDITS = {
    "backprop": ul.credit.Backprop,
    "pipedream": ul.credit.PipeDream,
    "petra": ul.credit.PETRA,
    "fdg": ul.credit.FDG,
    "dgl": lambda: ul.credit.DGL(head="linear", budget=None),
    "greedy": lambda: ul.credit.Greedy(head="linear", budget=None),
}


@pytest.mark.covering
@pytest.mark.parametrize("name", CREDITS)
@pytest.mark.parametrize("replicas", [1, 2])
def test_looking_changes_no_bit(name: str, replicas: int) -> None:
    """With dropout, BatchNorm, validation in between, and the user's own random numbers."""

    def trained(probes: list[ul.callbacks.Callback]) -> tuple[dict[str, Tensor], list, Tensor]:
        model = reversible(0.3) if name == "petra" else plain(0.3)
        consensus = ul.consensus.AllReduce() if replicas == 2 else None
        trainer = m.trainer(
            CREDITS[name](), consensus, stages=J, model=model, replicas=replicas, accumulate=2, clip=1.0
        )
        torch.manual_seed(5)
        records = trainer.fit(m.data(96), 2, validate=m.data(30, seed=1), batch_size=12, callbacks=probes)
        assert not any(isinstance(worker.transport, Watched) for worker in trainer.workers)
        kept = [(record["losses"], record["validation"], record["bytes"]) for record in records]
        optimizers = {
            f"{k}.{i}.{key}": value
            for k, weights in enumerate(trainer.weights)
            for i, entries in weights.store.optimizer.state_dict()["state"].items()
            for key, value in entries.items()
            if isinstance(value, Tensor)
        }
        return {**m.state(trainer), **optimizers}, kept, torch.rand(3)

    probes: list[ul.callbacks.Callback] = [GradientCosine(every=1)]
    probes += [GradientCosine(every=3)]
    probes += [ReconstructionError(every=1)] if name == "petra" else []
    plainly, probed = trained([]), trained(probes)
    m.assert_same(plainly[0], probed[0])
    assert plainly[1] == probed[1] and torch.equal(plainly[2], probed[2])
    assert all(probe.records for probe in probes)
    assert [record for record in probes[0].records if record["step"] % 3 == 0] == probes[1].records


def test_in_bf16_the_probe_computes_as_the_run_does() -> None:
    probe = GradientCosine(every=1)
    model = m.mlp(norm=True, dtype=torch.float32)
    trainer = m.trainer(ul.credit.Backprop(), stages=J, model=model, optimizer=sgd(0.1), precision="bf16")
    trainer.fit(m.data(48, dtype=torch.float32), 1, batch_size=12, callbacks=[probe])
    assert all(record["cosine"] == pytest.approx(1.0, abs=1e-9) for record in probe.records) and probe.records


# ---- the callbacks ------------------------------------------------------------------------------------------------------


def test_records_go_to_a_file_that_a_resumed_run_goes_on_with(tmp_path: Path) -> None:
    file = tmp_path / "alignment.json"
    first = GradientCosine(every=3, to=file)
    trainer = m.trainer(ul.credit.PipeDream(), stages=J, optimizer=sgd(0.1))
    trainer.fit(m.data(96), 1, batch_size=12, callbacks=[first], checkpoint=tmp_path / "run")
    assert json.loads(file.read_text()) == first.records and {r["step"] for r in first.records} == {3, 6}
    again = ul.Trainer.resume(tmp_path / "run", trainer.chains[0], optimizer=sgd(0.1))
    second = GradientCosine(every=3, to=file)
    again.fit(m.data(96), 2, batch_size=12, callbacks=[second])
    assert second.records[: len(first.records)] == first.records
    assert {r["step"] for r in json.loads(file.read_text())} == {3, 6, 9, 12, 15}


def test_a_report_shows_what_a_run_recorded(tmp_path: Path) -> None:
    """A section with the methods' curves if there is something, none otherwise; a damaged file is said."""
    log = ul.callbacks.EventLog(tmp_path / "events.jsonl")
    probe = GradientCosine(every=3, to=tmp_path / "alignment.json")
    trainer = m.trainer(ul.credit.PipeDream(), stages=J, optimizer=sgd(0.1))
    trainer.fit(m.data(96), 1, batch_size=12, callbacks=[log, probe])
    page = write_report(tmp_path).read_text()
    assert 'id="alignment"' in page and "Cosine to backpropagation" in page and page.count("stage 3") >= 1
    (tmp_path / "alignment.json").write_text('[{"stage": "low"}]')
    with pytest.raises(BadData, match=r"alignment\.json"):
        write_report(tmp_path)
    (tmp_path / "alignment.json").unlink()
    assert 'id="alignment"' not in write_report(tmp_path).read_text()


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
@pytest.mark.parametrize("kind", [GradientCosine, ReconstructionError])
def test_every_must_be_a_number_of_steps(kind: Callable[..., object], every: object) -> None:
    with pytest.raises(InvalidChoice, match="whole number of steps"):
        kind(every=every)


def test_stages_that_are_elsewhere_are_refused() -> None:
    trainer = m.trainer(ul.credit.Backprop(), stages=2)
    trainer.workers = trainer.workers[:1]
    with pytest.raises(InvalidChoice, match="1 of 2 workers"):
        GradientCosine(every=1).on_start(trainer, 1)
