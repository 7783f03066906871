"""What the other tests let pass: each theorem here was seen to fail on a mutant of the core that survived them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

import unlocked as ul
from unlocked import checkpoint as checkpoint_module
from unlocked import costs
from unlocked.batch import micro_batches
from unlocked.errors import BadCheckpoint, CannotCut, InvalidChoice, UnlockedError
from unlocked.evaluation import Score
from unlocked.partition import partition
from unlocked.probes.memory import SavedBytes
from unlocked.rules.shuffle import draw
from unlocked.simulation.retiming import retimed
from unlocked.timeline import Act, Timeline
from unlocked.worlds import InProcess

from methods import assert_same, batch, data, mlp, momentum, state, trainer

cross_entropy = nn.functional.cross_entropy


class Still(torch.optim.SGD):
    """Leaves the parameters alone, so that only the shuffle is seen."""

    def step(self, closure=None):
        return None


class Note(ul.callbacks.Callback):
    """Keeps the losses of every step and the reason of the end; may send Ctrl-C or fail after some updates."""

    def __init__(self, stop_after=None, fail_after=None):
        self.stop_after, self.fail_after = stop_after, fail_after
        self.losses, self.reason = [], None

    def on_step(self, trainer, record):
        self.losses.append(record["losses"])
        if trainer.steps == self.stop_after:
            os.kill(os.getpid(), signal.SIGINT)
        if trainer.steps == self.fail_after:
            raise ZeroDivisionError

    def on_stop(self, trainer, reason):
        self.reason = reason


# ---- kernel and timeline -----------------------------------------------------------------------------------------------


def test_a_peer_is_the_same_stage_of_another_replica():
    got = {}

    async def program(worker):
        mine = torch.tensor(10 * worker.replica + worker.stage)
        got[worker.place] = int(await worker.replicas.peer(1 - worker.replica).swap("x", mine))

    world = InProcess()
    world.run([(worker, program(worker)) for worker in world.mesh(2, 3)])
    assert got == {(r, s): 10 * (1 - r) + s for r in range(2) for s in range(3)}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_an_exchange_that_failed_leaves_nothing_for_the_next_run(order):
    world = InProcess()
    workers = world.mesh(2, 1)
    seen = []

    async def breaks(worker):
        if worker.replica == 1:
            raise ZeroDivisionError
        await worker.replicas.mean("m", [torch.tensor(100.0)])

    async def works(worker):
        (mean,) = await worker.replicas.mean("m", [torch.tensor(float(worker.replica))])
        seen.append(mean.item())

    with pytest.raises(ZeroDivisionError):
        world.run([(worker, breaks(worker)) for worker in workers])
    world.run([(workers[k], works(workers[k])) for k in order])
    assert seen == [0.5, 0.5]


def test_exchanges_on_one_channel_meet_in_their_turn():
    """Whoever comes first to the next round does not meet those still in the last one."""
    seen = {}

    async def program(worker):
        means = []
        for turn in range(4):
            (mean,) = await worker.replicas.mean("m", [torch.tensor(float(10**turn * worker.replica))])
            means.append(mean.item())
        seen[worker.replica] = means

    world = InProcess()
    world.run([(worker, program(worker)) for worker in world.mesh(3, 1)])
    assert seen == {replica: [1.0, 10.0, 100.0, 1000.0] for replica in range(3)}


def test_dropout_depends_on_the_seed_and_the_replica():
    losses = []
    for seed in (0, 0, 1):
        session = trainer(ul.credit.Backprop(), model=mlp(dropout=0.5), seed=seed, replicas=2)
        x, y = batch()
        session.step([x, x], [y, y])
        losses += [worker.losses[-1].item() for worker in session.workers if worker.last]
    assert losses[:2] == losses[2:4]
    assert len({*losses[:2], *losses[4:]}) == 4


@pytest.mark.parametrize("stages", [1, 3])
def test_replicas_of_backprop_keep_the_activations_of_one_at_a_time(stages):
    peaks = []
    for replicas in (1, 3):
        session = trainer(ul.credit.Backprop(), stages=stages, replicas=replicas)
        parameters = [p for chain in session.chains for p in chain.parameters()]
        pairs = [batch(12, seed=n) for n in range(replicas)]
        with SavedBytes(ignore=parameters) as meter:
            session.step([x for x, _ in pairs], [y for _, y in pairs])
        peaks.append(meter.peak)
    assert peaks[0] == peaks[1]


def test_the_span_does_not_depend_on_the_order_of_recording():
    acts = [Act("F", 0, 1, 0, 0, 0, 2.0, 5.0), Act("F", 0, 0, 0, 0, 0, 1.0, 2.0)]
    assert Timeline(acts).span() == Timeline(acts[::-1]).span() == 4.0


def test_each_retimed_receive_waits_for_its_own_message():
    acts = []
    for number in range(3):
        acts.append(Act("F", 0, 0, number, 0, 0, number, number + 1.0))
        acts.append(Act("S", 0, 0, number, 0, 4, number + 1.0, number + 1.0, "up", (0, 1)))
    acts += [Act("R", 0, 1, number, 0, 4, 9.0, 9.0, "up", (0, 0)) for number in range(3)]
    assert [act.end for act in retimed(Timeline(acts)) if act.kind == "R"] == [1.0, 2.0, 3.0]


# ---- chain and cut -----------------------------------------------------------------------------------------------------


def test_a_state_with_unexpected_names_is_refused_unless_not_strict():
    chain = ul.cut(mlp(), 2, like=batch()[0])
    values = {name: torch.zeros_like(x) for name, x in chain.state_dict().items()}
    with pytest.raises(UnlockedError, match=r"unexpected \['extra'\]"):
        chain.load_state_dict(values | {"extra": torch.ones(1)})
    kept = chain.state_dict()["0.bias"].clone()
    del values["0.bias"]
    chain.load_state_dict(values | {"extra": torch.ones(1)}, strict=False)
    after = chain.state_dict()
    assert torch.equal(after.pop("0.bias"), kept)
    assert not any(x.any() for x in after.values())


def test_a_state_takes_a_prefix_and_is_detached_unless_asked():
    chain = ul.cut(mlp(), 2, like=batch()[0])
    outer = nn.ModuleDict({"net": chain})
    assert list(outer.state_dict()) == [f"net.{name}" for name in mlp().state_dict()]
    assert not any(x.requires_grad for x in chain.state_dict().values())
    assert all(x.requires_grad for x in chain.state_dict(keep_vars=True).values())


def test_the_example_of_a_chain_is_its_own():
    x = batch()[0]
    chain = ul.Chain([ul.Stage(nn.Linear(5, 3))], like=x)
    before = x[:2].clone()
    x.zero_()
    assert torch.equal(chain.example(), before)


def test_layers_are_modules_or_tensors_in_forward_order():
    chain = ul.cut(mlp(2, norm=True), 2, like=batch()[0])
    parameters = list(chain.parameters())
    for what, sizes in (("module", [2] * 5), ("tensor", [1] * 10)):
        layers = [own for _, _, own in chain.layers(what)]
        assert [len(own) for own in layers] == sizes
        assert all(a is b for a, b in zip([p for own in layers for p in own], parameters, strict=True))


def test_what_has_no_weight_matrix_is_no_stage_of_its_own():
    x = torch.randn(4, 2, 3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(CannotCut, match="whole number from 1 to 2"):
        ul.cut(model, 3, like=x)
    assert [len(stage.body) for stage in ul.cut(model, 2, like=x)] == [4, 1]


def test_each_balance_has_its_own_best_cut():
    model = nn.Sequential(nn.Embedding(1000, 8), nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 8))
    tokens = torch.randint(1000, (16, 8))
    for balance, sizes in (("parameters", [1, 3]), ("flops", [2, 2]), ("memory", [3, 1])):
        assert [len(stage.body) for stage in ul.cut(model, 2, like=tokens, balance=balance)] == sizes


def test_a_first_activation_in_place_does_not_write_into_the_data():
    x, _ = batch(dtype=torch.float32)
    before = x.clone()
    chain = ul.cut(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)), 2, like=x)
    chain(x)
    assert torch.equal(x, before)


def test_weights_that_no_piece_has_are_named():
    class Spare(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(5, 5), nn.Linear(5, 3))
            self.spare = nn.Parameter(torch.zeros(2))

        def pieces(self):
            return [ul.models.Piece(name, module) for name, module in self.named_children()]

    with pytest.raises(CannotCut, match="in none of its pieces: spare"):
        ul.cut(Spare(), 2, like=torch.randn(4, 5))


class Odd(nn.Module):
    """Submodule `twice` is called twice; a residual around `block` starts at the output of `enter`."""

    def __init__(self):
        super().__init__()
        self.enter, self.block, self.twice = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        x = self.enter(x)
        x = x + self.block(x)
        return self.twice(self.twice(x))


class Two(Odd):
    def forward(self, x, y):
        return self.block(self.enter(x))


@pytest.mark.parametrize(
    "model, at, words",
    [
        (Odd, ["twice"], "'twice' is called 2 times"),
        (Odd, ["enter", "block"], "2 values cross"),
        (Odd, ["enter", "enter"], "not in the order"),
        (Two, ["enter"], "takes 2 inputs"),
    ],
)
def test_more_impossible_split_points_are_refused(model, at, words):
    with pytest.raises(CannotCut, match=words):
        ul.cut(model(), at=at, like=torch.randn(4, 5))


def test_the_largest_part_comes_first_and_then_the_evenness():
    assert partition([4.0, 5.0, 9.0, 2.0], 3) == [2, 1, 1]  # 9, 9, 2; the squares of 4, 5, 11 would be fewer
    assert partition([2.0, 9.0, 6.0, 5.0], 3) == [2, 1, 1]  # 11, 6, 5 rather than 2, 9, 11


def test_among_equal_partitions_the_cuts_are_the_earliest():
    assert partition([1.0, 0.0, 1.0], 2) == [1, 2]
    assert partition([0.0, 0.0, 0.0, 0.0], 3) == [1, 1, 2]


# ---- costs and memory --------------------------------------------------------------------------------------------------


def test_measuring_keeps_the_gradients_that_are_there():
    model, (x, y) = mlp(), batch()
    cross_entropy(model(x), y).backward()
    before = [parameter.grad for parameter in model.parameters()]
    values = [gradient.clone() for gradient in before]
    for measure in costs.MEASURES.values():
        measure(model, x)
    for parameter, gradient, value in zip(model.parameters(), before, values):
        assert parameter.grad is gradient and torch.equal(gradient, value)


def test_costs_of_a_linear_map_are_its_formulas():
    layer, x = nn.Linear(6, 10, bias=False), torch.randn(4, 6)
    assert costs.flops(layer, x) == 2 * 4 * 6 * 10
    assert costs.parameters(layer) == 60
    assert costs.saved_bytes(layer, x) == 4 * 6 * 4  # its input; the weight is there anyway


def test_a_saved_view_keeps_the_whole_storage():
    x = torch.randn(8, 16, requires_grad=True)
    with SavedBytes() as meter:
        part = (x + 1)[:, :2]
        y = part * part
        assert meter.live == 8 * 16 * 4
        del y
    assert meter.live == 0


def test_a_storage_is_live_until_the_last_graph_that_saved_it_is_gone():
    h = torch.randn(8, 16, requires_grad=True)
    with SavedBytes() as meter:
        square, sine = h * h, h.sin()
        del square
        assert meter.live == 8 * 16 * 4
        del sine
        assert meter.live == 0


def test_one_sample_is_enough_to_cut_and_measure():
    """Shapes and operations are followed in evaluation mode: BatchNorm could not train on one sample."""
    x = batch(1)[0]
    chain = ul.cut(mlp(norm=True), 3, like=x)
    assert len(chain) == 3 and chain.training
    assert costs.flops(chain, x) == 2 * (5 * 7 + 3 * 7 * 7 + 7 * 3)


# ---- batches and credit ------------------------------------------------------------------------------------------------


def test_every_micro_batch_has_its_own_number():
    x, y = batch(7)
    parts = list(micro_batches(x, y, 3, 6, 1))
    assert [part.number for part in parts] == [6, 7, 8] and {part.phase for part in parts} == {1}
    assert [part.weight * 7 for part in parts] == pytest.approx([3, 2, 2])
    session, seen = trainer(ul.credit.Backprop(), accumulate=2), []
    for k in range(3):
        session.step(*batch(12, seed=k))
        seen.append({act.micro_batch for act in session.timeline})
    assert seen == [{0, 1}, {2, 3}, {4, 5}]


def test_heads_start_differently_at_each_stage_and_for_each_seed_and_leave_the_users_stream_alone():
    def heads(seed):
        session = trainer(ul.credit.DGL(head="linear", budget=None), stages=4, seed=seed)
        return [torch.cat([p.detach().flatten() for p in stage.head.parameters()]) for stage in session.chains[0][:3]]

    model = mlp()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    trainer(ul.credit.DGL(head="linear", budget=None), model=model)
    assert torch.equal(torch.rand(3), expected)
    first, again, other = heads(0), heads(0), heads(1)
    for j in range(3):
        assert torch.equal(first[j], again[j]) and not torch.equal(first[j], other[j])
        assert all(not torch.equal(first[j], first[k]) for k in range(j))


def test_a_head_costs_its_share_of_its_own_stage():
    model = ul.models.build("cnn", input_shape=(1, 8, 8), classes=10)
    x = torch.randn(2, 1, 8, 8)
    session = ul.Trainer(ul.cut(model, 4, like=x), credit=ul.credit.DGL(head="mlp"), optimizer=momentum)
    for stage, report in zip(session.chains[0], session.heads):
        h = costs.run_once(stage.body, x)
        assert report.share == costs.flops(stage.head, h) / costs.flops(stage.body, x) <= 0.10
        x = h


def test_frozen_stages_of_greedy_learning_get_no_gradient():
    session = trainer(ul.credit.Greedy(head="linear", budget=None), stages=3)
    session.fit(data(24), 1, batch_size=12)
    assert all(parameter.grad is None for parameter in session.chains[0].parameters())


def test_without_idle_heads_only_the_heads_somebody_learns_from_are_built():
    session = trainer(ul.credit.Interlocking(2, head="linear", budget=None, idle_heads=False), stages=5)
    assert [stage.head is not None for stage in session.chains[0]] == [False, False, True, True, False]
    assert len(session.heads) == 2


def test_predsim_hands_its_statistic_to_its_heads():
    losses = []
    for statistic in ("flatten", "std"):
        torch.manual_seed(0)
        model = ul.models.build("cnn", input_shape=(1, 8, 8), classes=3, width=4, depth=3)
        chain = ul.cut(model, 2, like=torch.randn(4, 1, 8, 8))
        session = ul.Trainer(chain, credit=ul.credit.PredSim(statistic=statistic, budget=None), optimizer=momentum)
        losses.append(session.step(torch.randn(12, 1, 8, 8), torch.arange(12) % 3))
    assert losses[0][0] != losses[1][0] and losses[0][1] == losses[1][1]


# ---- consensus ---------------------------------------------------------------------------------------------------------


def test_all_reduce_clips_the_mean_gradient():
    """N clipped shards are the clipped big batch: the norm is bounded after the mean, not before."""
    model, (x, y) = mlp(), batch(12)
    x[:6] *= 20  # one replica's gradient is much larger
    whole = trainer(ul.credit.Backprop(), model=model, clip=0.05)
    split = trainer(ul.credit.Backprop(), ul.consensus.AllReduce(), replicas=2, clip=0.05)
    whole.step(x, y), split.step(x, y)
    for a, b in zip(whole.chains[0].parameters(), split.chains[1].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def moved(rule, steps=1, seed=0, stages=5, credit=None):
    """Which scalars of replica 0 changed in each step: one {tensor name: mask} per step; nothing but the shuffle acts."""
    credit = credit or ul.credit.DGL(head="linear", budget=None)
    session = trainer(credit, rule, stages=stages, replicas=5, seed=seed, optimizer=lambda ps: Still(ps, lr=0.0))
    masks = []
    for k in range(steps):
        with torch.no_grad():
            for n, chain in enumerate(session.chains):
                for parameter in chain.parameters():
                    parameter.fill_(n)
        session.step(batch(10, seed=k)[0].repeat(5, 1), batch(10, seed=k)[1].repeat(5))
        named = nn.Module.named_parameters(session.chains[0])
        masks.append({name: parameter.detach().clone() != 0 for name, parameter in named})
    return masks


def test_a_shuffle_is_drawn_anew_for_each_update_layer_and_seed():
    rule = ul.consensus.WASH(p=0.5, schedule="constant")
    first, second = moved(rule, steps=2)
    (other,) = moved(rule, seed=1)
    layers = [f"stages.{j}.body.0_{2 * j}.weight" for j in (1, 2, 3)]  # 7 × 7 each
    for j, name in enumerate(layers):
        assert not torch.equal(first[name], second[name])
        assert not torch.equal(first[name], other[name])
        assert all(not torch.equal(first[name], first[layers[k]]) for k in range(j))


def test_a_head_is_shuffled_as_the_last_layer_of_its_stage():
    (falling,) = moved(ul.consensus.WASH(p=1.0, schedule="decreasing"))
    (rising,) = moved(ul.consensus.WASH(p=1.0, schedule="increasing"))
    falling_share, rising_share = (
        [torch.cat([mask.flatten() for name, mask in masks.items() if f"stages.{j}.head" in name]).double().mean()
         for j in range(4)]
        for masks in (falling, rising)
    )  # fmt: skip
    expected = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]) * 4 / 5  # one of the five permuted values stays in place
    torch.testing.assert_close(torch.stack(falling_share).float(), expected[:4], rtol=0, atol=0.3)
    torch.testing.assert_close(torch.stack(rising_share).float(), expected.flip(0)[:4], rtol=0, atol=0.3)
    assert rising_share[0] == 0.0


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_scalar_of_a_tiny_tensor_is_drawn_alike(count):
    source, rounds, p = torch.Generator().manual_seed(0), 2000, 0.4
    hits = torch.zeros(count)
    for _ in range(rounds):
        hits[draw(count, p, 2, source)[0]] += 1
    assert (hits / rounds - p).abs().max() < 4.5 * (p * (1 - p) / rounds) ** 0.5


# ---- session -----------------------------------------------------------------------------------------------------------


def test_independent_replicas_see_the_data_in_orders_of_their_own():
    session = trainer(ul.credit.Backprop(), replicas=3)
    session.fit(data(60), 1, batch_size=12)
    weights = [torch.cat([p.detach().flatten() for p in chain.parameters()]) for chain in session.chains]
    assert all(not torch.equal(weights[a], weights[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_the_last_epoch_of_every_phase_is_validated():
    session = trainer(ul.credit.Greedy(head="linear", budget=None), stages=2)
    records = session.fit(data(24), 3, batch_size=12, validate=data(24, 1), validate_every=2)
    assert [record["validation"] is not None for record in records] == [False, True, True] * 2


def test_the_last_epoch_is_saved_whatever_checkpoint_every_says(tmp_path):
    session = trainer(ul.credit.Backprop())
    session.fit(data(24), 3, batch_size=12, checkpoint=tmp_path, checkpoint_every=2)
    resumed = ul.Trainer.resume(tmp_path, ul.cut(mlp(), 3, like=batch()[0]))
    assert resumed.epoch == 3
    assert_same(state(resumed), state(session))


@pytest.mark.parametrize(
    "note, error, reason",
    [
        ({"fail_after": 2}, ZeroDivisionError, "failed"),
        ({"stop_after": 2}, ul.Interrupted, "interrupted"),
    ],
)
def test_callbacks_hear_why_training_stopped(note, error, reason):
    watch = Note(**note)
    with pytest.raises(error):
        trainer(ul.credit.Backprop()).fit(data(), 1, batch_size=12, callbacks=[watch])
    assert watch.reason == reason


def test_a_second_ctrl_c_stops_in_the_middle_of_a_step():
    session = trainer(ul.credit.Backprop())

    def impatient(output, y):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        return cross_entropy(output, y)

    session.chains[0][2].loss = impatient
    with pytest.raises(KeyboardInterrupt) as stopped:
        session.fit(data(), 1, batch_size=12)
    assert stopped.type is KeyboardInterrupt and session.steps == 0


def test_reported_losses_are_means_over_replicas_and_over_the_steps_of_an_epoch():
    session = trainer(ul.credit.Backprop(), replicas=2)
    pairs = [batch(12, seed=n) for n in range(2)]
    (*_, loss) = session.step([x for x, _ in pairs], [y for _, y in pairs])
    assert loss == pytest.approx(sum(cross_entropy(mlp()(x), y).item() for x, y in pairs) / 2)
    watch = Note()
    (record,) = trainer(ul.credit.DGL(head="linear", budget=None)).fit(data(), 1, batch_size=12, callbacks=[watch])
    for j in range(3):
        assert record["losses"][j] == pytest.approx(sum(losses[j] for losses in watch.losses) / 5)


def test_the_loss_of_a_step_is_that_of_this_step_only():
    session = trainer(ul.credit.DGL(head="linear", budget=None), optimizer=lambda ps: Still(ps, lr=0.0))
    assert session.step(*batch()) == session.step(*batch())


def test_the_activation_peak_is_that_of_a_plain_forward_without_its_parameters():
    model, x, y = mlp(), data(12).x, data(12).y
    session = trainer(ul.credit.Backprop(), stages=1, model=model)
    with SavedBytes(ignore=model.parameters()) as meter:
        cross_entropy(model(x), y).backward()
    session.fit(data(12), 1, batch_size=12)
    assert session.activation_peak == meter.peak


def test_elapsed_is_the_sum_of_the_epochs_and_greedy_learning_keeps_its_epochs():
    session = trainer(ul.credit.Greedy(head="linear", budget=None), stages=2)
    records = session.fit(data(24), 2, batch_size=12)
    assert records[-1]["elapsed"] == session.elapsed == pytest.approx(sum(record["seconds"] for record in records))
    with pytest.raises(InvalidChoice, match="trains each stage for 2 epochs in this run, not 3"):
        session.fit(data(24), 3, batch_size=12)


# ---- evaluation --------------------------------------------------------------------------------------------------------


def test_a_loss_is_the_mean_over_samples_and_an_accuracy_that_over_tokens():
    session, test = trainer(ul.credit.Backprop()), data(60, 1)
    with torch.no_grad():
        expected = cross_entropy(session.chains[0](test.x), test.y).item()
    assert session.evaluate(test, batch_size=24).loss == pytest.approx(expected)  # batches of 24, 24 and 12
    score = Score()
    scores = torch.eye(4)[torch.tensor([[0, 1, 2], [3, 0, 1]])]
    score.add(scores, torch.tensor([[0, 1, 2], [3, 1, 2]]), None)
    assert score.accuracy == pytest.approx(4 / 6)


def test_what_is_evaluated_is_the_averaged_network():
    session, test = trainer(ul.credit.Backprop(), replicas=2), data(24, 1)
    session.fit(data(), 1, batch_size=12)
    losses = [cross_entropy(chain(test.x), test.y).item() for chain in (session.averaged(), session.chains[0])]
    assert session.evaluate(test).loss == pytest.approx(losses[0]) != pytest.approx(losses[1])


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_modes_as_they_were(training):
    session = trainer(ul.credit.Backprop(), replicas=2)
    for chain in session.chains:
        chain.train(training)
    session.evaluate(data(24, 1))
    assert all(chain.training is training for chain in session.chains)


def test_members_and_ensemble_are_read_at_the_stage_greedy_learning_trains():
    test = data(48, 1)
    session = trainer(ul.credit.Greedy(head="linear", budget=None), stages=2, replicas=2)
    session.fit(data(24), 1, batch_size=12)
    session.phase = 0
    with torch.no_grad():
        for j, stage in enumerate(chain[1] for chain in session.chains):
            stage.body[-1].bias.copy_(torch.eye(3)[j] * 1e3)  # the last stage now always answers j
    score = session.evaluate(test)
    expected = []
    for chain in session.chains:
        chain.eval()
        expected.append((chain.read(test.x, 0).argmax(1) == test.y).double().mean().item())
    assert score.members == pytest.approx(expected)


def test_the_ensemble_is_scored_by_its_mean_probability():
    session, test = trainer(ul.credit.Backprop(), replicas=3), data(60, 1)
    with torch.no_grad():
        for n, chain in enumerate(session.chains):
            chain[2].body[-1].weight.zero_()
            answer = [10.0, 0.0, 0.0] if n == 0 else [0.0, 3.0, 0.0]  # one is loud, two agree on another answer
            chain[2].body[-1].bias.copy_(torch.tensor(answer))
    share = [(test.y == c).double().mean().item() for c in range(3)]
    score = session.evaluate(test)
    assert score.members == pytest.approx([share[0], share[1], share[1]])
    assert score.ensemble == pytest.approx(share[1]) and share[0] != share[1]


def test_refreshing_reaches_the_heads_and_keeps_the_momentum():
    session, train = trainer(ul.credit.DGL(head="linear", budget=None), model=mlp(norm=True)), data(48)
    session.fit(train, 1, batch_size=12)
    chain = session.averaged(refresh=train)
    norms = [part for part in chain.modules() if isinstance(part, nn.BatchNorm1d)]
    in_heads = [part for stage in chain if stage.head is not None for part in stage.head.modules() if part in norms]
    assert in_heads and all(part.momentum == 0.1 for part in norms)
    assert all(int(part.num_batches_tracked) == 4 for part in norms)


# ---- keeping -----------------------------------------------------------------------------------------------------------


def test_a_resumed_session_knows_all_that_the_saved_one_knew(tmp_path):
    options = {
        "precision": "bf16", "batchnorm": "average", "schedule_every": "epoch", "clip": 2.0, "accumulate": 2,
        "seed": 9, "replicas": 2, "schedule": lambda opt: torch.optim.lr_scheduler.StepLR(opt, 1),
    }  # fmt: skip
    credit = ul.credit.Greedy(head="linear", budget=None)
    train, test = data(48, dtype=torch.float32), data(24, 1, dtype=torch.float32)
    session = trainer(credit, stages=2, model=mlp(norm=True, dtype=torch.float32), **options)
    with pytest.raises(ul.Interrupted):
        session.fit(train, 2, batch_size=12, callbacks=[Note(stop_after=10)], checkpoint=tmp_path)
    resumed = ul.Trainer.resume(tmp_path, ul.cut(mlp(norm=True, dtype=torch.float32), 2, like=test.x))
    names = [name for name in options if name != "schedule"]
    names += ["steps", "epoch", "phase", "batch_in_epoch", "elapsed", "epochs_per_phase", "batch_size"]
    for name in [*names, "activation_peak", "bytes_sent", "credit", "consensus"]:
        assert getattr(resumed, name) == getattr(session, name), name
    assert session.phase == 1 and session.elapsed > 0 and session.activation_peak
    assert resumed.evaluate(test) == session.evaluate(test)


def test_a_library_model_in_float64_resumes_in_float64(tmp_path):
    model = ul.models.build("mlp", input_shape=(6,), classes=3, depth=2).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    session = ul.Trainer(ul.cut(model, 2, like=x), optimizer=momentum)
    session.step(x, torch.tensor([0, 1, 2, 0]))
    session.save(tmp_path)
    assert_same(state(ul.Trainer.resume(tmp_path)), state(session))


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda ps: torch.optim.SGD([{"params": ps[:1]}, {"params": ps[1:], "lr": 0.5}], lr=0.1),
        lambda ps: Still(ps, lr=0.1),
    ],
    ids=["groups", "own class"],
)
def test_an_optimizer_that_cannot_be_described_must_be_given_again(optimizer, tmp_path):
    session = trainer(ul.credit.Backprop(), optimizer=optimizer)
    session.step(*batch())
    session.save(tmp_path)
    chain = ul.cut(mlp(), 3, like=batch()[0])
    with pytest.raises(BadCheckpoint, match=r"give it again: Trainer.resume\(path, optimizer="):
        ul.Trainer.resume(tmp_path, chain)
    resumed = ul.Trainer.resume(tmp_path, chain, optimizer=optimizer)
    session.step(*batch(seed=1)), resumed.step(*batch(seed=1))
    assert_same(state(resumed), state(session))


def test_latest_is_what_was_saved_last_not_the_highest_step(tmp_path):
    old, new = trainer(ul.credit.Backprop()), trainer(ul.credit.Backprop(), seed=1)
    for k in range(3):
        old.step(*batch(seed=k))
        old.save(tmp_path)
    new.step(*batch(seed=7))
    new.save(tmp_path)  # step 1, in a folder that holds steps 2 and 3
    resumed = ul.Trainer.resume(tmp_path, ul.cut(mlp(), 3, like=batch()[0]))
    assert resumed.steps == 1
    assert_same(state(resumed), state(new))


def test_a_failed_save_of_the_same_step_leaves_the_first_and_no_litter(tmp_path, monkeypatch):
    session = trainer(ul.credit.Backprop())
    session.step(*batch())
    session.save(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())

    def broken(*arguments, **keywords):
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(OSError):
        session.save(tmp_path)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert_same(state(ul.Trainer.resume(tmp_path, ul.cut(mlp(), 3, like=batch()[0]))), state(session))


def test_packing_keeps_every_kind_of_value():
    value = {0: (1, 2.5, None), "a": [True, ("b", torch.arange(3))], "c": {}}
    tensors: dict[str, torch.Tensor] = {}
    packed = json.loads(json.dumps(checkpoint_module.pack(value, "v", tensors)))
    again = checkpoint_module.unpack(packed, tensors)
    assert again[0] == value[0] and type(again[0]) is tuple and list(again) == list(value)
    assert again["a"][0] is True and type(again["a"][1]) is tuple and torch.equal(again["a"][1][1], torch.arange(3))
    with pytest.raises(BadCheckpoint, match=r"v\.x is a set"):
        checkpoint_module.pack({"x": {1}}, "v", {})


def test_a_checkpoint_of_another_dtype_is_refused(tmp_path):
    trainer(ul.credit.Backprop(), model=mlp(dtype=torch.float32)).save(tmp_path)
    with pytest.raises(BadCheckpoint, match=r"float32 in the checkpoint but .* torch\.float64 here"):
        ul.Trainer.resume(tmp_path, ul.cut(mlp(), 3, like=batch()[0]))


def test_an_event_log_appends_and_has_steps_only_if_asked(tmp_path):
    counts = []
    for steps in (False, True):
        log = ul.callbacks.EventLog(tmp_path / "log" / "events.jsonl", steps=steps)
        trainer(ul.credit.Backprop()).fit(data(36), 2, batch_size=12, callbacks=[log])
        rows = [json.loads(line) for line in (tmp_path / "log" / "events.jsonl").read_text().splitlines()]
        counts.append([row["event"] for row in rows])
    epochs_only = ["start", "epoch", "epoch", "stop"]
    assert counts[0] == epochs_only
    assert counts[1] == [*epochs_only, "start", *(["step"] * 3 + ["epoch"]) * 2, "stop"]
