"""Local forward gradients: which layers a stage has, the formula at every one of them, their mean, and both ways to it."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example as case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import unlocked as ul
from unlocked.credit import layer_directions
from unlocked.credit.layers_inside import look_inside
from unlocked.credit.local_forward_gradient import LocalForwardGradient
from unlocked.dropout import InOrder
from unlocked.errors import InvalidChoice
from unlocked.probes.memory import SavedBytes

from methods import assert_same, batch, mlp, state, trainer


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def gradients(session, x, y, count=1):
    """Of `count` steps, each of the same weights: {(stage, name): (count, …)}; heads included."""
    seen = {}
    for weights in session.weights:
        stage, j = weights.stage, weights.worker.stage

        def look(stage=stage, j=j):
            for name, p in stage.named_parameters():
                seen.setdefault((j, name), []).append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
                p.grad = None

        weights.update = look
    for _ in range(count):
        session.step(x, y)
    return {key: torch.stack(rows) for key, rows in seen.items()}


def close(a, b):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-9, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")


# ---- bodies of all sorts ------------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Words and positions: the positions' rows are no samples."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(11, 4), nn.Embedding(3, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.scale * (self.words(x) + self.places(torch.arange(x.shape[1])))


class Recurrent(nn.Module):
    """An LSTM gives a tuple."""

    def __init__(self):
        super().__init__()
        self.before, self.lstm = nn.Linear(4, 4), nn.LSTM(4, 4, batch_first=True)

    def forward(self, x):
        return self.lstm(self.before(x))[0].mean(1)


class Pooled(nn.Module):
    def forward(self, x):
        return x.mean(1)


class Residual(nn.Module):
    """Pre-activation: what the first ReLU reads is read twice, what the second one reads is not."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.outer = (nn.Conv2d(3 if k == 0 else 4, 4, 3, padding=1) for k in range(3))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.stem(x)
        inner = F.relu(self.norm(self.inner(torch.relu(x))), inplace=True)
        return x + self.outer(inner)


class Twice(nn.Module):
    """One layer called twice in a row; its uses are layers each."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x):
        return self.layer(self.layer(x).relu())


class Around(nn.Module):
    """A layer that has weights of its own and others inside, one of them called twice."""

    def __init__(self):
        super().__init__()
        self.gain, self.twice, self.once = nn.Parameter(torch.ones(5)), nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        return self.gain * self.twice(self.once(self.twice(x).tanh()).sin())


class Tied(nn.Module):
    """Two layers with one weight, inside a layer with weights of its own."""

    def __init__(self):
        super().__init__()
        self.gain, self.a, self.b = nn.Parameter(torch.ones(5)), nn.Linear(5, 5), nn.Linear(5, 5)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.gain * self.b(self.a(x).tanh())


def transformer():
    return nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True)


def relus():
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(6, 6), nn.Tanh())


def normed():
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6))


def parametrised():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)), nn.ReLU(), nn.Linear(6, 6))


# body, its input, features of its output, (patches, groups) enough for slices of one entry
BODIES = {
    "relus": (relus, (5,), 6, (1, 6)),
    "normed": (normed, (5,), 6, (1, 6)),
    "one layer": (lambda: nn.Linear(5, 6), (5,), 6, (1, 6)),
    "twice": (lambda: Twice(), (5,), 5, (1, 5)),
    "around": (lambda: Around(), (5,), 5, (1, 5)),
    "tied": (lambda: Tied(), (5,), 5, (1, 5)),
    "weight norm": (parametrised, (5,), 6, (1, 6)),
    "residual": (lambda: nn.Sequential(Residual(), nn.Flatten(), nn.Linear(64, 6)), (3, 4, 4), 6, (4, 6)),
    "transformer": (lambda: nn.Sequential(transformer(), Pooled()), (3, 4), 4, (3, 6)),
    "tokens": (lambda: nn.Sequential(Tokens(), Pooled()), "tokens", 4, (3, 4)),
    "recurrent": (lambda: Recurrent(), (3, 4), 4, (3, 4)),
}


def example(name, size=4):
    source, shape = torch.Generator().manual_seed(1), BODIES[name][1]
    y = torch.randint(3, (size,), generator=source)
    if shape == "tokens":
        return torch.randint(11, (size, 3), generator=source), y
    return torch.randn(size, *shape, generator=source, dtype=torch.float64), y


def session_of(name, credit, **options):
    """Two stages: the body with a linear head, and a classifier."""
    torch.manual_seed(0)
    make, _, features, _ = BODIES[name]
    stages = [
        ul.Stage(make().double(), head=nn.Linear(features, 3).double()),
        ul.Stage(nn.Linear(features, 3).double()),
    ]
    return ul.Trainer(ul.Chain(stages), credit=credit, optimizer=sgd, **options)


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("mode", ["forward", "two-backward"])
def test_slices_of_one_entry_and_signs_give_dgl(name, mode):
    """±1 times a derivative times ±1: with a scalar for each entry of a layer's output nothing is lost, in any body."""
    patches, groups = BODIES[name][3]
    rule = LocalForwardGradient("rademacher", patches=patches, groups=groups, mode=mode)
    x, y = example(name)
    sessions = [session_of(name, credit) for credit in (rule, ul.credit.DGL())]
    if name == "transformer":  # its dropout reads transposed tokens, where the two draw in different orders
        sessions = [quiet(session) for session in sessions]
    found, expected = (gradients(session, x, y) for session in sessions)
    close(found, expected)
    buffers = [dict(nn.Module.named_buffers(session.chains[0])) for session in sessions]
    assert all(torch.equal(buffers[0][key], buffers[1][key]) for key in buffers[0])


@given(
    name=st.sampled_from([*BODIES]),
    guess=st.sampled_from(["gaussian", "rademacher"]),
    mask=st.booleans(),
    perturb=st.sampled_from(["layers", "output"]),
    patches=st.integers(1, 3),
    groups=st.integers(1, 3),
)
@case("transformer", "gaussian", True, "layers", 1, 1)  # dropout of transposed tokens
@case("normed", "rademacher", True, "layers", 2, 2)
@settings(deadline=None, max_examples=15)
def test_both_modes_agree(name, guess, mask, perturb, patches, groups):
    found = []
    for mode in ("forward", "two-backward"):
        rule = LocalForwardGradient(guess, mask, perturb, patches, groups, mode)
        found.append(gradients(session_of(name, rule), *example(name)))
    close(*found)


def test_micro_batches_add_up():
    rules = (LocalForwardGradient("rademacher", groups=6), ul.credit.DGL())
    close(*(gradients(session_of("relus", rule, accumulate=3), *example("relus")) for rule in rules))


def test_samples_together_leak_where_batchnorm_mixes_them():
    x, y = example("normed")
    found = {
        samples: gradients(session_of("normed", LocalForwardGradient(samples=samples)), x, y)
        for samples in ("exact", "together")
    }
    same = {key: torch.allclose(found["exact"][key], found["together"][key]) for key in found["exact"]}
    assert not same[0, "body.0.weight"] and same[0, "body.3.weight"]  # nothing mixes samples above the last layer
    x, y = example("relus")
    rules = [LocalForwardGradient(samples=samples) for samples in ("exact", "together")]
    close(*(gradients(session_of("relus", rule), x, y) for rule in rules))


# ---- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("mode", ["forward", "two-backward"])
def test_it_is_its_formula_sample_by_sample(monkeypatch, mask, mode):
    """Linear → ReLU → Linear → Tanh, written out: ĝ_W = Σ_b (s_b u_b) x_bᵀ, with the directions that were drawn."""
    drawn, real = [], layer_directions.random_like
    monkeypatch.setattr(layer_directions, "random_like", lambda x, guess: drawn.append(real(x, guess)) or drawn[-1])
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh()).double()
    head = nn.Linear(6, 3).double()
    stages = [ul.Stage(body, head=head), ul.Stage(nn.Linear(6, 3).double())]
    session = ul.Trainer(ul.Chain(stages), credit=LocalForwardGradient(mask=mask, mode=mode), optimizer=sgd)
    body, head = (copy.deepcopy(part) for part in (session.chains[0][0].body, session.chains[0][0].head))
    x, y = batch()
    found = gradients(session, x, y)
    u1, u2 = drawn[:2]
    assert {u.shape for u in drawn} == {(12, 6)} and len({tuple(u.flatten().tolist()) for u in drawn}) == 2
    expected = {name: torch.zeros_like(p) for name, p in body.named_parameters()}
    for b in range(12):
        z1 = body[0](x[b]).detach().requires_grad_()
        z2 = body[2](z1.relu()).detach().requires_grad_()
        above = body[2](z1.relu())
        d1 = torch.autograd.grad(F.cross_entropy(head(above.tanh()), y[b]) / 12, z1)[0]
        d2 = torch.autograd.grad(F.cross_entropy(head(z2.tanh()), y[b]) / 12, z2)[0]
        v1 = u1[b] * (z1 > 0) if mask else u1[b]
        for name, d, v, read in (("0", d1, v1, x[b]), ("2", d2, u2[b], z1.relu())):
            estimate = (d @ v) * v
            expected[f"{name}.weight"] += torch.outer(estimate, read.detach())
            expected[f"{name}.bias"] += estimate
    close({name: found[0, f"body.{name}"][0] for name in expected}, expected)


@pytest.mark.parametrize("mode", ["forward", "two-backward"])
def test_the_output_alone_is_the_forward_gradient_in_activity_space(mode):
    results = []
    for rule in (
        LocalForwardGradient(perturb="output", patches=2, groups=3, mode=mode, head="linear", budget=None),
        ul.credit.ForwardGradient(
            "gaussian", "local", "activity", patches=2, groups=3, mode=mode, head="linear", budget=None
        ),
    ):
        session = trainer(rule, model=mlp(norm=True, dropout=0.1))
        for k in range(2):
            session.step(*batch(seed=k))
        results.append(state(session))
    assert_same(*results)


def test_a_body_of_one_layer_has_its_output_as_the_only_one(monkeypatch):
    def fixed(x, guess):
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)

    for module in (layer_directions, ul.credit.two_backward):
        monkeypatch.setattr(module, "random_like", fixed)
    x, y = example("one layer")
    rules = (LocalForwardGradient(perturb=perturb) for perturb in ("layers", "output"))
    close(*(gradients(session_of("one layer", rule), x, y) for rule in rules))


@pytest.mark.parametrize(("name", "mask"), [("relus", True), ("relus", False), ("normed", True), ("transformer", True)])
def test_the_mean_is_the_gradient_of_dgl(name, mask):
    """Over directions; dropout is left out, as it is drawn again in every step."""
    x, y = example(name)
    target = gradients(quiet(session_of(name, ul.credit.DGL())), x, y)
    rows = gradients(quiet(session_of(name, LocalForwardGradient(mask=mask, mode="two-backward"))), x, y, 120)
    errors = []
    for key, row in rows.items():
        if key[0] == 1 or key[1].startswith("head"):
            torch.testing.assert_close(row[0], target[key][0])  # they learn exactly
            continue
        deviation = row.std(0)
        there = deviation > 1e-9  # not so where a derivative is zero whatever the direction
        errors.append(((row.mean(0) - target[key][0])[there] / (deviation[there] / len(row) ** 0.5)).flatten())
    errors = torch.cat(errors)
    assert 0.5 < errors.square().mean().sqrt() < 1.5 and errors.abs().max() < 5.5


def quiet(session):
    for part in session.chains[0].modules():
        if isinstance(part, (nn.Dropout, nn.MultiheadAttention)):
            part.p = part.dropout = 0.0
    return session


def test_directions_where_a_relu_is_off_are_variance_for_nothing():
    x, y = example("relus")
    noise = {}
    for mask in (True, False):
        rows = gradients(quiet(session_of("relus", LocalForwardGradient(mask=mask, mode="two-backward"))), x, y, 60)
        noise[mask] = rows[0, "body.0.weight"].var(0).sum()
        last = rows[0, "body.3.weight"].var(0).sum()
    assert noise[True] < 0.8 * noise[False] and last > 0


# ---- which layers there are -------------------------------------------------------------------------------------------


def test_layers_own_weights_and_give_a_row_for_each_sample():
    def layers(name):
        torch.manual_seed(0)
        body = BODIES[name][0]().double()
        before = copy.deepcopy(body.state_dict())
        found = look_inside(body, example(name)[0])
        assert all(torch.equal(before[key], value) for key, value in body.state_dict().items())
        assert body.training and not any(part._forward_hooks or part._forward_pre_hooks for part in body.modules())
        return {layer.module: (set(layer.weights), layer.rectified) for layer in found.layers}, found.mixes

    def own(name, *kinds):
        return {f"{name}.{kind}".removeprefix(".") for kind in kinds or ("weight", "bias")}

    assert layers("relus") == ({"0": (own("0"), True), "3": (own("3"), False)}, False)
    assert layers("normed") == ({"0": (own("0"), False), "1": (own("1"), True), "3": (own("3"), False)}, True)
    assert layers("one layer") == ({"": (own(""), False)}, False)
    assert layers("twice") == ({"layer": (own("layer"), False)}, False)  # a ReLU reads one of its two outputs
    assert layers("around")[0] == {"": ({"gain", *own("twice")}, False), "once": (own("once"), False)}
    assert layers("tied")[0] == {
        "": ({"gain", "a.weight"}, False),
        "a": ({"a.bias"}, False),
        "b": ({"b.bias"}, False),
    }
    always = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
    nn.init.constant_(always[0].bias, 50.0)  # never below zero, so only what reads it tells
    assert not look_inside(always, torch.randn(4, 5)).layers[0].rectified
    found, mixes = layers("residual")
    assert mixes and {name: rectified for name, (_, rectified) in found.items()} == {
        **{"0.stem": False, "0.inner": False, "0.outer": False, "0.norm": True, "2": False}
    }
    found, mixes = layers("transformer")
    assert not mixes and {name for name, (_, rectified) in found.items() if rectified} == {"0.linear1"}
    attention = {
        f"0.self_attn.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    }
    assert found["0"][0] == attention and {*found} == {"0", "0.linear1", "0.linear2", "0.norm1", "0.norm2"}
    assert layers("tokens")[0] == {
        "0": ({"0.scale", "0.places.weight"}, False),
        "0.words": (own("0.words", "weight"), False),
    }
    found, _ = layers("recurrent")
    assert {*found} == {"", "before"} and found[""][0] == {
        f"lstm.{k}_{m}_l0" for k in ("weight", "bias") for m in ("ih", "hh")
    }


def test_frozen_weights_are_no_layers_also_when_they_are_frozen_later():
    x, y = example("relus")
    session = session_of("relus", LocalForwardGradient())
    assert gradients(session, x, y)[0, "body.3.weight"].any()
    session.chains[0][0].body[3].weight.requires_grad_(False)
    again = gradients(session, x, y)
    assert not again[0, "body.3.weight"].any() and again[0, "body.3.bias"].any() and again[0, "body.0.weight"].any()


# ---- what it leaves alone, and what it costs ---------------------------------------------------------------------------


@pytest.mark.parametrize("loud", range(3))
def test_no_gradient_leaves_its_stage(loud):
    results = []
    for factor in (1.0, 1e3):
        session = trainer(LocalForwardGradient(head="linear", budget=None))
        stage = session.chains[0][loud]
        stage.judge = lambda output, given, f=stage.judge, k=factor: k * f(output, given)
        session.step(*batch())
        results.append({name: p.detach().clone() for name, p in nn.Module.named_parameters(session.chains[0])})
    changed = {name.split(".")[1] for name in results[0] if not torch.equal(results[0][name], results[1][name])}
    assert changed == {str(loud)}


def test_one_layers_graph_at_a_time():
    def saved(rule):
        session = trainer(rule, model=mlp(12), stages=2)
        session.step(*batch())  # the first one looks at the layers
        with SavedBytes(ignore=session.chains[0].parameters()) as meter:
            session.step(*batch())
        return meter.workers[0, 0]

    assert saved(LocalForwardGradient(head="linear", budget=None)) < 0.4 * saved(
        ul.credit.DGL(head="linear", budget=None)
    )


def test_remarks_count_the_tangents():
    chain = ul.cut(mlp(4, norm=True), 2, like=batch()[0])
    rule = LocalForwardGradient(groups=3, head="linear", budget=None)
    rule.prepare(chain, 0)
    layers = len([part for part in chain[0].body if isinstance(part, (nn.Linear, nn.BatchNorm1d))])
    (sentence,) = rule.remarks(chain, 12)
    assert f"pushes {layers * 3 * 12} tangents a step" in sentence
    assert LocalForwardGradient(mode="two-backward").remarks(chain, 12) == []


def test_what_is_not_possible_is_refused_in_a_sentence():
    with pytest.raises(InvalidChoice, match="Unknown guess 'local'"):
        LocalForwardGradient("local")
    with pytest.raises(InvalidChoice, match="Unknown perturb 'layer'; did you mean 'layers'"):
        LocalForwardGradient(perturb="layer")
    with pytest.raises(InvalidChoice, match="groups=0 is not possible; give a whole number of at least 1"):
        LocalForwardGradient(groups=0)
    stages = [ul.Stage(Recurrent(), head=nn.Linear(4, 3)), ul.Stage(nn.Linear(4, 3))]  # float32 has a kernel of its own
    chain, (x, _) = ul.Chain(stages, like=torch.zeros(2, 3, 4)), example("recurrent")
    with pytest.raises(InvalidChoice, match=r"Stage 0: Forward mode cannot pass.*lstm.*Take mode='two-backward'"):
        ul.Trainer(chain, credit=LocalForwardGradient(), optimizer=sgd)
    chain.like = None
    session = ul.Trainer(chain, credit=LocalForwardGradient(), optimizer=sgd)
    with pytest.raises(InvalidChoice, match=r"Forward mode cannot pass.*lstm.*Take mode='two-backward'"):
        session.step(x.float(), example("recurrent")[1])


# ---- dropout under torch.func ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d, nn.AlphaDropout])
def test_dropout_in_order_is_the_same_in_forward_mode(kind, inplace):
    """Also of what is transposed; without it PyTorch draws other masks there, or this has no use any more."""
    x = torch.randn(3, 4, 5, 6).transpose(0, 1).contiguous(memory_format=torch.channels_last)
    body = nn.Sequential(nn.Tanh(), kind(0.5, inplace=inplace))

    def runs(mode):
        found = []
        for run in (lambda: body(x), lambda: torch.func.jvp(body, (x,), (x,))[0]):
            torch.manual_seed(0)
            with torch.no_grad(), mode():
                found.append(run())
        return torch.equal(*found)

    assert runs(InOrder)
    with InOrder():
        given = x.clone()
        assert (F.dropout(given, 0.5, inplace=inplace) is given) == inplace and torch.equal(given, x) != inplace
    assert kind is nn.Dropout2d or not runs(contextlib.nullcontext)


# ---- what a second reader found ---------------------------------------------------------------------------------------------


def test_tangents_are_counted_of_a_network_without_values():
    """`unlocked train` counts them on the trainer's template, which is on "meta"."""
    for norm in (False, True):
        made = ul.credit.LocalForwardGradient(head="linear", budget=None)
        session = trainer(made, model=mlp(norm=norm))
        assert made.remarks(session.template, 8) == made.remarks(session.chains[0], 8)
        assert made.remarks(session.template, 8)[0].startswith("Forward mode pushes ")


@pytest.mark.parametrize("options", [{}, {"mode": "two-backward"}, {"perturb": "output"}])
def test_a_body_with_nothing_to_train_is_refused_in_a_sentence(options):
    chain = ul.Chain([ul.Stage(part) for part in (nn.Tanh(), nn.Linear(5, 3))], like=torch.randn(4, 5))
    with pytest.raises(InvalidChoice, match="stage 0 has nothing to train"):
        ul.credit.LocalForwardGradient(head="linear", budget=None, **options).prepare(chain, 0)
