"""Neuron groups: stages side by side, in every world; GN-DGL equals its formula and lets no gradient cross."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import unlocked as ul
from unlocked.calibration import measure_stages
from unlocked.chain import Chain, Layout, Stage
from unlocked.credit import base, gn_dgl
from unlocked.errors import CannotCut, InvalidChoice
from unlocked.losses import WrongTarget
from unlocked.rules.diversity import diversity_penalty, wrong_classes
from unlocked.rules.ensemble import depth_weights
from unlocked.simulation import Device, Hardware, costs_of, profile, simulate
from unlocked.worlds import Distributed, Simulated

from methods import assert_same, batch, data, momentum, state
from processes import run_processes

LAYOUT, WIDTHS = (1, 2, 3, 1), ((8,), (3, 4), (3, 2, 4), (3,))
VARIANTS = {
    "naive": {},
    "stop-gradient": {"stop_gradient": True},
    "diversity": {"diversity": 0.5, "temperature": 2.0},
    "both": {"stop_gradient": True, "diversity": 0.3},
    "both-own-stem": {"stop_gradient": True, "diversity": 0.3, "stem": "own"},
}


def rule(variant="both", **more):
    return ul.credit.GNDGL(head="linear", budget=None, **VARIANTS[variant], **more)


def grouped(layout=LAYOUT, widths=WIDTHS, dtype=torch.float64, dropout=0.0):
    """Dense layers of the given widths, side by side; vectors of 5, 3 classes; seed 0."""
    torch.manual_seed(0)
    inputs, stages = 5, []
    for depth, row in enumerate(widths):
        for width in row:
            layers = [nn.Linear(inputs, width)]
            layers += [nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(dropout)] if depth < len(widths) - 1 else []
            stages.append(Stage(nn.Sequential(*layers)))
        inputs = sum(row)
    return Chain(stages, like=batch(dtype=dtype)[0], layout=layout).to(dtype)


def session(credit, consensus=None, chain=None, **options):
    options = {"optimizer": momentum, "seed": 3} | options
    return ul.Trainer(chain if chain is not None else grouped(), credit=credit, consensus=consensus, **options)


# ---- stages side by side ----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 4), max_size=5))
def test_a_layout_numbers_the_stages_depth_by_depth(groups):
    groups = [*groups, 1]
    layout = Layout(groups, sum(groups))
    assert [j for row in layout.rows for j in row] == list(range(sum(groups)))
    assert [len(row) for row in layout.rows] == groups
    assert all(j in layout.row(layout.depth(j)) for j in range(sum(groups)))
    assert layout.plain == (set(groups) == {1})


def test_backprop_over_groups_is_autograd_of_the_whole_network():
    chain, (x, y) = grouped(), batch()
    reference = grouped()
    reference.train()
    F.cross_entropy(reference(x), y).backward()
    expected = {name: p.detach() - 0.1 * p.grad for name, p in reference.named_parameters()}
    session(ul.credit.Backprop(), chain=chain, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1)).step(x, y)
    for name, p in chain.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-12, atol=1e-12)


def test_what_groups_cannot_be_is_refused():
    stages = [Stage(nn.Linear(5, 3)), Stage(nn.Linear(5, 3)), Stage(nn.Linear(6, 3))]
    for layout, words in (([1, 1], "does not fit 3"), ([1, 2], "the last must be one"), ([2, 0, 1], "does not fit")):
        with pytest.raises(CannotCut, match=words):
            Chain(stages, layout=layout)
    for credit in (ul.credit.Interlocking(1), ul.credit.Greedy(), ul.credit.PipeDream(), ul.credit.PETRA()):
        with pytest.raises(InvalidChoice, match="wants its stages in a row"):
            session(credit)
    with pytest.raises(InvalidChoice, match="counts the stages"):
        session(rule(), ul.consensus.CDP(), replicas=2, accumulate=2)
    for wrong in ({"diversity": -0.1}, {"temperature": 0.0}, {"pool": 0}, {"stem": "none"}):
        with pytest.raises(InvalidChoice):
            ul.credit.GNDGL(**wrong)


def test_diversity_wants_labels_of_classes():
    """Soft targets, numbers and heads without scores are refused in a sentence."""
    x, y = batch()
    with pytest.raises(WrongTarget, match="one int64 label for each row"):
        session(rule("diversity")).step(x, F.one_hot(y, 3).double())
    numbers = grouped()
    numbers[-1].loss = ul.losses.mean_squared_error
    with pytest.raises(InvalidChoice, match="gives no scores of classes"):
        session(rule("diversity"), chain=numbers)


def test_options_that_are_no_numbers_are_refused():
    for wrong in ({"groups": 1.5}, {"groups": True}, {"pool": True}, {"diversity": float("inf")}):
        with pytest.raises(InvalidChoice, match="is not possible"):
            ul.credit.GNDGL(**wrong)


def test_heads_by_hand_read_what_heads_of_the_rule_read():
    chain, (x, _) = grouped(), batch()
    chain[1].head = nn.Linear(7, 3).double()
    trained = session(rule("stop-gradient"), chain=chain)
    trained.step(*batch())
    joined = torch.cat([chain[j].body(chain[0].body(x)) for j in (1, 2)], 1)
    assert chain.read(x, 1).shape == chain[1].head(joined).shape
    assert [stage.reads_siblings for stage in chain] == [False, *[True] * 5, False]


@pytest.mark.parametrize("credit", [ul.credit.DGL(), ul.credit.Backprop(), ul.credit.GNDGL()])
def test_heads_that_read_all_groups_are_refused_where_they_would_not_be_given_them(credit):
    chain = session(rule("stop-gradient")).chains[0]
    with pytest.raises(InvalidChoice, match="read what all groups of their depth put out"):
        session(credit, chain=chain)


# ---- the rule ----------------------------------------------------------------------------------------------------------


def losses_of(chain, x, y, options):
    """Every group's loss, as the paper writes it: (stage → loss), with all graphs."""
    found, stem = {}, options.get("stem", "groups") == "groups"
    below = x
    for depth, row in enumerate(chain.layout.rows):
        outputs = [chain[j].body(below) for j in row]
        seen, said = {}, {}
        for j, own in zip(row, outputs):
            parts = [h if k == j else h.detach() for k, h in zip(row, outputs)]
            seen[j] = torch.cat(parts, 1) if options.get("stop_gradient") else own
            if not (stem and depth == 0):
                said[j] = chain[j].head(seen[j]) if chain[j].head is not None else seen[j]
        for j in said:
            found[j] = -torch.log_softmax(said[j], 1)[range(len(y)), y].mean()
            if options.get("diversity") and len(row) > 1:
                found[j] = found[j] + options["diversity"] * sum(
                    likeness(said[j], said[k].detach(), y, options.get("temperature", 3.0)) for k in row if k != j
                )
        joined = torch.cat(outputs, 1)
        below = joined if stem and depth == 0 else joined.detach()
    return found


def likeness(a, b, y, temperature):
    """Mean cosine of the distributions over the wrong classes, sample by sample."""
    total = 0.0
    for row_a, row_b, label in zip(a / temperature, b / temperature, y):
        keep = [k for k in range(len(row_a)) if k != label]
        p, q = torch.softmax(row_a, 0)[keep], torch.softmax(row_b, 0)[keep]
        p, q = p / p.sum(), q / q.sum()
        total = total + (p @ q) / (p.norm() * q.norm())
    return total / len(a)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_is_the_papers_formula(variant):
    trained = session(rule(variant), optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1))
    chain = trained.chains[0]
    reference = grouped()
    for mine, theirs in zip(reference, chain):
        mine.head = None if theirs.head is None else copy.deepcopy(theirs.head)
    reference.train()
    x, y = batch()
    losses = losses_of(reference, x, y, VARIANTS[variant])
    sum(losses.values()).backward()  # every loss stays within its group, so their sum gives each its own gradient
    expected = {n: p.detach() - 0.1 * p.grad for n, p in nn.Module.named_parameters(reference)}
    found = trained.step(x, y)
    for name, p in nn.Module.named_parameters(chain):
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-9, atol=1e-9, msg=name)
    for j, loss in losses.items():
        assert found[j] == pytest.approx(float(loss.detach()), rel=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_gradient_crosses_groups(variant, monkeypatch):
    """The graph behind each loss ends in the weights of its own group (and in the stem's output, where that learns from it)."""
    graphs = {}

    def watched(worker, loss, batch):
        graphs[worker.stage] = leaves_of(loss)
        return loss

    for module in (base, gn_dgl):
        monkeypatch.setattr(module, "reported", watched)
    trained = session(rule(variant))
    trained.step(*batch())
    chain, stem = trained.chains[0], "stem" not in VARIANTS[variant]
    assert set(graphs) == set(range(1 if stem else 0, len(chain)))
    for j, leaves in graphs.items():
        own = {id(p) for p in chain[j].parameters()}
        foreign = [leaf for leaf in leaves if id(leaf) not in own]
        assert own <= {id(leaf) for leaf in leaves}
        assert len(foreign) == (1 if stem and chain.layout.depth(j) == 1 else 0)
        assert all(leaf.shape == (12, 8) for leaf in foreign)  # the stem's output


def leaves_of(loss):
    found, todo, seen = [], [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo += [following for following, _ in node.next_functions]
    return found


@pytest.mark.parametrize("variant", ["stop-gradient", "naive"])
def test_the_update_is_the_slope_of_the_groups_own_loss(variant):
    """By finite differences: moving a weight of a group changes its own loss by its gradient, whatever it does to others."""
    trained = session(rule(variant), optimizer=lambda ps: torch.optim.SGD(ps, lr=1.0))
    x, y = batch()
    before = state(trained)
    trained.step(x, y)
    after = state(trained)
    chain = trained.chains[0]
    nn.Module.load_state_dict(chain, {name.removeprefix("0."): v for name, v in _stages(before).items()})
    chain.train()
    for j in (1, 2, 4):
        name = f"0.{j}.body.0.weight"
        slope = float((before[name] - after[name])[0, 1])
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                chain[j].body[0].weight[0, 1] += step
            values.append({k: float(v.detach()) for k, v in losses_of(chain, x, y, VARIANTS[variant]).items()})
            with torch.no_grad():
                chain[j].body[0].weight[0, 1] -= step
        own = (values[0][j] - values[1][j]) / 2e-5
        assert own == pytest.approx(slope, rel=1e-5)
        others = [abs(values[0][k] - values[1][k]) / 2e-5 for k in values[0] if k != j]
        assert max(others) > 1e-4  # others do depend on it, and it does not care


def _stages(named):
    return {f"0.stages.{name.removeprefix('0.')}": value for name, value in named.items()}


@given(
    st.integers(2, 6), st.integers(1, 5), st.integers(2, 5), st.floats(0.5, 4), st.floats(0, 2), st.integers(0, 10**6)
)
@settings(max_examples=40, deadline=None)
def test_the_penalty_is_its_formula(samples, others, classes, temperature, weight, seed):
    source = torch.Generator().manual_seed(seed)
    logits = [torch.randn(samples, classes, generator=source, dtype=torch.float64) for _ in range(others + 1)]
    y = torch.randint(classes, (samples,), generator=source)
    own, *rest = [wrong_classes(z, y, temperature) for z in logits]
    assert torch.all(own[range(samples), y] == 0)
    torch.testing.assert_close(own.sum(1), torch.ones(samples, dtype=torch.float64))
    expected = weight * sum(float(likeness(logits[0], z, y, temperature)) for z in logits[1:])
    assert float(diversity_penalty(own, rest, weight)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_group_at_every_depth_is_dgl(variant):
    widths = ((8,), (4,), (3,))
    states = []
    for credit in (rule(variant), ul.credit.DGL(head="linear", budget=None)):
        trained = session(credit, chain=grouped((1, 1, 1), widths))
        for seed in range(3):
            trained.step(*batch(seed=seed))
        states.append(state(trained))
    assert_same(*states)


@pytest.mark.parametrize("size", [4, 5])
def test_pooled_features_are_means_of_squares(size):
    h = torch.randn(2, 3, size, size, dtype=torch.float64)
    small = gn_dgl.pooled(h, 2)
    assert small.shape == (2, 3, -(-size // 2), -(-size // 2))
    large = gn_dgl.filled_up(small, h)
    for i, k in itertools.product(range(size), repeat=2):
        rows, columns = slice(i // 2 * 2, i // 2 * 2 + 2), slice(k // 2 * 2, k // 2 * 2 + 2)
        torch.testing.assert_close(large[:, :, i, k], h[:, :, rows, columns].mean((2, 3)))
    assert gn_dgl.pooled(h, 1) is h


def test_pooling_saves_the_bytes_it_says():
    sent = []
    for pool in (1, 2):
        torch.manual_seed(0)
        convolutions = [Stage(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())) for _ in range(2)]
        chain = Chain(
            [*convolutions, Stage(nn.Sequential(nn.Flatten(), nn.Linear(512, 3)))],
            like=torch.randn(2, 1, 8, 8),
            layout=(2, 1),
        )
        trained = session(rule("stop-gradient", pool=pool), chain=chain)
        trained.step(torch.randn(6, 1, 8, 8), torch.randint(3, (6,)))
        sent.append(trained.bytes_sent)
    assert sent[0]["features"] == 2 * 6 * 4 * 64 * 4
    assert sent[1]["features"] == sent[0]["features"] / 4
    assert sent[0]["activation"] == sent[1]["activation"] == 2 * 6 * 4 * 64 * 4


# ---- evaluation --------------------------------------------------------------------------------------------------------


def test_the_layerwise_ensemble_is_its_formula():
    assert depth_weights(3) == pytest.approx([2 / 14, 4 / 14, 8 / 14])
    trained = session(rule("both"))
    train, test = data(60), data(45, 1)
    trained.fit(train, 2, batch_size=12)
    found = trained.evaluate(test, batch_size=20)
    chain = trained.chains[0].eval()
    x, outputs, votes = test.x, {}, 0.0
    for depth, row in enumerate(chain.layout.rows):
        outputs = [chain[j].body(x) for j in row]
        x = torch.cat(outputs, 1)
        if depth:
            said = [chain[j].head(x) if chain[j].head is not None else x for j in row]
            votes = votes + 2.0**depth * sum(torch.softmax(z, 1) for z in said) / len(row)
    assert found.layerwise == pytest.approx(float((votes.argmax(1) == test.y).double().mean()))
    assert found.accuracy == pytest.approx(float((x.argmax(1) == test.y).double().mean()))
    assert session(ul.credit.Backprop()).evaluate(test).layerwise is None


# ---- worlds ------------------------------------------------------------------------------------------------------------

TRAIN, TEST = data(72, dtype=torch.float32), data(60, 1, dtype=torch.float32)


def outcome(variant, consensus, world=None):
    """Dropout, BatchNorm, clipping, accumulation, two replicas."""
    made = session(
        rule(variant),
        consensus,
        chain=grouped(dtype=torch.float32, dropout=0.2),
        replicas=2,
        accumulate=2,
        clip=2.0,
        world=world,
    )
    records = made.fit(TRAIN, 2, batch_size=12, validate=TEST)
    here = {
        f"{w.worker.replica}.{w.worker.stage}.{name}": x.detach().clone()
        for w in made.weights
        for name, x in nn.Module.state_dict(w.stage).items()
    }
    return here, [{k: record[k] for k in ("losses", "bytes", "validation", "samples")} for record in records]


RULES = {
    "all-reduce": ul.consensus.AllReduce,
    "wash": lambda: ul.consensus.WASH(p=0.3),
    "local-sgd": lambda: ul.consensus.LocalSGD(period=2),
}


@pytest.mark.parametrize(
    "variant, name", [("both", "all-reduce"), ("stop-gradient", "wash"), ("diversity", "local-sgd")]
)
def test_simulated_is_in_process(variant, name):
    first = outcome(variant, RULES[name]())
    second = outcome(variant, RULES[name](), Simulated(Hardware(Device(1e9))))
    assert_same(first[0], second[0])
    assert first[1] == second[1]


def on_processes(cluster, cases):
    torch.manual_seed(100 + cluster.rank)
    found = []
    for variant, name in cases:
        with Distributed(cluster) as world:
            found.append(outcome(variant, RULES[name](), world))
    return found


@pytest.mark.parametrize("processes", [3])
def test_processes_are_in_process(processes):
    cases = [("both", "wash"), ("both-own-stem", "all-reduce")]
    found = run_processes(on_processes, processes, cases)
    for k, (variant, name) in enumerate(cases):
        expected, records = outcome(variant, RULES[name]())
        merged = {}
        for rows in found:
            merged |= rows[k][0]
            assert rows[k][1] == records
        assert_same(merged, expected)


@pytest.mark.parametrize("variant", ["both", "both-own-stem"])
def test_shapes_alone_give_the_same_acts(variant):
    hardware = Hardware(Device(1e6))
    made = session(rule(variant), chain=grouped(dtype=torch.float32), world=Simulated(hardware))
    for seed in range(2):
        made.step(*batch(seed=seed, dtype=torch.float32))
    acts = sorted((a.kind, a.stage, a.micro_batch, a.bytes, a.channel or "") for t in made.recent for a in t)
    chain = made.template
    costs = costs_of(profile(session(rule(variant), chain=grouped(dtype=torch.float32)).chains[0]), Device(1e6))
    ghostly = simulate(rule(variant), costs=costs, samples=12, steps=2, hardware=hardware, chain=chain)
    assert acts == sorted((a.kind, a.stage, a.micro_batch, a.bytes, a.channel or "") for a in ghostly)


def test_a_step_of_groups_takes_as_long_as_the_slowest():
    """Naive groups wait for nobody beside them: the steady time of a step is that of the slowest stage."""
    chain = grouped((2, 1), ((50, 10), (3,)), dtype=torch.float32)
    rule("naive").prepare(chain, 0)
    costs = costs_of(profile(chain), Device(1e6))
    timeline = simulate(rule("naive"), costs=costs, samples=64, steps=8, chain=chain)
    ends = [act.end for act in timeline if act.kind == "U" and act.stage == 0]
    alone = sum(act.end - act.start for act in timeline if act.stage == 0 and act.kind in "FBLU") / 8
    assert ends[-1] - ends[-2] == pytest.approx(alone)


def test_every_stage_can_be_measured_alone():
    """Heads that read what the groups beside theirs put out are given it."""
    chain = grouped(dtype=torch.float32)
    rule("both").prepare(chain, 0)
    measured = measure_stages(chain, [4], windows=1, seconds=0.001)
    assert [{"forward", "backward", "update"} <= set(points[4]) for points in measured] == [True] * 7
    assert ["head-backward" in points[4] for points in measured] == [False, *[True] * 6]


def test_resuming_goes_on_bit_for_bit(tmp_path):
    whole = session(rule(), chain=grouped(dtype=torch.float32, dropout=0.2), replicas=2)
    whole.fit(TRAIN, 2, batch_size=12)
    half = session(rule(), chain=grouped(dtype=torch.float32, dropout=0.2), replicas=2)
    half.fit(TRAIN, 1, batch_size=12, checkpoint=tmp_path)
    resumed = ul.Trainer.resume(tmp_path, grouped(dtype=torch.float32, dropout=0.2), optimizer=momentum)
    resumed.fit(TRAIN, 2, batch_size=12)
    assert_same(state(whole), state(resumed))


def test_a_run_of_the_command_line_is_cut_into_groups_and_not_anew(tmp_path, capsys):
    from unlocked.cli import main

    rule = "gn-dgl(groups=2,final=0c1f,head=linear,budget=None)"
    words = ["--credit", rule, "--model", "mlp", "--stages", "1", "--epochs", "1"]
    run = str(tmp_path / "run")
    assert main(["train", "--run", run, *words]) == 0
    assert "all heads together" in capsys.readouterr().out
    assert main(["train", "--resume", run, "--recut", "2"]) == 2
    assert "cannot be cut anew" in " ".join(capsys.readouterr().err.split())
