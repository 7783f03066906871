"""ACCO and its baselines: against a loop over single samples, in every world, with unequal workers, killed and resumed."""

from __future__ import annotations

import copy
import time
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

import unlocked as ul
from test_distributed import here
from unlocked.consensus.sharded_update import Shard
from unlocked.errors import InvalidChoice, LostProcess, NonFiniteLoss, UnlockedError
from unlocked.rules.accumulation import clip_factor, pieces_of
from unlocked.simulation import Device, Hardware, costs_of, profile, simulate, uniform, unit
from unlocked.worlds import Distributed, InProcess, Simulated

from acco_reference import Reference, all_done
from methods import assert_same, batch, data, mlp, state
from processes import Processes, Training, finished, kill_me, killed, run_processes

RULES = {"acco": ul.consensus.ACCO, "dpu": ul.consensus.DPU, "wp": ul.consensus.WP}
OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.2),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.03, weight_decay=0.1),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.1, initial_accumulator_value=0.1),
}


def cross_entropy(model, x, y):
    return nn.functional.cross_entropy(model(x), y)


def odd_mlp():
    """161 parameters in the second layer and 7 · 3 + 3 in the last: no number of replicas divides them."""
    return mlp(2)


def session(rule, *, model=None, stages=1, replicas=2, accumulate=3, optimizer="adamw", credit=None, **options):
    model = model or odd_mlp()
    dtype = next(model.parameters()).dtype
    return ul.Trainer(
        ul.cut(model, stages, like=batch()[0].to(dtype)),
        credit=credit or ul.credit.Backprop(),
        consensus=rule,
        replicas=replicas,
        accumulate=accumulate,
        optimizer=OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer,
        **options,
    )


def batches_of(step, replicas, size=7):
    return [batch(size, seed=100 * step + n) for n in range(replicas)]


def train(made, steps=4, size=7):
    losses = []
    for k in range(steps):
        pairs = batches_of(k, made.replicas, size)
        losses.append(made.step([x for x, _ in pairs], [y for _, y in pairs])[-1])
    return losses


def assert_close(made, model):
    for chain in made.chains:
        for (name, a), b in zip(model.named_parameters(), chain.parameters()):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11, msg=name)


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)


# ---- the rules, against one loop over samples ------------------------------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
def test_equals_the_sequential_reference(kind, optimizer, replicas):
    """Seven samples in three micro-batches: halves, micro-batches and shards are all uneven."""
    options = {"clip": 0.4, "schedule": cosine}
    made = session(RULES[kind](), optimizer=optimizer, replicas=replicas, **options)
    reference = Reference(kind, odd_mlp(), OPTIMIZERS[optimizer], cross_entropy, accumulate=3, **options)
    train(made)
    for k in range(4):
        reference.step(batches_of(k, replicas))
    assert_close(made, reference.model)


@pytest.mark.parametrize("kind", RULES)
def test_stages_change_nothing(kind):
    made = session(RULES[kind](), stages=3, replicas=2, accumulate=4)
    reference = Reference(kind, odd_mlp(), OPTIMIZERS["adamw"], cross_entropy, accumulate=4)
    train(made, size=8)
    for k in range(4):
        reference.step(batches_of(k, 2, 8))
    assert_close(made, reference.model)


@pytest.mark.covering
@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("contributions", [(2, 1, 1), (1, 3, 2)])
def test_unequal_contributions_weight_every_sample_alike(kind, contributions):
    made = session(RULES[kind](contributions), stages=2, replicas=3, accumulate=5)
    reference = Reference(kind, odd_mlp(), OPTIMIZERS["adamw"], cross_entropy, accumulate=5)
    train(made, size=11)
    for k in range(4):
        reference.step(batches_of(k, 3, 11), all_done(5, reference.rounds, 3, contributions))
    assert_close(made, reference.model)
    sizes = [len(part) for part in torch.arange(11).tensor_split(5)]
    for n, weights in enumerate(made.weights[::2]):
        done = [k for part in all_done(5, reference.rounds, 3, contributions) for k in part[n]]
        assert weights.left_out == 4 * (11 - sum(sizes[k] for k in done))


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_the_estimates_learning_rate_is_scaled_and_nothing_else(scale):
    """With 0 the estimate of θ_{t+1} is θ_t: half of each gradient is one update late, so it is no large-batch update."""
    made = session(ul.consensus.ACCO(estimate=scale))
    reference = Reference("acco", odd_mlp(), OPTIMIZERS["adamw"], cross_entropy, scale=scale, accumulate=3)
    train(made)
    for k in range(4):
        reference.step(batches_of(k, 2))
    assert_close(made, reference.model)
    assert all(group["lr"] == 0.03 for weights in made.weights for group in weights.store.optimizer.param_groups)


def test_with_an_estimate_of_0_only_half_of_the_gradient_is_late():
    """θ_{t+1} = OPT(θ_t, (∇f_B(θ_{t−1}) + ∇f_A(θ_t)) / 2), by autograd on whole half-batches."""
    made = session(ul.consensus.ACCO(estimate=0.0), accumulate=2, replicas=2)
    model, before = odd_mlp(), None
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    for k in range(4):
        pairs = batches_of(k, 2, 8)
        x, y = torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])
        here_a = cross_entropy(model, x[:, :4].flatten(0, 1), y[:, :4].flatten())
        a = torch.autograd.grad(here_a, list(model.parameters()))
        b = torch.autograd.grad(
            cross_entropy(model, x[:, 4:].flatten(0, 1), y[:, 4:].flatten()), list(model.parameters())
        )
        for n, p in enumerate(model.parameters()):
            p.grad = a[n] if before is None else (a[n] + before[n]) / 2
        optimizer.step()
        before = b
    train(made, size=8)
    assert_close(made, model)


class Weighing(nn.Module):
    """Outputs linear in the weights, so that a mean of outputs has a gradient that does not depend on them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.Linear(5, 3).double()

    def forward(self, x):
        return self.weights(x)


def mean_of_own_class(h, y):
    return h.gather(1, y[:, None]).mean()


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_where_the_estimate_cannot_matter_it_is_large_batch_training(optimizer):
    """Gradients that do not depend on the weights: as if θ̃ = θ. One batch of round B of a step and round A of the next."""
    made = session(ul.consensus.ACCO(), model=nn.Sequential(Weighing()), optimizer=optimizer, accumulate=2)
    for chain in made.chains:
        chain[-1].loss = mean_of_own_class
    model = Weighing()
    stepped = OPTIMIZERS[optimizer](model.parameters())
    parts = []
    for k in range(4):
        pairs = batches_of(k, 2, 8)
        parts.append([(x[:4], y[:4]) for x, y in pairs])
        large = [pair for part in parts[-2:] for pair in part]
        loss = mean_of_own_class(model(torch.cat([x for x, _ in large])), torch.cat([y for _, y in large]))
        stepped.zero_grad()
        loss.backward()
        stepped.step()
        parts.append([(x[4:], y[4:]) for x, y in pairs])
    train(made, size=8)
    assert_close(made, model)


def test_the_closed_form_for_sgd():
    """θ_{t+1} = θ_t − (η/2)(∇f(θ_t) + ∇f(θ̃_t)), θ̃_{t+1} = θ_t − η ∇f(θ̃_t), on a quadratic with one batch for all."""
    rate, steps = 0.2, 6
    source = torch.Generator().manual_seed(4)
    x, target = torch.randn(6, 5, generator=source).double(), torch.randn(6, 3, generator=source).double()
    model = nn.Sequential(nn.Linear(5, 3, bias=False).double())
    made = session(ul.consensus.ACCO(), model=copy.deepcopy(model), accumulate=2, replicas=2, optimizer="sgd")
    for chain in made.chains:
        chain[-1].loss = lambda h, y: ((h - y) ** 2).sum(1).mean() / 2
    theta = tilde = model[0].weight.detach().clone()
    late = None
    for _ in range(steps):
        a, b = x[:3], x[3:]
        at_theta = (theta @ a.T - target[:3].T) @ a / 3
        update = at_theta if late is None else (at_theta + late) / 2
        estimate = theta if late is None else theta - rate * late
        late = (estimate @ b.T - target[3:].T) @ b / 3
        theta = theta - rate * update
        made.step([x, x], [target, target])
    assert not torch.allclose(tilde, theta, atol=0.1)
    torch.testing.assert_close(made.chains[0][0].body.state_dict().popitem()[1], theta, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", RULES)
def test_losses_are_means_of_what_was_done(kind):
    made = session(RULES[kind]((1, 2)), replicas=2, accumulate=4)
    model = odd_mlp()
    pairs = batches_of(0, 2, 9)
    (loss,) = train(made, 1, 9)  # all at the first weights: nothing was late yet
    done = all_done(4, 2 if kind == "acco" else 1, 2, (1, 2))
    means = []
    for n, (x, y) in enumerate(pairs):
        numbers = [k for part in done for k in part[n]]
        xs, ys = x.tensor_split(4), y.tensor_split(4)
        found = cross_entropy(model, torch.cat([xs[k] for k in numbers]), torch.cat([ys[k] for k in numbers]))
        means.append(found.item())
    assert loss == pytest.approx(sum(means) / 2, rel=1e-12)


class BySamples:
    """Half the learning rate for every six samples that went into the weights."""

    def __init__(self, reference):
        self.reference = reference

    def step(self):
        for group in self.reference.optimizer.param_groups:
            group["lr"] = 0.03 * 0.5 ** (sum(self.reference.samples) // 6)


@pytest.mark.parametrize("kind", RULES)
def test_a_schedule_follows_the_samples(kind):
    rule = RULES[kind]((1, 2), samples_per_schedule_step=6)

    def halving(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    made = session(rule, accumulate=4, schedule=halving)
    reference = Reference(kind, odd_mlp(), OPTIMIZERS["adamw"], cross_entropy, accumulate=4)
    reference.schedule = BySamples(reference)
    for k in range(5):
        reference.step(batches_of(k, 2, 9), all_done(4, reference.rounds, 2, (1, 2)))
    train(made, 5, 9)
    assert_close(made, reference.model)
    assert made.weights[0].seen == sum(reference.samples)
    expected = 0.03 * 0.5 ** (sum(reference.samples) // 6)
    assert made.learning_rates() == pytest.approx([expected])


def test_groups_of_parameters_keep_their_options():
    def grouped(parameters):
        parameters = list(parameters)
        flat = [p for p in parameters if p.dim() == 1]
        rest = [p for p in parameters if p.dim() > 1]
        return torch.optim.AdamW([{"params": flat, "weight_decay": 0.0, "lr": 0.1}, {"params": rest}], lr=0.03)

    made = session(ul.consensus.ACCO(), optimizer=grouped, replicas=3)
    reference = Reference("acco", odd_mlp(), grouped, cross_entropy, accumulate=3)
    train(made)
    for k in range(4):
        reference.step(batches_of(k, 3))
    assert_close(made, reference.model)


class Unused(nn.Module):
    """One layer has no part in the output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(5, 3).double(), nn.Linear(4, 4).double()

    def forward(self, x):
        return self.used(x)


def test_what_has_no_part_in_the_loss_is_left_alone():
    """Also by weight decay, as torch leaves alone what has no gradient."""
    model = Unused()
    before = copy.deepcopy(model.unused.state_dict())
    train(session(ul.consensus.ACCO(), model=nn.Sequential(model), replicas=2))
    assert all(torch.equal(x, before[name]) for name, x in model.unused.state_dict().items())


# ---- the split optimizer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
def test_the_optimizers_state_is_split(replicas):
    made = session(ul.consensus.ACCO(), replicas=replicas, optimizer="adamw")
    train(made, 2)
    values = sum(p.numel() for p in made.chains[0].parameters())
    held = [
        sum(x.numel() for entry in weights.part.state.values() for x in entry.values() if x.dim() > 0)
        for weights in made.weights
    ]
    assert sum(held) == 2 * values
    assert max(held) - min(held) <= 2
    assert all(not weights.store.optimizer.state for weights in made.weights)


@pytest.mark.parametrize("kind, factor", [("acco", 2), ("dpu", 1), ("wp", 1.5)])
def test_bytes_are_those_of_whole_exchanges(kind, factor):
    """Twice an all-reduce's a step for ACCO, once for DPU; the first step has one exchange less. Counts are 8 bytes."""
    n, steps = 3, 4
    made = session(RULES[kind](), replicas=n)
    train(made, steps)
    all_reduce = 2 * (n - 1) * sum(p.numel() * 8 for p in made.chains[0].parameters())  # of all replicas
    exchanges = 2 * steps - 1 if kind == "acco" else steps - 1
    counts = exchanges * n * (n - 1) * 8
    assert made.bytes_sent[kind] - counts == pytest.approx(
        all_reduce * (steps * factor - factor / (2 if factor == 2 else 1))
    )


def test_pieces_cover_everything_once():
    sizes = [3, 1, 0, 5, 2]
    edges = [0, 3, 7, 11]
    found = [pieces_of(sizes, a, b) for a, b in pairwise(edges)]
    seen = sorted((p.of, k) for row in found for p in row for k in range(p.begin, p.end))
    assert seen == [(i, k) for i, size in enumerate(sizes) for k in range(size)]
    assert [sum(p.end - p.begin for p in row) for row in found] == [3, 4, 4]


def test_clipping_is_torchs():
    gradient = torch.tensor([3.0, 4.0, 12.0], dtype=torch.float64)
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    for clip in (2.0, 20.0):
        parameter.grad = gradient.clone()
        nn.utils.clip_grad_norm_([parameter], clip)
        assert torch.allclose(parameter.grad, gradient * clip_factor([25.0, 144.0], clip), rtol=1e-12)


def test_groups_of_weights_are_clipped_by_their_own_norms():
    a, b = (nn.Parameter(torch.zeros(size, dtype=torch.float64)) for size in (3, 2))
    shard = Shard([a, b], [[a], [b]], torch.optim.SGD([a, b], lr=1.0), None, 0, 1)
    gradient = torch.tensor([3.0, 4.0, 12.0, 6.0, 8.0], dtype=torch.float64)
    assert shard.take([2 * gradient], 2, [True, True]) == [169.0, 100.0]
    shard.clip([0.5, 0.25])
    for _ in range(2):  # the same gradients may be used again
        (values,) = shard.foresee()
        assert torch.equal(values, -gradient * torch.tensor([0.5, 0.5, 0.5, 0.25, 0.25], dtype=torch.float64))


# ---- mitigations and refusals ----------------------------------------------------------------------------------------


def test_delay_compensation_sees_the_drift_of_one_update():
    made = session(ul.consensus.DPU(), optimizer="sgd", mitigation=ul.mitigation.DelayCompensation(lam=0.7))
    reference = Reference(
        "dpu", odd_mlp(), OPTIMIZERS["sgd"], cross_entropy, accumulate=3, amend=lambda g, d: g + 0.7 * g * g * d
    )
    plain = session(ul.consensus.DPU(), optimizer="sgd")
    for made_one in (made, plain):
        train(made_one, 5)
    for k in range(5):
        reference.step(batches_of(k, 2))
    assert_close(made, reference.model)
    assert not torch.allclose(made.chains[0][0].body[0].weight, plain.chains[0][0].body[0].weight, rtol=1e-6)


def test_gap_aware_makes_steps_smaller_and_staleness_aware_changes_nothing():
    results = {}
    for name, mitigation in {
        "none": None, "stale": ul.mitigation.StalenessAware(), "gap": ul.mitigation.GapAware()
    }.items():  # fmt: skip
        made = session(ul.consensus.DPU(), optimizer="sgd", mitigation=mitigation)
        before = torch.cat([p.detach().flatten() for p in made.chains[0].parameters()])
        train(made, 6)
        results[name] = state(made)
        results[name + " moved"] = (
            torch.cat([p.detach().flatten() for p in made.chains[0].parameters()]) - before
        ).norm()
    assert_same(results["none"], results["stale"])
    assert results["gap moved"] < 0.95 * results["none moved"]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: session(ul.consensus.ACCO(), accumulate=1), "needs at least as many micro-batches"),
        (lambda: session(ul.consensus.ACCO((1, 2)), replicas=3), "contributions of 2|those of 2 replicas"),
        (lambda: ul.consensus.DPU((0, 1)), "at least 1"),
        (lambda: ul.consensus.WP("all"), "'managed'"),
        (lambda: ul.consensus.ACCO(estimate=-1.0), "no multiple"),
        (lambda: ul.consensus.ACCO(samples_per_schedule_step=0), "samples_per_schedule_step"),
        (lambda: session(ul.consensus.ACCO("managed"), stages=2), "without stages"),
        (lambda: session(ul.consensus.ACCO(), optimizer=lambda ps: torch.optim.Adafactor(ps)), "Adafactor"),
        (lambda: session(ul.consensus.ACCO(), mitigation=ul.mitigation.GapAware()), "nothing to act on"),
        (lambda: session(ul.consensus.WP(), mitigation=ul.mitigation.GapAware()), "nothing to act on"),
        (lambda: session(ul.consensus.DPU(), mitigation=ul.mitigation.WeightPrediction()), "consensus rule"),
        (lambda: session(ul.consensus.ACCO(), stages=2, credit=ul.credit.PipeDream()), "in flight"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(make, words):
    with pytest.raises(InvalidChoice, match=words):
        make()


# ---- failing and resuming --------------------------------------------------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("bad", [0, 2])
def test_after_a_step_that_failed_training_goes_on_as_if_it_had_not_been(kind, bad):
    """The loss is infinite in the first or in the last micro-batch, where ACCO's estimate is in place."""
    options = {"accumulate": 3, "replicas": 2, "schedule": cosine}
    whole, hurt = session(RULES[kind](), **options), session(RULES[kind](), **options)
    train(whole, 5)
    for k in range(5):
        pairs = batches_of(k, 2)
        if k == 3:
            poisoned = [x.clone() for x, _ in pairs]
            poisoned[1].tensor_split(3)[bad][:] = float("nan")
            with pytest.raises(NonFiniteLoss):
                hurt.step(poisoned, [y for _, y in pairs])
        hurt.step([x for x, _ in pairs], [y for _, y in pairs])
    assert_same(state(hurt), state(whole))


@pytest.mark.parametrize("kind", RULES)
def test_a_resumed_training_equals_one_that_never_stopped(tmp_path, kind):
    options = {"accumulate": 4, "replicas": 3, "stages": 2, "schedule": cosine, "clip": 0.5, "seed": 3}
    rule = RULES[kind]((1, 2, 2))
    if kind == "dpu":
        options |= {"mitigation": ul.mitigation.GapAware(), "optimizer": "momentum"}
    whole = session(rule, **options)
    stopped = session(rule, **options)
    train(whole, 3, 9), train(stopped, 3, 9)
    stopped.save(tmp_path)
    again = ul.Trainer.resume(tmp_path, ul.cut(odd_mlp(), 2, like=batch()[0]))
    for made in (whole, again):
        train(made, 3, 9)
    assert_same(state(again), state(whole))
    assert [w.left_out for w in again.weights] == [w.left_out for w in whole.weights]
    assert again.weights[0].seen == whole.weights[0].seen


# ---- on processes ----------------------------------------------------------------------------------------------------

TRAIN = data(72, dtype=torch.float32)


def everything_on(kind, world=None, **options):
    """Four workers with momentum, a schedule, clipping, dropout, BatchNorm and unequal contributions."""
    options = {
        "model": mlp(2, norm=True, dropout=0.2, dtype=torch.float32),
        "stages": 2,
        "accumulate": 3,
        "schedule": cosine,
        "clip": 0.5,
        "seed": 3,
        "batchnorm": "average",
        "credit": ul.credit.DGL(head="linear", budget=None),
    } | options
    return session(RULES[kind]((2, 1)), replicas=2, world=world, **options)


def outcome(made):
    records = made.fit(TRAIN, 3, batch_size=12)
    return here(made), [(record["losses"], record["bytes"]) for record in records]


def on_processes(cluster, kinds, links):
    torch.manual_seed(100 + cluster.rank)
    found = []
    for kind in kinds:
        with Distributed(cluster, links=links) as world:
            found.append(outcome(everything_on(kind, world)))
    return found


@pytest.mark.parametrize("processes, links", [(2, "auto"), (4, "auto"), (2, "gloo")])
def test_processes_give_the_same_bit_for_bit(processes, links):
    found = run_processes(on_processes, processes, list(RULES), links)
    for k, kind in enumerate(RULES):
        parameters, records = outcome(everything_on(kind))
        merged = {}
        for rows in found:
            merged |= rows[k][0]
            assert rows[k][1] == records
        assert_same(merged, parameters)


def slow_to_arrive(world, seconds):
    """Every message to this process is delivered so much later."""
    wiring = world.wiring
    deliver = wiring._arrived

    def late(key, x):
        time.sleep(seconds)  # on the receiving thread of this channel
        deliver(key, x)

    wiring._arrived = late


class Slow(nn.Module):
    """Takes so many seconds, without the processor."""

    def __init__(self, seconds, inner):
        super().__init__()
        self.seconds, self.inner = seconds, inner

    def forward(self, x):
        time.sleep(self.seconds)
        return self.inner(x)


def timed(cluster, rule, compute, late, steps=6):
    """Seconds per step of two replicas, each with four micro-batches of `compute` seconds, and messages `late`."""
    torch.manual_seed(0)
    with Distributed(cluster) as world:
        slow_to_arrive(world, late)
        slower = 4 if cluster.rank == 1 and rule.contributions == "managed" else 1
        model = nn.Sequential(Slow(compute * slower, nn.Linear(5, 3).double()))
        made = session(rule, model=model, accumulate=4, world=world)
        train(made, 2, 8)
        begin = time.perf_counter()
        done = []
        for k in range(2, steps + 2):
            pairs = batches_of(k, 2, 8)
            made.step([x for x, _ in pairs], [y for _, y in pairs])
            done.append([act.micro_batch % 4 for act in made.timeline if act.kind == "F"])
        return (time.perf_counter() - begin) / steps, done, here(made), list(made.timeline)


def test_communication_is_beside_the_computation():
    """0.32 s of computing and 2 × 0.15 s (three messages one after the other) of communication: less than their sum."""
    for seconds, _, _, acts in run_processes(timed, 2, ul.consensus.ACCO(), 0.08, 0.05):
        assert 0.32 <= seconds < 0.32 + 0.2, seconds
        forwards = [act for act in acts if act.kind == "F"]
        overlapped = [
            act for act in acts if act.kind == "M" and any(act.start < f.start and f.end < act.end for f in forwards)
        ]
        assert overlapped or any(act.kind == "M" and act.start < forwards[-1].end for act in acts)


def test_unequal_workers_stop_when_the_exchange_is_over():
    """One of two is four times slower; what it managed is what the reference is told, sample by sample."""
    found = run_processes(timed, 2, ul.consensus.ACCO("managed"), 0.03, 0.02, 4)
    assert all(len(step) >= 2 for _, done, _, _ in found for step in done)
    assert sum(map(len, found[0][1])) > sum(map(len, found[1][1]))  # the fast one did more


def lawful(cluster, kind):
    """Managed rounds, and which micro-batches were done, per step."""
    torch.manual_seed(0)
    with Distributed(cluster) as world:
        slow_to_arrive(world, 0.01 * (1 + cluster.rank))
        made = session(RULES[kind]("managed"), model=nn.Sequential(Slow(0.03, odd_mlp())), accumulate=6, world=world)
        done = []
        for k in range(5):
            pairs = batches_of(k, 2, 13)
            made.step([x for x, _ in pairs], [y for _, y in pairs])
            done.append([act.micro_batch % 6 for act in made.timeline if act.kind == "F"])
        return here(made), done, made.weights[0].left_out, made.weights[0].seen


@pytest.mark.parametrize("kind", RULES)
def test_what_was_managed_is_weighted_by_samples(kind):
    found = run_processes(lawful, 2, kind)
    reference = Reference(kind, odd_mlp(), OPTIMIZERS["adamw"], cross_entropy, accumulate=6)
    rounds = [range(3), range(3, 6)] if kind == "acco" else [range(6)]
    for k in range(5):
        done = [[[m for m in found[n][1][k] if m in part] for n in range(2)] for part in rounds]
        reference.step(batches_of(k, 2, 13), done)
    assert sum(row[2] for row in found) > 0
    for parameters, _, _, _ in found:
        for x, expected in zip(parameters.values(), reference.model.parameters(), strict=True):
            torch.testing.assert_close(x, expected.detach(), rtol=1e-9, atol=1e-11)
    sizes = [len(part) for part in torch.arange(13).tensor_split(6)]
    for n in range(2):
        assert found[n][2] == sum(13 - sum(sizes[m] for m in step) for step in found[n][1])
    assert found[0][3] == sum(reference.samples)


# ---- lost, killed, failing -------------------------------------------------------------------------------------------


def blank():
    return ul.cut(mlp(2, norm=True, dropout=0.2, dtype=torch.float32), 2, like=TRAIN.x[:4])


def four_epochs(made, **options):
    made.fit(TRAIN, 4, batch_size=12, **options)


@pytest.mark.parametrize("kind", RULES)
def test_killed_and_resumed_on_other_numbers_of_processes(tmp_path, kind):
    whole = everything_on(kind)
    four_epochs(whole)
    training = Training(partial(everything_on, kind), blank, four_epochs, here)
    for processes, victim, update in [(2, 1, 4), (4, 2, 7)]:
        killed(training, processes, tmp_path, victim, update)
    assert_same(finished(training, 2, tmp_path), here(whole))


def waits_beside(cluster, action):
    """Replica 1 dies, fails or is silent in its program beside; replica 0 waits for it in its own."""
    world = Distributed(cluster)
    (worker,) = world.mesh(2, 1)

    async def side(companion):
        if companion.replica == 1:
            if action == "die":
                kill_me()
            if action == "fail":
                await companion.run("U", lambda: [][0])
            await companion.replicas.peer(0).recv("never")
        return await companion.replicas.gather("x", torch.ones(3))

    async def main():
        await worker.beside("a test", side)

    try:
        world.run([(worker, main())])
    except (LostProcess, IndexError) as error:
        begin = time.monotonic()
        world.close()
        return f"{type(error).__name__}: {error}", time.monotonic() - begin
    raise AssertionError("went on")


@pytest.mark.parametrize("action, words", [("die", "Process 1"), ("fail", "IndexError"), ("wait", "never")])
def test_what_happens_beside_reaches_the_program(action, words):
    with Processes(waits_beside, 2, action) as running:
        for rank in [0] if action == "die" else [0, 1]:
            sentence, closing = running.result(rank, 20.0)
            assert words in sentence and closing < 6.0


def computes_beside_for_long(cluster):
    world = Distributed(cluster)
    (worker,) = world.mesh(2, 1)

    async def side(companion):
        await companion.run("U", time.sleep, 4.5)
        return len(await companion.replicas.gather("x", torch.ones(3)))

    found = []

    async def main():
        found.append(await worker.beside("a long sleep", side))

    world.run([(worker, main())])
    world.close()
    return found


def test_who_waits_for_a_program_that_computes_for_long_is_not_deadlocked():
    assert run_processes(computes_beside_for_long, 2) == [[2], [2]]


def never_awaited(cluster):
    world = Distributed(cluster)
    (worker,) = world.mesh(2, 1)

    async def side(companion):
        await companion.replicas.gather("x", torch.ones(3))

    async def main():
        if worker.replica == 0:
            worker.beside("what nobody awaits", side)
        else:
            await worker.below.recv("activation", ul.batch.Batch(torch.ones(1), torch.ones(1)))

    try:
        world.run([(worker, main())])
    except UnlockedError as error:
        sentence = str(error)
        world.close()
        return sentence
    world.close()


def test_what_is_never_awaited_is_an_error_and_no_hang():
    with Processes(never_awaited, 2) as running:
        assert "must await what it begins" in running.result(0, 20.0)


def beside_in(world):
    """Two programs, one after the other, beside one that also exchanges: what they give, and that `done` turns true."""
    workers = world.mesh(2, 1)
    results = {}

    async def program(worker):
        def side(companion):
            return summed(companion)

        beside = worker.beside("a sum", side)
        mean = await worker.replicas.mean("main", [torch.full((3,), float(worker.replica))])
        results[worker.replica] = (await beside, mean[0], beside.done)

    async def summed(companion):
        values = torch.arange(5.0) + 10 * companion.replica
        part = await companion.replicas.reduce_scatter("sum", values)
        return torch.cat(await companion.replicas.gather("sum", part))

    world.run([(worker, program(worker)) for worker in workers])
    return {replica: row for replica, row in results.items() if row}


def beside_on_processes(cluster):
    with Distributed(cluster) as world:
        return beside_in(world)


def test_the_verb_in_every_world():
    found = [beside_in(InProcess()), beside_in(Simulated(costs=unit(1)))]
    merged = {}
    for rows in run_processes(beside_on_processes, 2):
        merged |= rows
    for rows in [*found, merged]:
        for replica in (0, 1):
            total, mean, done = rows[replica]
            assert torch.equal(total, 2 * torch.arange(5.0) + 10) and torch.equal(mean, torch.full((3,), 0.5)) and done


# ---- on a clock ------------------------------------------------------------------------------------------------------

# one exchange of four replicas sends 2 · 3/4 · 4000 bytes from each: a second at this bandwidth, and its counts nearly nothing
BANDWIDTH = 6000.0


def step_seconds(rule, exchange, *, speeds=(), accumulate=4, steps=12, replicas=4, update=0.0):
    """Simulated seconds per update once it runs evenly, and micro-batches done per update and replica. A micro-batch takes
    2 s, an exchange of all gradients `exchange` s, an optimizer's step `update` s."""
    hardware = Hardware(network=uniform(bandwidth=BANDWIDTH / exchange), speeds=speeds)
    timeline = simulate(
        ul.credit.Backprop(),
        rule,
        costs=unit(1, weights=1000, update=update),
        replicas=replicas,
        steps=steps,
        accumulate=accumulate,
        hardware=hardware,
    )
    last = {}
    for act in timeline:
        if act.kind == "U":
            last[act.micro_batch // accumulate] = max(act.end, last.get(act.micro_batch // accumulate, 0.0))
    done = [sum(act.kind == "B" and act.replica == n for act in timeline) / steps for n in range(replicas)]
    return (last[steps - 1] - last[steps - 5]) / 4, done


@pytest.mark.parametrize("kind, free", [("acco", 4.0), ("dpu", 8.0), ("wp", 8.0 / 1.5)])
def test_on_a_clock_what_is_shorter_than_a_round_is_free(kind, free):
    """A step computes for 8 s. ACCO hides an exchange behind half of it, DPU behind all of it; WP gathers twice."""
    assert step_seconds(RULES[kind](), 0.9 * free)[0] == pytest.approx(8.0, rel=1e-9)
    assert step_seconds(RULES[kind](), 0.6 * free, update=1.0)[0] == pytest.approx(8.0, rel=1e-9)
    longer, _ = step_seconds(RULES[kind](), 2 * free)
    assert longer == pytest.approx(16.0, rel=0.02)
    assert step_seconds(ul.consensus.AllReduce(), 0.9 * free)[0] > 8.0 + 0.5 * free


def test_on_a_clock_fast_workers_do_not_wait_for_a_slow_one():
    """One of four is four times slower: of eight micro-batches it manages one a round (8 s), while the others do four."""
    speeds = (1.0, 1.0, 1.0, 0.25)
    all_reduce, _ = step_seconds(ul.consensus.AllReduce(bucket_mb=0), 0.5, speeds=speeds, accumulate=8)
    plain, _ = step_seconds(ul.consensus.ACCO(), 0.5, speeds=speeds, accumulate=8)
    managed, done = step_seconds(ul.consensus.ACCO("managed"), 6.5, speeds=speeds, accumulate=8)
    assert plain == pytest.approx(64.0) and all_reduce == pytest.approx(64.5, rel=0.01)
    assert managed < 32.0
    assert done[0] > 3 * done[3] and 2.0 <= done[3] < 3.0


def test_on_a_clock_tensors_change_no_time():
    """The same run with tensors: the same numbers as in process, the same moments as with shapes only."""
    chain = ul.cut(odd_mlp().float(), 1, like=batch()[0].float())
    costs = costs_of(profile(chain), Device(flops=1e4, memory_bandwidth=1e6), "adam")
    hardware = Hardware(network=uniform(bandwidth=1e4))
    plain = session(ul.consensus.ACCO(), model=odd_mlp().float(), accumulate=4)
    timed = session(ul.consensus.ACCO(), model=odd_mlp().float(), accumulate=4, world=Simulated(hardware, costs))
    acts = []
    for made in (plain, timed):
        for k in range(3):
            pairs = batches_of(k, 2, 8)
            made.step([x.float() for x, _ in pairs], [y for _, y in pairs])
            acts += list(made.timeline) if made is timed else []
    assert_same(state(plain), state(timed))
    ghostly = simulate(
        ul.credit.Backprop(),
        ul.consensus.ACCO(),
        costs=costs,
        replicas=2,
        steps=3,
        samples=2,
        accumulate=4,
        hardware=hardware,
    )

    def moments(row):
        return sorted((act.kind, act.replica, act.micro_batch, round(act.start, 9), round(act.end, 9)) for act in row)

    assert moments(acts) == moments(ghostly)
    forward = [act for act in acts if act.kind == "F"]
    beside = [act for act in acts if act.kind == "M" and any(act.start < f.end and f.start < act.end for f in forward)]
    assert len(beside) > len([act for act in acts if act.kind == "M"]) / 2
