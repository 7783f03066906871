"""The laws of the credit rules: each equals its formula, and another rule at each end of its parameter."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import unlocked as ul
from unlocked.batch import Batch
from unlocked.losses import logits
from unlocked.simulation.retiming import retimed
from unlocked.timeline import Timeline

from methods import assert_same, batch, credits, data, mlp, momentum, name_of, state, trainer


def gradients(session):
    """Every parameter's gradient after the backwards of one step, before the update takes them: {(stage, name): grad}."""
    seen = {}
    for weights in session.weights:
        stage, j = weights.stage, weights.worker.stage

        def look(stage=stage, j=j, update=weights.update):
            for name, parameter in stage.named_parameters():
                seen[(j, name)] = None if parameter.grad is None else parameter.grad.clone()
            update()

        weights.update = look
    session.step(*batch())
    return seen


def head_losses(chain, x, y):
    """The loss of every stage's head at the true activations, with one graph through all stages."""
    given, losses = Batch(x, y), []
    for stage in chain:
        x = stage(x)
        losses.append(stage.judge(stage.read(x), given))
    return losses


@given(stages=st.integers(1, 5), norm=st.booleans(), accumulate=st.sampled_from([1, 3]))
@settings(deadline=None, max_examples=20)
def test_backprop_over_stages_is_loss_backward_on_the_whole_network(stages, norm, accumulate):
    model = mlp(norm=norm)
    reference = copy.deepcopy(model)
    session = trainer(ul.credit.Backprop(), stages=stages, model=model, accumulate=accumulate)
    optimizer = momentum(list(reference.parameters()))
    for k in range(3):
        x, y = batch(12, seed=k)
        session.step(x, y)
        optimizer.zero_grad()
        for part_x, part_y in zip(x.chunk(accumulate), y.chunk(accumulate)):
            (torch.nn.functional.cross_entropy(reference(part_x), part_y) / accumulate).backward()
        optimizer.step()
    for name, x in reference.state_dict().items():
        torch.testing.assert_close(session.chains[0].state_dict()[name], x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("d", [0, 1, 2, 3, 4, 7])
def test_interlocking_is_the_gradient_of_the_head_d_stages_above(d):
    session = trainer(ul.credit.Interlocking(d, head="mlp", budget=None), stages=5, model=mlp(4))
    chain = copy.deepcopy(session.chains[0])
    seen = gradients(session)
    x, y = batch()
    losses = head_losses(chain, x, y)
    for j, stage in enumerate(chain):
        target = losses[min(j + d, 4)]
        for name, parameter in stage.body.named_parameters():
            (expected,) = torch.autograd.grad(target, parameter, retain_graph=True)
            torch.testing.assert_close(seen[(j, f"body.{name}")], expected, rtol=1e-10, atol=1e-13)
        if stage.head is not None:  # heads learn from their own loss only
            for name, parameter in stage.head.named_parameters():
                (expected,) = torch.autograd.grad(losses[j], parameter, retain_graph=True)
                torch.testing.assert_close(seen[(j, f"head.{name}")], expected, rtol=1e-10, atol=1e-13)


def bodies(session):
    return {name: x for name, x in state(session).items() if ".body." in name}


@pytest.mark.parametrize("norm", [False, True])
def test_interlocking_0_is_dgl_and_interlocking_all_is_backprop(norm):
    def trained(credit):
        session = trainer(credit, stages=4, model=mlp(norm=norm))
        for k in range(3):
            session.step(*batch(seed=k))
        return session

    assert_same(
        state(trained(ul.credit.Interlocking(0, budget=None))), state(trained(ul.credit.DGL(head="mlp", budget=None)))
    )
    backprop = bodies(trained(ul.credit.Backprop()))
    assert_same(bodies(trained(ul.credit.Interlocking(3, budget=None))), backprop)
    assert_same(bodies(trained(ul.credit.Interlocking(9, budget=None, idle_heads=False))), backprop)


@given(stages=st.integers(1, 5), d=st.integers(0, 6))
@settings(deadline=None, max_examples=25)
def test_idle_heads_change_no_body(stages, d):
    results = []
    for idle in (True, False):
        session = trainer(ul.credit.Interlocking(d, head="linear", budget=None, idle_heads=idle), stages=stages)
        session.step(*batch())
        results.append(bodies(session))
    assert_same(*results)


def unit_times(timeline):
    """The same acts, each computation one second long."""
    return Timeline(act._replace(start=0.0, end=float(act.kind in "FBL")) for act in timeline)


@pytest.mark.parametrize("d", [0, 1, 2])
def test_interlocking_step_does_not_grow_with_depth(d):
    """The critical path after the last forward: a gradient needs d hops, never J."""
    after_forward = set()
    for stages in (d + 3, d + 5, d + 8):
        session = trainer(ul.credit.Interlocking(d, head="linear", budget=None), stages=stages, model=mlp(12))
        session.step(*batch())
        times = retimed(unit_times(session.timeline))
        last = max(act.end for act in times if act.kind == "F")
        after_forward.add(times.span() - last)
    assert after_forward == {1.0 + d + 1.0}  # the last stage's loss, d hops down, and the farthest stage's own backward


def test_backprop_step_grows_with_depth_and_dgl_does_not_wait():
    spans = {}
    for credit in (ul.credit.Backprop(), ul.credit.DGL(head="linear", budget=None)):
        for stages in (4, 8):
            session = trainer(credit, stages=stages, model=mlp(8))
            session.step(*batch())
            spans[credit.name, stages] = retimed(unit_times(session.timeline)).span()
    assert spans["backprop", 8] - spans["backprop", 4] == 8.0  # four more forwards and four more backwards
    assert spans["dgl", 8] - spans["dgl", 4] == 4.0  # only the forwards
    assert spans["dgl", 8] == 9.0


@pytest.mark.parametrize("loud", range(4))
@pytest.mark.parametrize("row", [row for row in credits("local") if "phased" not in row.laws], ids=name_of)
def test_no_gradient_of_a_local_rule_leaves_its_stage(row, loud):
    """A thousandfold loss at one stage changes what that stage learns, and nothing anywhere else."""
    results = []
    for factor in (1.0, 1e3):
        session = trainer(row.make(), stages=4)
        stage = session.chains[0][loud]
        stage.judge = lambda output, batch, f=stage.judge, k=factor: k * f(output, batch)
        session.step(*batch())
        results.append({name: p.detach().clone() for name, p in torch.nn.Module.named_parameters(session.chains[0])})
    changed = {name.split(".")[1] for name in results[0] if not torch.equal(results[0][name], results[1][name])}
    assert changed == {str(loud)}


@pytest.mark.parametrize("row", credits("local"), ids=name_of)
def test_a_local_rule_follows_the_gradient_of_its_own_loss(row):
    session = trainer(row.make(), stages=4)
    chain = copy.deepcopy(session.chains[0])
    seen = gradients(session)
    x, y = batch()
    losses = head_losses(chain, x, y)
    trained = [0] if "phased" in row.laws else range(4)
    for j, stage in enumerate(chain):
        for name, parameter in stage.named_parameters():
            if j in trained:
                (expected,) = torch.autograd.grad(losses[j], parameter, retain_graph=True)
                torch.testing.assert_close(seen[(j, name)], expected, rtol=1e-10, atol=1e-13)
            else:
                assert (j, name) not in seen


@pytest.mark.parametrize("row", credits("one_stage_is_backprop"), ids=name_of)
def test_one_stage_is_backprop(row):
    results = []
    for credit in (row.make(), ul.credit.Backprop()):
        session = trainer(credit, stages=1, model=mlp(norm=True))
        session.fit(data(), 2, batch_size=12)
        results.append(state(session))
    assert_same(*results)


def test_greedy_changes_one_stage_at_a_time_batchnorm_included():
    session = trainer(ul.credit.Greedy(budget=None), stages=4, model=mlp(norm=True))
    before = state(session)

    class Watch(ul.callbacks.Callback):
        def __init__(self):
            self.phases = []

        def on_epoch(self, trainer, record):
            nonlocal before
            after = state(trainer)
            changed = {name.split(".")[1] for name in after if not torch.equal(after[name], before[name])}
            self.phases.append((record["phase"], changed))
            before = after

    watch = Watch()
    session.fit(data(), 2, batch_size=12, validate=data(24, 1), callbacks=[watch])
    assert watch.phases == [
        (0, {"0"}),
        (0, {"0"}),
        (1, {"1"}),
        (1, {"1"}),
        (2, {"2"}),
        (2, {"2"}),
        (3, {"3"}),
        (3, {"3"}),
    ]


def test_the_first_stage_of_greedy_learning_is_that_of_dgl():
    """Nothing above a stage of DGL touches it; so trained first and alone it comes to the same weights."""
    results = []
    for credit in (ul.credit.Greedy(budget=None), ul.credit.DGL(head="mlp", budget=None)):
        session = trainer(credit, stages=3, model=mlp(norm=True))
        session.fit(data(), 2, batch_size=12)
        results.append({name: x for name, x in state(session).items() if name.startswith("0.0.")})
    assert_same(*results)


def test_greedy_reads_out_the_stage_it_trains():
    session = trainer(ul.credit.Greedy(budget=None), stages=3)
    records = session.fit(data(), 1, batch_size=12, validate=data(24, 1))
    for record in records:
        stages = record["validation"]["stages"]
        assert record["validation"]["accuracy"] == stages[record["phase"]][1]


def test_predsim_is_its_formula():
    session = trainer(ul.credit.PredSim(beta=0.7, budget=None), stages=2)
    stage = session.chains[0][0]
    x, y = batch()
    h = stage.body(x)
    scores, features = stage.head(h)

    def rows(z):
        z = z - z.mean(1, keepdim=True)
        return z / (1e-8 + z.norm(dim=1, keepdim=True))

    onehot = torch.nn.functional.one_hot(y, 3).double()
    squares = sum(
        ((rows(features)[a] @ rows(features)[b] - rows(onehot)[a] @ rows(onehot)[b]) ** 2).item()
        for a in range(len(y))
        for b in range(len(y))
    )
    expected = 0.3 * torch.nn.functional.cross_entropy(scores, y).item() + 0.7 * squares / len(y) ** 2
    (loss, last) = session.step(x, y)
    assert loss == pytest.approx(expected, rel=1e-9)
    assert torch.equal(logits((scores, features)), scores)
    assert last is not None


def test_losses_are_none_where_a_stage_has_none():
    session = trainer(ul.credit.Backprop(), stages=3)
    losses = session.step(*batch())
    assert losses[:2] == [None, None]
    assert losses[2] == pytest.approx(torch.nn.functional.cross_entropy(mlp()(batch()[0]), batch()[1]).item())


def test_bytes_between_stages_are_those_of_the_formulas():
    activation = 12 * 7 * 8  # batch × units × float64
    for credit, down in ((ul.credit.Backprop(), 4), (ul.credit.DGL(head="linear", budget=None), 0)):
        session = trainer(credit, stages=5)
        session.step(*batch())
        assert session.bytes_sent["activation"] == 4 * activation
        assert session.bytes_sent.get("gradient", 0) == down * activation
    for d in range(6):
        session = trainer(ul.credit.Interlocking(d, head="linear", budget=None), stages=5)
        session.step(*batch())
        # stage j sends down one gradient for every head some stage below it learns from
        needed = sum(len({min(i + d, 4) for i in range(j) if min(i + d, 4) >= j}) for j in range(5))
        assert session.bytes_sent.get("gradient", 0) == needed * activation


@pytest.mark.parametrize("row", credits(), ids=name_of)
def test_no_gradient_is_computed_for_the_data(row):
    """It would be thrown away, and costs a whole backward through the first layer."""
    session = trainer(row.make(), stages=2)
    asked = []
    first = next(session.chains[0][0].body.children())
    first.register_forward_pre_hook(lambda module, inputs: asked.append(inputs[0].requires_grad))
    session.step(*batch())
    assert set(asked) == {False}


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_gpipe_is_backpropagation_with_accumulated_micro_batches_bit_for_bit(parts, stages):
    results = []
    for credit, accumulate in ((ul.credit.GPipe(parts), 2), (ul.credit.Backprop(), 2 * parts)):
        model = mlp(norm=True, dropout=0.3, dtype=torch.float32)
        session = trainer(credit, model=model, stages=stages, accumulate=accumulate, clip=0.5, seed=4)
        x, y = batch(24, dtype=torch.float32)
        losses = [session.step(x, y)[-1] for _ in range(3)]
        results.append((state(session), losses))
    assert_same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_gpipe_keeps_every_micro_batch_until_its_backward():
    """The forwards of all micro-batches come before the first backward of a stage (below the last)."""
    session = trainer(ul.credit.GPipe(3))
    session.step(*batch())
    acts = "".join(act.kind for act in session.timeline.of(0, 1) if act.kind in "FBU")
    assert acts == "FFFBBBU"


def test_gpipe_refuses_batches_that_are_too_small():
    with pytest.raises(ul.UnlockedError, match="splits a batch into 5 micro-batches; 4 samples are too few"):
        trainer(ul.credit.GPipe(5)).step(*batch(4))
    with pytest.raises(ul.UnlockedError, match="micro_batches=0 is not possible"):
        ul.credit.GPipe(0)
