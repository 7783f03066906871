"""Forward gradients: the formula, both modes, their limits (credit/forward_gradient.py; METHODS A9)."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import unlocked as ul
from unlocked.batch import Batch
from unlocked.credit.guesses import RANDOM
from unlocked.credit.streams import begun_at
from unlocked.dropout import InOrder
from unlocked.errors import InvalidChoice
from unlocked.forward_ad import couples_samples, push, push_both, push_weights
from unlocked.probes.live import LiveBytes
from unlocked.probes.local_gradients import teachers
from unlocked.probes.memory import SavedBytes
from unlocked.rules import projection

from methods import batch, data, mlp, trainer

GUESSES = ("local", "ntk", "fixed-ntk", *RANDOM)
TARGETS = ("global", "local", "intermediate")
INSERTIONS = {
    "tensor": {},
    "stage": {"scalars": "stage"},
    "shared": {"scalars": "shared"},
    "activity": {"space": "activity"},
    "subspace": {"space": "activity", "subspace": True},
    "two components": {"space": "activity", "subspace": 2},
    "groups": {"space": "activity", "groups": 2, "patches": 2},
}


class Residual(nn.Module):
    """conv-BN-ReLU-conv-BN, added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


class Block(nn.Module):
    """Attention and a linear layer with GELU, after LayerNorm; dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, width)
        self.project = nn.Linear(width, 3 * width)
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        q, k, v = self.project(self.norm(x)).unsqueeze(1).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        return x + self.drop(nn.functional.gelu(self.mix(x)))


def network(kind):
    """A chain of four stages, with a batch."""
    torch.manual_seed(1)
    if kind == "residual":
        model = nn.Sequential(
            nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()),
            Residual(3),
            Residual(3),
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)),
        )
        x, y = torch.randn(5, 2, 4, 4), torch.randint(4, (5,))
    else:
        model = nn.Sequential(nn.Embedding(7, 4), Block(4), Block(4), nn.Linear(4, 7))
        x, y = torch.randint(7, (3, 5)), torch.randint(7, (3, 5))
    model = model.double()
    x = x.double() if x.is_floating_point() else x
    bodies = [nn.Sequential(part) for part in model]
    return ul.Chain([ul.Stage(body) for body in bodies], like=x), x, y


def updates(rule, kind="residual", chain=None):
    """What one step of gradient descent of rate 1 subtracts, with all buffers after it."""
    found, x, y = network(kind) if chain is None else chain
    session = ul.Trainer(found, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0), credit=rule, seed=5)
    before = {name: p.detach().clone() for name, p in nn.Module.named_parameters(found)}
    losses = session.step(x, y)
    moved = {name: before[name] - p.detach() for name, p in nn.Module.named_parameters(found)}
    return moved, {name: b.clone() for name, b in nn.Module.named_buffers(found)}, losses


def rule(guess="local", target="global", insertion="tensor", mode="forward", **options):
    return ul.credit.ForwardGradient(
        guess, target, mode=mode, head="linear", budget=None, **INSERTIONS[insertion], **options
    )


@pytest.mark.covering(2)
@pytest.mark.parametrize(
    "guess, target, insertion",
    [
        (guess, target, insertion)
        for guess, target, insertion in itertools.product(GUESSES, TARGETS, INSERTIONS)
        if insertion != "shared" or target == "global"
    ],
)
@pytest.mark.parametrize("kind", ["residual", "transformer"])
def test_forward_mode_is_two_backwards(kind, guess, target, insertion):
    one, two = (updates(rule(guess, target, insertion, mode), kind) for mode in ("forward", "two-backward"))
    for name, moved in two[0].items():
        scale = float(moved.abs().max())  # a bias before BatchNorm has a gradient of rounding only
        assert torch.allclose(one[0][name], moved, rtol=0, atol=1e-10 * scale + 1e-13), name
    assert all(torch.equal(one[1][name], kept) for name, kept in two[1].items())  # statistics, counted once
    assert one[2] == two[2]


def reference(chain, x, y):
    """Every stage's output, in one graph; the head losses; the network's."""
    outputs, losses, given = [], [], Batch(x, y)
    h = x
    for stage in chain:
        h = stage.body(h)
        outputs.append(h)
        losses.append(stage.judge(stage.read(h), given))
    return outputs, losses


def targets(chain, x, y, target):
    """(output, its loss's gradient) of the target of every stage but the last, with the graph kept."""
    outputs, losses = reference(chain, x, y)
    last = len(chain) - 1
    of = {"global": lambda j: last, "local": lambda j: j, "intermediate": lambda j: j + 1}[target]
    return outputs, losses, [losses[of(j)] for j in range(last)]


def grads(loss, of):
    return [g.detach() for g in torch.autograd.grad(loss, of, retain_graph=True)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("insertion", ["tensor", "stage", "shared", "activity"])
def test_it_is_the_formula(target, insertion):
    if insertion == "shared" and target != "global":
        return
    made = rule("local", target, insertion, "two-backward")
    chain, x, y = network("residual")
    made.prepare(chain, 5)
    outputs, losses, aims = targets(chain, x, y, target)
    expected, dots, squares = {}, 0.0, 0.0
    for j, stage in enumerate(list(chain)[:-1]):
        weights = list(stage.body.parameters())
        ts, gs = grads(aims[j], weights), grads(losses[j], weights)
        if insertion == "tensor":
            expected[j] = [(t * g).sum() / g.square().sum() * g for t, g in zip(ts, gs)]
        elif insertion == "activity":
            (t,), (g,) = grads(aims[j], [outputs[j]]), grads(losses[j], [outputs[j]])
            row = torch.stack([(a * b).sum() / b.square().sum() * b for a, b in zip(t, g)])
            expected[j] = list(torch.autograd.grad(outputs[j], weights, row, retain_graph=True))
        else:
            dot, square = sum((t * g).sum() for t, g in zip(ts, gs)), sum(g.square().sum() for g in gs)
            dots, squares = dots + dot, squares + square
            expected[j] = [dot / square * g for g in gs]
            if insertion == "shared":
                expected[j] = gs
    fresh = network("residual")
    found, _, _ = updates(made, chain=fresh)
    for j, row in expected.items():
        for (name, _), g in zip(fresh[0][j].body.named_parameters(), row):
            # a convolution's bias before BatchNorm has a gradient of rounding only: its direction is noise
            tiny = float(g.abs().max()) < 1e-12
            scaled = dots / squares * g if insertion == "shared" else g
            assert tiny or torch.allclose(found[f"stages.{j}.body.{name}"], scaled, rtol=1e-8, atol=1e-13), (j, name)
        head = grads(losses[j], list(chain[j].head.parameters()))
        for (name, _), g in zip(fresh[0][j].head.named_parameters(), head):
            assert torch.allclose(found[f"stages.{j}.head.{name}"], g, rtol=1e-10, atol=1e-14)
    final = list(chain[-1].body.named_parameters())
    for (name, _), g in zip(final, grads(losses[-1], [p for _, p in final])):
        assert torch.allclose(found[f"stages.3.body.{name}"], g)  # the last stage: exact


@pytest.mark.parametrize("insertion", [name for name in INSERTIONS if name not in ("shared", "two components")])
@pytest.mark.parametrize("mode", ["forward", "two-backward"])
def test_a_guess_that_is_the_target_gives_it_back(insertion, mode):
    """Local guess, local target: DGL."""
    ours, buffers, losses = updates(rule("local", "local", insertion, mode))
    theirs, kept, same = updates(ul.credit.DGL(head="linear", budget=None))
    for name, g in theirs.items():
        assert torch.allclose(ours[name], g, rtol=1e-9, atol=1e-14), name
    assert losses == same and all(torch.equal(buffers[name], b) for name, b in kept.items())


@pytest.mark.parametrize("mode", ["forward", "two-backward"])
def test_a_span_of_everything_gives_the_target(mode):
    """7 units, 12 samples: random guesses span all of it, so the estimate is backpropagation's gradient."""
    made = ul.credit.ForwardGradient("gaussian", space="activity", subspace=True, mode=mode)
    sessions = [trainer(credit, model=mlp(norm=True)) for credit in (made, ul.credit.Backprop())]
    for session in sessions:
        session.step(*batch(12))
    for name, x in sessions[1].chains[0].state_dict().items():
        assert torch.allclose(sessions[0].chains[0].state_dict()[name], x, rtol=1e-9, atol=1e-12), name


def test_one_component_is_not_everything():
    made = ul.credit.ForwardGradient("gaussian", space="activity", subspace=1)
    one, all_ = trainer(made), trainer(ul.credit.Backprop())
    for session in (one, all_):
        session.step(*batch(12))
    assert not torch.allclose(
        one.chains[0].state_dict()["0.weight"], all_.chains[0].state_dict()["0.weight"], rtol=1e-3
    )


# ---- unbiased ---------------------------------------------------------------------------------------------------------------


def estimates(credit, count):
    """Gradients of the first stage's first weight that `credit` gives in `count` steps from the same weights."""
    found = []
    session = trainer(credit, stages=2, model=mlp(2))
    for weights in session.weights:

        def look(weights=weights):
            if weights.worker.first:
                found.append(weights.stage.body[0].weight.grad.clone())
            weights._drop_gradients()

        weights.update = look
    for _ in range(count):
        session.step(*batch(6))
    return torch.stack(found)


def deviations(guess, space, **options):
    """How many standard errors the mean estimate is from the gradient, root mean square over the entries."""
    found = estimates(ul.credit.ForwardGradient(guess, space=space, mode="two-backward", **options), 400)
    exact = estimates(ul.credit.Backprop(), 1)[0]
    error = found.std(0) / math.sqrt(len(found))
    return float((((found.mean(0) - exact) / error).square().mean()).sqrt())


@pytest.mark.parametrize("guess", RANDOM)
@pytest.mark.parametrize("space, options", [("weight", {}), ("weight", {"scalars": "shared"}), ("activity", {})])
def test_random_guesses_are_unbiased(guess, space, options):
    assert deviations(guess, space, **options) < 1.6  # 35 entries: chance leaves about 1


@pytest.mark.parametrize("space, options", [("weight", {}), ("activity", {})])
def test_a_normalised_random_guess_is_biased(space, options):
    assert deviations("gaussian", space, normalise=True, **options) > 2.5


# ---- guesses, heads, statistics ---------------------------------------------------------------------------------------------


def test_every_projection_of_a_norms_scale_and_bias_is_its_own():
    """One scalar a tensor: each update is parallel to that tensor's guess, and the scalars differ."""
    chain, x, y = network("residual")
    made = rule(mode="forward")
    made.prepare(chain, 5)
    _, losses, _ = targets(chain, x, y, "global")
    moved, _, _ = updates(made)
    ratios = []
    for name, p in chain[1].body.named_parameters():
        if "norm" in name:
            (g,) = grads(losses[1], [p])
            ratio = moved[f"stages.1.body.{name}"] / g
            assert torch.allclose(ratio, ratio.mean().expand_as(ratio), rtol=1e-6), name
            ratios.append(float(ratio.mean()))
    assert len({round(ratio, 6) for ratio in ratios}) == len(ratios) == 4


@pytest.mark.parametrize("guess, target", itertools.product(GUESSES, TARGETS))
def test_heads_learn_their_own_loss_exactly_whatever_the_stage_learns(guess, target):
    """Wherever a head is there, it moves as under DGL."""
    ours, _, _ = updates(rule(guess, target, "stage", "forward", watch=True))
    theirs, _, _ = updates(ul.credit.DGL(head="linear", budget=None))
    heads = [name for name in theirs if ".head." in name]
    assert heads and all(torch.allclose(ours[name], theirs[name], rtol=1e-10, atol=1e-14) for name in heads)


@pytest.mark.parametrize(
    "guess, target, heads",
    [("gaussian", "global", 0), ("gaussian", "local", 3), ("gaussian", "intermediate", 2), ("ntk", "global", 0)],
)
def test_heads_are_built_only_where_something_needs_them(guess, target, heads):
    chain, _, _ = network("residual")
    rule(guess, target).prepare(chain, 0)
    assert sum(stage.head is not None for stage in chain) == heads


def test_a_random_head_is_drawn_for_every_batch_or_kept_and_never_trained():
    kept = {}
    for guess in ("ntk", "fixed-ntk"):
        chain, x, y = network("residual")
        session = ul.Trainer(chain, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), credit=rule(guess))
        rows = [[t.clone() for t in chain[1].guess_head.state_dict().values()]]
        for _ in range(2):
            session.step(x, y)
            rows.append([t.clone() for t in chain[1].guess_head.state_dict().values()])
        kept[guess] = [all(torch.equal(a, b) for a, b in zip(rows[k], rows[k + 1])) for k in range(2)]
    assert kept == {"ntk": [False, False], "fixed-ntk": [True, True]}


@pytest.mark.parametrize("mode", ["forward", "two-backward"])
def test_statistics_are_those_of_one_forward(mode):
    _, ours, _ = updates(rule("gaussian", mode=mode))
    _, theirs, _ = updates(ul.credit.Backprop())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], b) for name, b in theirs.items())


@pytest.mark.parametrize("space", ["weight", "activity"])
def test_micro_batches_add_their_own_estimates(space):
    made = ul.credit.ForwardGradient("fixed-ntk", space=space, head="linear", budget=None)
    x, y = batch(12)

    def moved(x, y, accumulate):
        session = trainer(made, accumulate=accumulate, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
        before = session.chains[0].state_dict()["0.weight"].clone()
        session.step(x, y)
        return before - session.chains[0].state_dict()["0.weight"]

    parts = [moved(*part, 1) for part in zip(x.chunk(2), y.chunk(2))]
    assert torch.allclose(moved(x, y, 2), sum(parts) / 2, rtol=1e-10, atol=1e-14)


# ---- forward mode -----------------------------------------------------------------------------------------------------------


def saved(credit, depth):
    """The most bytes kept for backward at once in a step."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(depth)], nn.Linear(8, 3))
    x, y = torch.randn(64, 8), torch.randint(3, (64,))
    session = ul.Trainer(
        ul.cut(model, depth, like=x, balance="parameters"),
        credit=credit,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )
    with SavedBytes(ignore=[*session.chains[0].parameters()]) as meter:
        session.step(x, y)
    return meter.peak


@pytest.mark.parametrize("guess", ["local", "gaussian"])
@pytest.mark.parametrize("space", ["weight", "activity"])
def test_what_forward_mode_saves_does_not_grow_with_depth(guess, space):
    ours = [saved(ul.credit.ForwardGradient(guess, space=space, head="linear", budget=None), depth) for depth in (4, 8)]
    theirs = [saved(ul.credit.Backprop(), depth) for depth in (4, 8)]
    assert ours[0] == ours[1] < theirs[0] < 0.6 * theirs[1]


@pytest.mark.parametrize("insertion", list(INSERTIONS))
@pytest.mark.parametrize("samples", ["exact", "together"])
def test_the_tangents_that_travel_are_those_foretold(insertion, samples):
    chain, x, y = network("residual")
    made = rule(insertion=insertion, samples=samples)
    session = ul.Trainer(chain, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), credit=made)
    foretold = made.streams(chain, len(x))
    session.step(x, y)
    h, sent = x, {act.stage: act.bytes for act in session.timeline if act.kind == "S" and act.channel == "tangents"}
    for j in range(3):
        with torch.no_grad():
            h = chain[j].eval().body(h)
        begun = 1 if insertion == "shared" else foretold.own[j] + foretold.carried[j]
        assert sent[j] == 8 * h.numel() * begun
    assert str(foretold.products) in made.remarks(chain, len(x))[0]


def test_one_tangent_for_all_samples_is_exact_where_nothing_mixes_them():
    assert [couples_samples(stage.body, network("residual")[1]) for stage in list(network("residual")[0])[:1]] == [True]
    results = [
        updates(ul.credit.ForwardGradient("gaussian", space="activity", samples=samples), "transformer")[0]
        for samples in ("exact", "together")
    ]
    assert all(torch.allclose(results[0][name], x, rtol=1e-9, atol=1e-14) for name, x in results[1].items())
    mixed = [updates(rule("gaussian", insertion="activity", samples=samples))[0] for samples in ("exact", "together")]
    assert not torch.allclose(mixed[0]["stages.0.body.0.0.weight"], mixed[1]["stages.0.body.0.0.weight"], rtol=1e-3)


def test_pushed_tangents_are_directional_derivatives():
    chain, x, _ = network("residual")
    body, p = chain[0].body, dict(chain[0].body.named_parameters())
    tangents, moves = torch.randn(3, *x.shape).double(), {name: torch.randn_like(q) for name, q in p.items()}
    epsilon = 1e-6

    def shifted(step, tangent=None, weights=None):
        with torch.no_grad():
            changed = {name: q + step * weights[name] for name, q in p.items()} if weights else p
            return torch.func.functional_call(body, changed, (x if tangent is None else x + step * tangent,))

    def slope(**given):
        return (shifted(epsilon, **given) - shifted(-epsilon, **given)) / (2 * epsilon)

    for k, tangent in enumerate(push(body, x, tangents)):
        assert torch.allclose(tangent, slope(tangent=tangents[k]), atol=1e-6)
    assert torch.allclose(push_weights(body, x, moves), slope(weights=moves), atol=1e-6)
    both = push_both(body, x, tangents[0], moves)
    assert torch.allclose(both, slope(tangent=tangents[0], weights=moves), atol=1e-6)


def test_what_has_no_forward_mode_is_refused_in_a_sentence():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 4, batch_first=True)

        def forward(self, x):
            return self.lstm(x)[0][:, -1]

    model = nn.Sequential(Last(), nn.Linear(4, 3))
    chain = ul.Chain([ul.Stage(part) for part in model], like=torch.randn(2, 5, 4))
    with pytest.raises(InvalidChoice, match=r"Stage 0: Forward mode cannot pass .*lstm.*two-backward"):
        ul.Trainer(chain, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), credit=ul.credit.ForwardGradient(budget=None))
    made = ul.credit.ForwardGradient(mode="two-backward", head="linear", budget=None)
    session = ul.Trainer(chain, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), credit=made)
    session.step(torch.randn(6, 5, 4), torch.randint(3, (6,)))


# ---- options, notes, the pure rules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, says",
    [
        ({"guess": "lokal"}, "did you mean 'local'"),
        ({"subspace": True}, "space='activity'"),
        ({"groups": 2}, "space='activity'"),
        ({"space": "activity", "scalars": "stage"}, "its own scalar"),
        ({"space": "activity", "subspace": True, "groups": 2}, "orthonormal"),
        ({"target": "local", "scalars": "shared"}, "scalars='stage'"),
        ({"space": "activity", "groups": 0}, "at least 1"),
    ],
)
def test_impossible_options_are_refused_in_a_sentence(options, says):
    with pytest.raises(InvalidChoice, match=says):
        ul.credit.ForwardGradient(**options)


def test_cosine_and_error_are_noted_with_the_losses_of_idle_heads():
    session = trainer(
        ul.credit.ForwardGradient("gaussian", mode="two-backward", head="linear", budget=None, watch=True), stages=3
    )
    record = session.fit(data(), 1, batch_size=12)[0]
    cosines = record["notes"]["cosine of guess and target, weights"]
    errors = record["notes"]["squared error of the estimate"]
    assert all(-1 <= c <= 1 for c in cosines[:2]) and cosines[2] is None
    assert all(e > 0.5 for e in errors[:2]) and all(loss is not None for loss in record["losses"])


@pytest.mark.parametrize("space", ["weight", "activity"])
def test_a_local_guess_of_a_local_target_has_cosine_one_and_no_error(space):
    made = ul.credit.ForwardGradient(
        "local", "local", space, mode="two-backward", head="linear", budget=None, watch=True
    )
    notes = trainer(made, stages=3).fit(data(), 1, batch_size=12)[0]["notes"]
    for where in ("weights", "activations"):
        assert notes[f"cosine of guess and target, {where}"][:2] == pytest.approx([1, 1])
    assert notes["squared error of the estimate"][:2] == pytest.approx([0, 0], abs=1e-20)


@pytest.mark.parametrize("normalise", [True, False])
def test_under_a_shared_scalar_a_stage_notes_the_error_of_its_part(normalise):
    made = rule("local", insertion="shared", mode="two-backward", normalise=normalise, watch=True)
    session = trainer(made, stages=4)
    chain, (x, y) = copy.deepcopy(session.chains[0]), batch()
    session.step(x, y)
    outputs, losses = reference(chain, x, y)
    bodies = [list(stage.body.parameters()) for stage in list(chain)[:-1]]
    ts, gs = [grads(losses[-1], row) for row in bodies], [grads(losses[j], row) for j, row in enumerate(bodies)]
    flat = torch.nn.utils.parameters_to_vector
    s = sum(flat(t) @ flat(g) for t, g in zip(ts, gs))
    s = s / sum(flat(g) @ flat(g) for g in gs) if normalise else s
    for j, (t, g) in enumerate(zip(ts, gs)):
        cosines = [nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in zip(t, g)]
        (dt,), (dg,) = grads(losses[-1], [outputs[j]]), grads(losses[j], [outputs[j]])
        assert dict(session.workers[j].notes) == pytest.approx({
            "cosine of guess and target, activations": nn.functional.cosine_similarity(dt, dg).mean().item(),
            "cosine of guess and target, weights": torch.stack(cosines).mean().item(),
            "squared error of the estimate": ((s * flat(g) - flat(t)).square().sum() / flat(t).square().sum()).item(),
        })  # fmt: skip
    assert session.workers[-1].notes == []


@pytest.mark.covering(2)
@pytest.mark.parametrize(
    "insertion, target",
    [("tensor", "global"), ("tensor", "intermediate"), ("shared", "global"), ("activity", "global")],
)
@pytest.mark.parametrize("guess", GUESSES)
@pytest.mark.parametrize("mode", ["forward", "two-backward"])
def test_watching_changes_no_bit_of_the_weights_that_are_trained(mode, guess, insertion, target):
    trained = []
    for watch in (True, False):
        session = trainer(rule(guess, target, insertion, mode, watch=watch), model=mlp(dropout=0.2), stages=4, clip=0.1)
        for k in range(2):
            session.step(*batch(seed=k))
        trained.append(session.chains[0].state_dict())
    assert all(torch.equal(trained[0][name], x) for name, x in trained[1].items())


@pytest.mark.parametrize("consensus", [ul.consensus.ACCO(), ul.consensus.DPU()], ids=lambda one: one.name)
def test_watching_changes_no_clipping_where_the_optimizer_is_split(consensus):
    trained = []
    for watch in (True, False):
        made = rule("gaussian", "global", "shared", "two-backward", watch=watch)
        session = trainer(made, stages=2, clip=0.1, replicas=2, consensus=consensus, accumulate=2)
        for k in range(3):
            session.step(*batch(8, seed=k))
        trained.append(session.chains[0].state_dict())
    assert all(torch.allclose(trained[0][name], x, rtol=0, atol=1e-12) for name, x in trained[1].items())


@pytest.mark.parametrize("mode", ["forward", "two-backward"])
def test_a_guess_of_activations_beside_heads_is_drawn_alike_in_every_world(mode):
    trained = []
    for world in (None, ul.worlds.Simulated()):
        session = trainer(rule("gaussian", "local", "activity", mode), stages=4, world=world)
        session.step(*batch())
        trained.append(session.chains[0].state_dict())
    assert all(torch.equal(trained[0][name], x) for name, x in trained[1].items())


def test_slices_add_up_and_do_not_overlap():
    for shape in ((3, 6, 4, 5), (3, 7), (3, 5, 6)):
        x = torch.randn(shape)
        found = projection.slices(x, 2, 3)
        assert torch.equal(found.sum(0), x)
        assert ((found != 0).sum(0) == (x != 0)).all() and len(found) == 3 * 2 ** (len(shape) - 2)


def test_a_unit_is_one_where_squares_underflow_and_zero_where_there_is_nothing():
    for scale in (1e-30, 1.0, 1e30):
        assert projection.unit(scale * torch.tensor([3.0, 4.0])).tolist() == pytest.approx([0.6, 0.8])
    assert projection.unit(torch.zeros(3)).tolist() == [0, 0, 0]
    assert projection.basis(torch.zeros(2, 3)).shape == (0, 2, 3)


# ---- what a second reader found ---------------------------------------------------------------------------------------------


def alive(credit, depth):
    """The most bytes alive in a step, less the batch; activations are all there is to speak of."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(depth)], nn.Linear(8, 3))
    x, y = torch.randn(2048, 8), torch.randint(3, (2048,))
    chain = ul.cut(model, depth, like=x, balance="parameters")
    session = ul.Trainer(chain, credit=credit, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    session.step(x, y)
    with LiveBytes() as live:
        live.register("input", [x, y])
        session.step(x, y)
    return live.peak - x.nbytes - y.nbytes


@pytest.mark.parametrize("guess", ["local", "gaussian"])
def test_what_was_sent_is_let_go_while_a_stage_waits(guess):
    """One tangent for all: no more at depth 12 than at depth 4. One for each stage: those of one stage, not of all."""
    shared, own = (
        [
            alive(ul.credit.ForwardGradient(guess, scalars=scalars, head="linear", budget=None), depth)
            for depth in (4, 12)
        ]
        for scalars in ("shared", "stage")
    )
    assert shared[1] < 1.05 * shared[0]
    assert own[1] < 3 * own[0]  # O(J); were they all kept, O(J²): 7 times


@pytest.mark.parametrize("mode", ["forward", "two-backward"])
@pytest.mark.parametrize("space", ["weight", "activity"])
def test_a_body_with_nothing_to_train_is_refused_in_a_sentence(mode, space):
    x = torch.randn(4, 5)
    frozen = nn.Linear(6, 6).requires_grad_(False)
    for idle in (frozen, nn.Tanh()):
        chain = ul.Chain([ul.Stage(part) for part in (nn.Linear(5, 6), idle, nn.Linear(6, 3))], like=x)
        with pytest.raises(InvalidChoice, match="stage 1 has nothing to train"):
            ul.credit.ForwardGradient(mode=mode, space=space, head="linear", budget=None).prepare(chain, 0)


@pytest.mark.parametrize("mode", ["forward", "two-backward"])
@pytest.mark.parametrize("guess", ["local", "fixed-ntk"])
@pytest.mark.parametrize("space", ["weight", "activity"])
def test_two_equal_micro_batches_are_as_one_whatever_the_length_of_guesses(mode, guess, space):
    """The weight of a micro-batch is in the target only: a guess that is not normalised does not have it twice more."""
    made = ul.credit.ForwardGradient(guess, space=space, mode=mode, normalise=False, head="linear", budget=None)
    x, y = batch(6)

    def after(x, y, accumulate):
        session = trainer(made, accumulate=accumulate, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
        session.step(x, y)
        return session.chains[0].state_dict()["0.weight"] - mlp()[0].weight.detach()

    once, twice = after(x, y, 1), after(torch.cat([x, x]), torch.cat([y, y]), 2)
    assert torch.allclose(once, twice, rtol=1e-9, atol=0) and once.abs().max() > 0


def test_volumes_are_cut_along_channels_and_all_of_space():
    x = torch.randn(2, 4, 3, 2, 5)
    found = projection.slices(x, 2, 4)
    assert len(found) == 4 * 2**3 and torch.equal(found.sum(0), x)
    assert all(((piece != 0).flatten(2).any(2).sum(1) == 1).all() for piece in found)  # of one channel each
    parts = [nn.Conv3d(4, 4, 1), nn.Conv3d(4, 4, 1), nn.Sequential(nn.Flatten(), nn.Linear(120, 3))]
    chain = ul.Chain([ul.Stage(part) for part in parts], like=x)
    made = ul.credit.ForwardGradient("gaussian", space="activity", patches=2, groups=4)
    session = ul.Trainer(chain, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), credit=made)
    session.step(x, torch.tensor([0, 2]))
    sent = [act.bytes for act in session.timeline if act.kind == "S" and act.channel == "tangents"]
    assert sent == [n * x.nbytes for n in (32, 64)] and made.streams(chain, 2).own == (32, 32)
    tokens = ul.credit.ForwardGradient("gaussian", "local", space="activity", patches=5, groups=3)
    assert (
        begun_at(tokens, chain[0], torch.randn(2, 2, 4), 2) == 6 == len(projection.slices(torch.randn(2, 2, 4), 5, 3))
    )


def test_attention_with_dropout_is_never_fused_where_it_may_run_twice():
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is nn.functional.scaled_dot_product_attention:
                seen.append(torch.backends.cuda.flash_sdp_enabled())
            return function(*args, **(kwargs or {}))

    attend = nn.functional.scaled_dot_product_attention
    q = torch.randn(1, 2, 3, 4)
    with Watch(), InOrder():
        attend(q, q, q)
        attend(q, q, q, dropout_p=0.0)
        attend(q, q, q, dropout_p=0.1)
        attend(q, q, q, None, 0.1)
    assert seen == [True, True, False, False]


def test_a_frozen_norm_mixes_no_samples_and_costs_no_tangents():
    chain, _, _ = network("residual")
    session = ul.Trainer(
        chain, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), credit=rule("gaussian", insertion="activity")
    )
    assert session.credit.streams(chain, 5).own == (5, 5, 1)
    frozen, _, _ = network("residual")
    for part in frozen.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    session = ul.Trainer(
        frozen, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), credit=rule("gaussian", insertion="activity")
    )
    assert session.credit.streams(frozen, 5).own == (1, 1, 1)
    asleep, _, _ = network("residual")
    made = rule("gaussian", insertion="activity")
    made.prepare(asleep.eval(), 0)  # the trainer's steps will be in training mode
    assert made.streams(asleep, 5).own == (5, 5, 1) and not asleep.training


def test_probes_compare_a_stage_with_the_loss_that_is_its_target():
    chain, _, _ = network("residual")
    expected = {"global": [3, 3, 3, 3], "local": [0, 1, 2, 3], "intermediate": [1, 2, 3, 3]}
    for target, stages in expected.items():
        made = rule("gaussian", target)
        made.prepare(chain, 0)
        assert teachers(chain, made) == [(stage,) for stage in stages]
        assert made.local == (target == "local")


@pytest.mark.parametrize("mode", ["forward", "two-backward"])
@pytest.mark.parametrize("insertion", INSERTIONS)
def test_a_guess_of_zero_teaches_nothing_and_hurts_nothing(mode, insertion):
    """Heads that begin at zero have no gradient at their input; a subspace of them has no directions at all."""
    made = rule(insertion=insertion, mode=mode)
    chain, x, y = network("residual")
    made.prepare(chain, 0)
    for stage in list(chain)[:-1]:
        final = [part for part in stage.head.modules() if isinstance(part, nn.Linear)][-1]
        nn.init.zeros_(final.weight)
    moved, _, _ = updates(made, chain=(chain, x, y))
    below = [g for name, g in moved.items() if ".body." in name and not name.startswith("stages.3.")]
    assert all((g == 0).all() for g in below) and any(
        (g != 0).any() for name, g in moved.items() if "stages.3." in name
    )
