"""WASH complete: the law of its draw, WASH+Opt, layers, BatchNorm, subsets, times, bytes, worlds, resumes."""

from __future__ import annotations

import functools
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import unlocked as ul
from unlocked.consensus.shuffling.layers import Layer, Part, layers_of
from unlocked.consensus.shuffling.moving import Shuffle
from unlocked.consensus.shuffling.states import elementwise_states
from unlocked.errors import InvalidChoice
from unlocked.links import HEADER_BYTES
from unlocked.rules import shuffle
from unlocked.simulation.costs import costs_of
from unlocked.simulation.hardware import Device
from unlocked.simulation.profile import profile
from unlocked.simulation.simulating import simulate
from unlocked.worlds import Distributed

from methods import assert_same, batch, data, mlp, state, trainer
from processes import run_processes

WASH = ul.consensus.WASH


def source(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- the draw --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.05, 0.4, 0.9])
def test_every_set_of_hits_has_the_probability_of_its_coin_tosses(p):
    """All 2^4 outcomes of four tosses, each within 4.5 standard errors of p^k (1−p)^(4−k)."""
    rounds, generator = 8000, source(1)
    seen = dict.fromkeys(itertools.product((0, 1), repeat=4), 0)
    for _ in range(rounds):
        found = set(shuffle.hits(4, p, generator).tolist())
        seen[tuple(int(k in found) for k in range(4))] += 1
    for outcome, count in seen.items():
        chance = p ** sum(outcome) * (1 - p) ** (4 - sum(outcome))
        assert abs(count / rounds - chance) < 4.5 * math.sqrt(chance * (1 - chance) / rounds) + 1e-9, outcome


def test_the_number_of_hits_is_binomial_and_they_lie_anywhere():
    count, p, rounds, generator = 20_000, 0.01, 600, source(2)
    rows = [shuffle.hits(count, p, generator) for _ in range(rounds)]
    numbers = torch.tensor([len(row) for row in rows], dtype=torch.float64)
    variance = count * p * (1 - p)
    assert abs(numbers.mean() - count * p) < 4.5 * math.sqrt(variance / rounds)
    assert abs(numbers.var() - variance) < 4.5 * variance * math.sqrt(2 / rounds)
    parts = torch.histc(torch.cat(rows).double(), bins=20, min=0, max=count)
    expected = rounds * count * p / 20
    assert (parts - expected).abs().max() < 4.5 * math.sqrt(expected)


def test_the_hits_go_on_where_too_few_gaps_were_drawn(monkeypatch):
    """As many numbers as are nearly always enough are drawn at once; with far too few, the law is the same."""
    monkeypatch.setattr(shuffle, "math", SimpleNamespace(sqrt=lambda expected: -expected / 4))
    found = torch.zeros(2000)
    for seed in range(400):
        indices = shuffle.hits(2000, 0.05, source(seed))
        assert torch.equal(indices, indices.unique())
        found[indices] += 1
    assert (found / 400 - 0.05).abs().max() < 5 * math.sqrt(0.05 * 0.95 / 400)
    assert abs(found.mean() / 400 - 0.05) < 4.5 * math.sqrt(0.05 * 0.95 / 400 / 2000)


@pytest.mark.parametrize("table", [6, 0])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_every_permutation_is_as_likely_from_the_table_and_from_the_exchanges(n, table, monkeypatch):
    monkeypatch.setattr(shuffle, "_IN_A_TABLE", table)
    count = 30_000
    columns = shuffle.permutations(shuffle.chances(count, n, source(3)), n)
    assert columns.dtype == torch.long and columns.shape == (n, count)
    seen = dict.fromkeys(itertools.permutations(range(n)), 0)
    for column in columns.T.tolist():
        seen[tuple(column)] += 1
    chance = 1 / math.factorial(n)
    for number in seen.values():
        assert abs(number / count - chance) <= 4.5 * math.sqrt(chance * (1 - chance) / count)


def test_permutations_of_ten_replicas_put_each_anywhere():
    n, count = 10, 20_000
    columns = shuffle.permutations(shuffle.chances(count, n, source(4)), n)
    assert torch.equal(columns.sort(0).values, torch.arange(n)[:, None].expand(n, count))
    shares = torch.stack([(columns == owner).double().mean(1) for owner in range(n)])
    assert (shares - 1 / n).abs().max() < 4.5 * math.sqrt(0.09 / count)
    pairs = torch.histc((columns[0] * n + columns[9]).double(), bins=n * n, min=0, max=n * n).view(n, n) / count
    assert pairs.diagonal().sum() == 0
    assert (pairs + torch.eye(n) / 90 - 1 / 90).abs().max() < 5 * math.sqrt(1 / 90 / count)


def owners_of(shuffled, update, n, like):
    """For each tensor of a stage: the replica that each of its entries comes from, (N, *shape)."""
    rows = []
    for rank in range(n):
        tensors = [torch.full_like(x, rank) for x in like]
        rows.append(tensors)
    found = [shuffled(tensors).messages(update, lambda x: ()) for tensors in rows]
    for message in zip(*found):
        values = torch.stack([row.values for row in message])
        for rank, row in enumerate(message):
            row.put(values.gather(0, row.owners[rank : rank + 1])[0])
    return [torch.stack(tensors) for tensors in zip(*rows)]


@given(
    n=st.integers(2, 7),
    p=st.sampled_from([0.0, 0.02, 0.4, 1.0]),
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    update=st.integers(1, 10**6),
)
@settings(deadline=None, max_examples=40)
def test_a_shuffle_is_a_permutation_of_each_entry_and_a_function_of_seed_update_and_layer(n, p, sizes, dtype, update):
    like = [torch.zeros(size, dtype=dtype) for size in sizes]

    def of(layers):
        return lambda tensors: Shuffle([Layer(f"layer {k}", p, [Part(tensors[i])]) for i, k in enumerate(layers)], 5, n)

    numbers = list(range(len(sizes)))
    whole = owners_of(of(numbers), update, n, like)
    for owners in whole:
        expected = torch.arange(n, dtype=dtype).view(n, 1, 1).expand_as(owners)
        assert torch.equal(owners.sort(0).values, expected)
        if p == 0.0:
            assert torch.equal(owners, expected)
    for k in numbers:  # each layer alone: nothing hangs on what else is in the stage
        (alone,) = owners_of(of([k]), update, n, [like[k]])
        assert torch.equal(alone, whole[k])


def test_the_expected_shuffle_is_a_step_to_the_mean():
    """E[θ̂_n] = (1−p)θ_n + pθ̄ (F Eq. 6.4), each entry within its error bar."""
    n, p, rounds = 3, 0.3, 4000
    like = [torch.zeros(4, 5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)]

    def of(tensors):
        return Shuffle([Layer("a", p, [Part(tensors[0]), Part(tensors[1])])], 0, n)

    theta = [torch.randn(n, *x.shape, generator=source(), dtype=torch.float64) for x in like]
    total = [torch.zeros_like(x) for x in theta]
    for update in range(rounds):
        for k, owners in enumerate(owners_of(of, update, n, like)):
            total[k] += theta[k].gather(0, owners.long())
    for x, sums in zip(theta, total):
        mean = x.mean(0)
        variance = (1 - p) * x**2 + p * (x**2).mean(0) - ((1 - p) * x + p * mean) ** 2
        assert bool(((sums / rounds - (1 - p) * x - p * mean).abs() < 5 * (variance / rounds).sqrt() + 1e-12).all())


def test_strides_do_not_change_what_moves():
    def of(tensors):
        return Shuffle([Layer("a", 0.5, [Part(x) for x in tensors])], 0, 3)

    plain = [torch.zeros(4, 3, 2, 2), torch.zeros(6, 5)]
    strided = [plain[0].to(memory_format=torch.channels_last), torch.zeros(5, 6).T]
    for a, b in zip(owners_of(of, 1, 3, plain), owners_of(of, 1, 3, strided)):
        assert torch.equal(a, b) and bool((a != torch.arange(3.0).view(3, *[1] * (a.dim() - 1))).any())


# ---- a training of tags: which replica each number comes from ----------------------------------------------------------


class Tags(torch.optim.Optimizer):
    """At its first step it writes the replica's number into all weights and states; afterwards it leaves them alone.

    `half`: only matrices have a state; `dtype`: of the states.
    """

    def __init__(self, parameters, tag, half=False, dtype=None):
        super().__init__(parameters, {})
        self.tag, self.half, self.dtype = tag, half, dtype

    @torch.no_grad()
    def step(self, closure=None):
        for x in self.param_groups[0]["params"]:
            if x in self.state or getattr(x, "tagged", False):
                continue
            x.tagged = True
            x.fill_(self.tag)
            if x.dim() > 1 or not self.half:
                self.state[x] = {
                    "step": torch.tensor(float(self.tag)),
                    "first": torch.full_like(x, self.tag + 10, dtype=self.dtype),
                    "second": torch.full_like(x, self.tag + 20, dtype=self.dtype),
                    "of_rows": torch.full_like(x.sum(-1, keepdim=True), self.tag) if x.dim() > 1 else None,
                }


def tagged(rule, model=None, stages=3, replicas=3, steps=1, credit=None, **options):
    """A session after updates that do nothing but tag and shuffle."""
    made = itertools.count()
    model = mlp() if model is None else model
    session = trainer(
        credit or ul.credit.Backprop(),
        rule,
        stages=stages,
        replicas=replicas,
        model=model,
        optimizer=lambda ps: Tags(ps, next(made) // stages, **options),
    )
    x, y = batch(12, dtype=next(model.parameters()).dtype)
    for _ in range(steps):
        session.step([x] * replicas, [y] * replicas)
    return session


def origins(session, name):
    """The weights of this name on all replicas, (N, *shape), and the stages' optimizer states beside it."""
    rows = [dict(chain.state_dict(keep_vars=True))[name] for chain in session.chains]
    states = [
        next(w.store.optimizer.state[x] for w in session.weights if x in w.store.optimizer.state)
        if any(x in w.store.optimizer.state for w in session.weights)
        else {}
        for x in rows
    ]
    return torch.stack([x.detach() for x in rows]), states


def test_layers_of_one_size_have_draws_of_their_own():
    like = [torch.zeros(9, 9), torch.zeros(9, 9)]
    first, second = owners_of(
        lambda tensors: Shuffle([Layer(f"layer {k}", 0.5, [Part(x)]) for k, x in enumerate(tensors)], 5, 3), 1, 3, like
    )
    assert not torch.equal(first, second)


@given(
    n=st.integers(1, 5),
    p=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    schedule=st.sampled_from(["decreasing", "constant", "increasing"]),
    layers=st.sampled_from(["module", "tensor", "block"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    half=st.booleans(),
)
@settings(deadline=None, max_examples=25)
def test_states_move_with_their_weights_and_nothing_else_does(n, p, schedule, layers, dtype, half):
    rule = WASH(p=p, schedule=schedule, layers=layers, optimizer=True)
    session = tagged(rule, model=mlp(dtype=dtype), replicas=n, half=half)
    moved = 0
    for name in dict(session.chains[0].state_dict()):
        weights, states = origins(session, name)
        numbers = torch.arange(n, dtype=dtype).view(n, *[1] * (weights.dim() - 1)).expand_as(weights)
        assert torch.equal(weights.sort(0).values, numbers)
        moved += int((weights != numbers).sum())
        for rank, found in enumerate(states):
            if found:
                assert torch.equal(found["first"], weights[rank] + 10)
                assert torch.equal(found["second"], weights[rank] + 20)
                assert found["step"] == rank
                assert found["of_rows"] is None or bool((found["of_rows"] == rank).all())
        assert all(states) or (half and weights.dim() == 2)
    assert (moved > 0) == (p > 0 and n > 1)


def test_without_optimizer_the_states_stay():
    session = tagged(WASH(p=1.0))
    for name in dict(session.chains[0].state_dict()):
        _, states = origins(session, name)
        assert all(bool((found["first"] == rank + 10).all()) for rank, found in enumerate(states))


def patterns(session):
    """Where every number of the network comes from, by the user's names."""
    return {name: origins(session, name)[0] for name in dict(session.chains[0].state_dict())}


@pytest.mark.parametrize("layers", ["module", "tensor", "block"])
def test_the_shuffle_is_the_same_for_every_cut(layers):
    rule = WASH(p=0.5, layers=layers, optimizer=True)
    first, *others = (patterns(tagged(rule, stages=stages, steps=2)) for stages in (1, 2, 3, 5))
    for other in others:
        assert_same(first, other)


def test_a_chain_that_only_some_weights_have_states_of_sends_one_message_for_each_dtype():
    for options, messages in (({}, 1), ({"half": True}, 1), ({"dtype": torch.float32}, 2)):
        session = tagged(WASH(p=1.0, schedule="constant", optimizer=True), stages=1, **options)
        exchanged = [act for act in session.timeline if act.kind == "M" and act.replica == 0]
        assert len(exchanged) == messages and {act.channel for act in exchanged} == {"wash"}


# ---- torch's optimizers ------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": (lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9), {"momentum_buffer"}),
    "sgd-plain": (lambda ps: torch.optim.SGD(ps, lr=0.1), set()),
    "adam": (lambda ps: torch.optim.Adam(ps, lr=0.01), {"exp_avg", "exp_avg_sq"}),
    "amsgrad": (lambda ps: torch.optim.Adam(ps, lr=0.01, amsgrad=True), {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    "adamw": (lambda ps: torch.optim.AdamW(ps, lr=0.01), {"exp_avg", "exp_avg_sq"}),
    "nadam": (lambda ps: torch.optim.NAdam(ps, lr=0.01), {"exp_avg", "exp_avg_sq"}),
    "radam": (lambda ps: torch.optim.RAdam(ps, lr=0.01), {"exp_avg", "exp_avg_sq"}),
    "adamax": (lambda ps: torch.optim.Adamax(ps, lr=0.01), {"exp_avg", "exp_inf"}),
    "adagrad": (lambda ps: torch.optim.Adagrad(ps, lr=0.01), {"sum"}),
    "adadelta": (lambda ps: torch.optim.Adadelta(ps), {"square_avg", "acc_delta"}),
    "rmsprop": (
        lambda ps: torch.optim.RMSprop(ps, lr=0.01, momentum=0.9, centered=True),
        {"square_avg", "momentum_buffer", "grad_avg"},
    ),
    "rprop": (lambda ps: torch.optim.Rprop(ps, lr=0.01), {"prev", "step_size"}),
    "asgd": (lambda ps: torch.optim.ASGD(ps, lr=0.01), {"ax"}),
    "adafactor": (lambda ps: torch.optim.Adafactor(ps, lr=0.01), {"variance"}),
}


def alike(rule, make, n=3):
    """Two updates on a different batch for each replica."""
    session = trainer(ul.credit.Backprop(), rule, replicas=n, stages=2, optimizer=make)
    for k in range(2):
        pairs = [batch(12, seed=10 * k + rank) for rank in range(n)]
        session.step([x for x, _ in pairs], [y for _, y in pairs])
    return session


def rows_of(session):
    """For every weight: its tuples (weight, states …) by entry and replica, and the other states."""
    found = []
    for parts in zip(*(list(chain.parameters()) for chain in session.chains)):
        tensors, rest = [], []
        for x in parts:
            own = next((w.store.optimizer.state[x] for w in session.weights if x in w.store.optimizer.state), {})
            keys = [
                k for k in sorted(own) if k != "step" and isinstance(own[k], torch.Tensor) and own[k].shape == x.shape
            ]
            tensors.append(torch.stack([x.detach(), *(own[k] for k in keys)], -1).flatten(0, -2))
            rest.append({k: v for k, v in own.items() if k not in keys})
        found.append((torch.stack(tensors), keys, rest))
    return found


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_of_torch_gives_its_states_along(kind):
    """The tuples (weight, its states) of an entry are the same multiset as without the last shuffle, only elsewhere."""
    make, expected = OPTIMIZERS[kind]
    washed = rows_of(alike(WASH(p=0.9, schedule="constant", optimizer=True, every=2), make))
    before = rows_of(alike(ul.consensus.Independent(), make))
    seen, moved = set(), 0
    for (after, keys, rest), (unmoved, _, others) in zip(washed, before):
        seen |= set(keys)
        moved += int((after != unmoved).any(-1).sum())
        for entry in range(after.shape[1]):
            assert sorted(after[:, entry].tolist()) == sorted(unmoved[:, entry].tolist())
        for mine, theirs in zip(rest, others):
            assert mine.keys() == theirs.keys()
            assert all(
                torch.equal(torch.as_tensor(mine[k]), torch.as_tensor(theirs[k])) for k in mine if mine[k] is not None
            )
    assert seen == expected and moved > 50


def test_scalars_of_a_scalar_weight_are_no_state_of_its_entries():
    for kind in ("adam", "nadam", "asgd"):
        weight = nn.Parameter(torch.tensor(1.0))
        optimizer = OPTIMIZERS[kind][0]([weight])
        assert elementwise_states(optimizer, weight) == []  # before its first step
        assert not optimizer.state
        weight.grad = torch.tensor(2.0)
        optimizer.step()
        assert len(elementwise_states(optimizer, weight)) == len(OPTIMIZERS[kind][1])


def test_wash_opt_at_its_ends():
    adam = OPTIMIZERS["adam"][0]
    for n in (1, 3):
        independent = state(alike(ul.consensus.Independent(), adam, n))
        assert_same(state(alike(WASH(p=0.0, optimizer=True), adam, n)), independent)
    assert_same(state(alike(WASH(p=0.7, optimizer=True), adam, 1)), state(alike(ul.consensus.Independent(), adam, 1)))
    plain, moved = (state(alike(WASH(p=0.7, optimizer=opt), adam)) for opt in (False, True))
    assert any(not torch.equal(plain[name], moved[name]) for name in plain)  # from the second update on


# ---- what a layer is ---------------------------------------------------------------------------------------------------


def user_names(chain, what):
    """Every layer as the user's names of its tensors."""
    names = {id(x): name for name, x in chain.state_dict(keep_vars=True).items()}
    return [[names[id(x)] for x in tensors] for _, _, tensors in chain.layers(what)]


@pytest.mark.parametrize("what", ["module", "tensor", "block"])
def test_layers_do_not_depend_on_the_number_of_stages(what):
    x = torch.randn(2, 3, 16, 16)
    found = []
    for stages in (1, 2, 4, 10):
        model = ul.models.build("resnet18", input_shape=(3, 16, 16), classes=10, width=0.05)
        found.append(user_names(ul.cut(model, stages, like=x), what))
    assert all(other == found[0] for other in found[1:])
    flat = [name for layer in found[0] for name in layer]
    assert sorted(flat) == sorted(name for name, _ in model.named_parameters())
    if what == "block":
        assert [layer[0].split(".")[:2] for layer in found[0][1:-1]] == [["blocks", str(k)] for k in range(8)]
        assert len(found[0]) == 10 and set(found[0][1]) == {n for n in flat if n.startswith("blocks.0.")}


def test_blocks_of_a_sequence_take_what_follows_them():
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3))
    chain = ul.cut(model, 2, like=torch.randn(4, 5))
    assert user_names(chain, "block") == [["1.weight", "1.bias", "2.weight", "2.bias"], ["4.weight", "4.bias"]]


class Own(nn.Module):
    """A user's network with a weight of its own, a sequence and a block."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))
        self.features = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh())
        self.block = nn.ModuleDict({"a": nn.Linear(7, 7)})
        self.out = nn.Linear(7, 3)

    def forward(self, x):
        return self.out(self.block["a"](self.features(x * self.scale)))


def test_blocks_of_a_network_that_was_split_by_names():
    expected = [["scale"], ["features.0"], ["features.2"], ["block.a"], ["out"]]
    for points in (["features.1"], ["features.3"], ["features", "block.a"], ["features.1", "features.3", "block.a"]):
        chain = ul.cut(Own(), like=torch.randn(4, 5), at=points)
        found = user_names(chain, "block")
        modules = [list(dict.fromkeys(name.removesuffix(".weight").removesuffix(".bias") for name in x)) for x in found]
        assert modules in (expected, [["scale", "features.0"], *expected[2:]]), points


def test_a_stage_by_hand_is_one_block():
    chain = ul.Chain([ul.chain.Stage(Own()), ul.chain.Stage(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))])
    assert [len(layer) for layer in user_names(chain, "block")] == [9, 2, 2]


# ---- what is shuffled --------------------------------------------------------------------------------------------------


def moved_names(session):
    """The user's names of the tensors in which a number has moved."""
    return {
        name
        for name, rows in patterns(session).items()
        if any(bool((row != rank).any()) for rank, row in enumerate(rows)) and rows.is_floating_point()
    }


EVERYTHING = functools.partial(WASH, p=1.0, schedule="constant")


def test_batchnorm_weights_can_stay():
    model = mlp(norm=True)
    norms = {f"{name}.{kind}" for name, part in model.named_modules() if isinstance(part, nn.BatchNorm1d)
             for kind in ("weight", "bias")}  # fmt: skip
    names = {name for name, _ in model.named_parameters()}
    statistics = {n for n in model.state_dict() if "running" in n}
    assert moved_names(tagged(EVERYTHING(), model=mlp(norm=True))) - statistics == names
    assert moved_names(tagged(EVERYTHING(batchnorm_affine=False), model=mlp(norm=True))) - statistics == names - norms


@pytest.mark.parametrize("affine", [True, False])
def test_running_statistics_move_in_pairs_or_stay(affine):
    def trained(policy):
        torch.manual_seed(0)
        norms = [nn.BatchNorm1d(7, affine=affine), nn.BatchNorm1d(9, affine=affine)]
        model = nn.Sequential(nn.Linear(5, 7), norms[0], nn.Linear(7, 9), norms[1], nn.Linear(9, 3)).double()
        rule = EVERYTHING(batchnorm_statistics=policy, only=r"running" if policy == "shuffle" else None)
        session = trainer(ul.credit.Backprop(), rule, model=model, stages=2, replicas=3)
        pairs = [batch(12, seed=rank) for rank in range(3)]
        session.step([x for x, _ in pairs], [y for _, y in pairs])
        return [chain.state_dict() for chain in session.chains]

    kept, moved = trained("keep"), trained("shuffle")
    for k in (1, 3):
        a, b = (
            torch.stack([torch.stack([row[f"{k}.running_mean"], row[f"{k}.running_var"]], -1) for row in rows])
            for rows in (kept, moved)
        )
        assert not torch.equal(a, b)
        for channel in range(a.shape[1]):
            assert sorted(a[:, channel].tolist()) == sorted(b[:, channel].tolist())
    assert all(row["1.num_batches_tracked"] == 1 for row in moved)


@pytest.mark.parametrize("affine", [True, False])
def test_running_statistics_move_as_often_as_their_layer(affine):
    norms = [nn.BatchNorm1d(size, affine=affine) for size in (7, 9, 3)]
    model = nn.Sequential(nn.Linear(5, 7), norms[0], nn.Linear(7, 9), norms[1], nn.Linear(9, 3), norms[2])
    chain = ul.cut(model, 2, like=torch.randn(4, 5))
    rule = WASH(p=0.5, layers="block", batchnorm_statistics="shuffle", only="running")
    found = {
        id(part.tensor): layer.p
        for j in range(2)
        for layer in layers_of(chain, rule.selection, j)
        for part in layer.parts
    }
    assert found == {id(norms[0].running_mean): 0.5, id(norms[1].running_mean): 0.25}  # the last layer: never


def test_statistics_keep_is_the_default():
    session = trainer(ul.credit.Backprop(), EVERYTHING(), model=mlp(norm=True), replicas=2)
    names = [part.tensor.shape for j in range(3) for layer in layers_of(session.chains[0], EVERYTHING().selection, j)
             for part in layer.parts]  # fmt: skip
    assert len(names) == len(list(session.chains[0].parameters()))


def test_a_subset_is_shuffled_and_the_draw_of_the_rest_is_the_layers_own():
    names = {name for name, _ in mlp().named_parameters()}
    for options, expected in (
        ({"only": r"\.bias$"}, {n for n in names if n.endswith("bias")}),
        ({"skip": r"^[02]\."}, {n for n in names if n[0] not in "02"}),
        ({"only": "weight", "skip": "^0"}, {n for n in names if n.endswith("weight") and n[0] != "0"}),
    ):
        assert moved_names(tagged(EVERYTHING(**options))) == expected
    whole, part = (patterns(tagged(WASH(p=0.5, **options))) for options in ({}, {"skip": "^0"}))
    assert all(torch.equal(whole[name], part[name]) for name in whole if name[0] != "0")  # the same l and L


def test_heads_can_be_named():
    dgl = ul.credit.DGL(head="linear", budget=None)

    def heads(rule):
        session = tagged(rule, credit=dgl)
        return [bool((x != 0).any()) for j in range(2) for x in session.chains[0][j].head.parameters()]

    assert all(heads(EVERYTHING())) and not any(heads(EVERYTHING(skip=r"^stages\.\d\.head")))
    only_first = tagged(EVERYTHING(only=r"^stages\.0\.head"), credit=dgl)
    assert moved_names(only_first) == set() and only_first.bytes_sent["wash"] > 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"only": "nothing-like-it"}, "Nothing is left to shuffle with only='nothing-like-it'"),
        ({"skip": ".*"}, "Nothing is left"),
        ({"only": "running"}, "Nothing is left"),
        ({"only": r"^1\.", "batchnorm_affine": False}, "Nothing is left"),
        ({"only": "("}, "no regular expression"),
        ({"layers": "blok"}, "block"),
        ({"batchnorm_statistics": "average"}, "keep"),
        ({"start": -1}, "no epoch"),
        ({"end": 0.5}, "no epoch"),
        ({"start": 3, "end": 3}, "leaves no epoch"),
        ({"every": 0}, "at least 1"),
    ],
)
def test_what_is_not_possible_is_refused_in_a_sentence(options, sentence):
    with pytest.raises(InvalidChoice, match=sentence.replace("(", r"\(")):
        trainer(ul.credit.Backprop(), WASH(**options), model=mlp(norm=True), replicas=2)


# ---- when --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "end"), [(None, None), (1, None), (None, 2), (1, 3)])
def test_a_shuffle_has_a_first_and_a_last_epoch(start, end):
    session = trainer(ul.credit.Backprop(), WASH(p=0.5, start=start, end=end), replicas=2)
    records = session.fit(data(24), 4, batch_size=12)
    shuffled = [record["bytes"].get("wash", 0) > 0 for record in records]
    assert shuffled == [(start or 0) <= epoch < (4 if end is None else end) for epoch in range(4)]


def test_every_second_update():
    session = trainer(ul.credit.Backprop(), WASH(p=0.5, every=2), replicas=2)
    sent = []
    for k in range(6):
        session.step(*batch(12, seed=k))
        sent.append(session.bytes_sent["wash"])
    assert [b > a for a, b in zip([0, *sent], sent)] == [False, True] * 3


@pytest.mark.parametrize("stages", [1, 3])
def test_a_resumed_run_shuffles_on_bit_for_bit(stages, tmp_path):
    """The permutations of the rest of the run come from the update's number alone; also in the middle of start … end."""
    rule = WASH(p=0.4, optimizer=True, start=1, end=4, every=3, batchnorm_statistics="shuffle", layers="block")

    def session():
        return trainer(ul.credit.Backprop(), rule, stages=stages, replicas=3, model=mlp(norm=True),
                       optimizer=OPTIMIZERS["adam"][0])  # fmt: skip

    whole, stopped = session(), session()
    records = whole.fit(data(60), 5, batch_size=12)
    assert [record["bytes"].get("wash", 0) > 0 for record in records] == [False, True, True, True, False]
    stopped.fit(data(60), 2, batch_size=12, checkpoint=tmp_path)
    resumed = ul.Trainer.resume(tmp_path, ul.cut(mlp(norm=True), stages, like=batch()[0]))
    assert resumed.consensus == rule
    rest = resumed.fit(data(60), 5, batch_size=12)
    assert_same(state(resumed), state(whole))
    assert [row["bytes"] for row in rest] == [row["bytes"] for row in records[2:]]


# ---- bytes -------------------------------------------------------------------------------------------------------------

LAYERS, WIDTH, STEPS = 11, 24, 200


def even_network():
    """Equal layers, so that the mean of p_l is p/2."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def even_session(p, world=None, optimizer=False, make=None, replicas=3, stages=1):
    chain = ul.cut(even_network(), stages, like=torch.zeros(2, WIDTH))
    return ul.Trainer(
        chain,
        consensus=WASH(p=p, optimizer=optimizer),
        replicas=replicas,
        world=world,
        optimizer=make or (lambda ps: torch.optim.SGD(ps, lr=1e-4)),
    )


def some_steps(session, steps=STEPS):
    """(payload, wire bytes, messages) of the shuffles by the workers here."""
    sent = wire = 0
    y = torch.zeros(4, dtype=torch.long)
    for k in range(steps):
        x = torch.randn(4 * session.replicas, WIDTH, generator=source(k))
        session.step(x, y.repeat(session.replicas))
        acts = [act for act in session.timeline if act.channel == "wash"]
        sent += sum(act.bytes for act in acts)
        wire += sum(act.wire for act in acts)
    weights = [x.detach().clone() for w in session.weights for x in w.stage.parameters()]
    return sent, wire, weights


def some_steps_apart(cluster, p, replicas, optimizer, kind, steps):
    with Distributed(cluster) as world:
        return some_steps(even_session(p, world, optimizer, OPTIMIZERS[kind][0], replicas), steps)


@pytest.mark.parametrize("n", [2, 4])
def test_bytes_over_processes_are_those_of_the_law_and_no_index_travels(n):
    """p/2·d·(N−1)/N·4 bytes a model and step within 2 %, over 200 steps; on the wire, headers beside them and nothing else."""
    p, d = 0.2, LAYERS * WIDTH**2
    found = run_processes(some_steps_apart, n, p, n, False, "sgd-plain", STEPS)
    sent, _, weights = some_steps(even_session(p, replicas=n, make=OPTIMIZERS["sgd-plain"][0]))
    assert sum(row[0] for row in found) == sent
    assert sent == pytest.approx(STEPS * n * p / 2 * d * (n - 1) / n * 4, rel=0.02)
    for payload, wire, _ in found:
        assert payload == pytest.approx(STEPS * p / 2 * d * (n - 1) / n * 4, rel=0.02)
        headers, rest = divmod(wire - payload, HEADER_BYTES)
        assert rest == 0 and headers <= STEPS * (n - 1)
    apart = [x for _, _, rows in found for x in rows]
    assert all(torch.equal(x, y) for x, y in zip(apart, weights, strict=True))


@pytest.mark.parametrize("kind, times", [("sgd", 2), ("adam", 3)])
def test_wash_opt_over_processes_is_in_process_bit_for_bit_and_sends_the_states_in_the_same_messages(kind, times):
    n, steps = 3, 12
    found = run_processes(some_steps_apart, n, 0.1, n, True, kind, steps)
    sent, _, weights = some_steps(even_session(0.1, None, True, OPTIMIZERS[kind][0], n), steps)
    alone, _, _ = some_steps(even_session(0.1, None, False, OPTIMIZERS[kind][0], n), steps)
    assert sum(row[0] for row in found) == sent == times * alone
    assert all((wire - payload) // HEADER_BYTES <= steps * (n - 1) for payload, wire, _ in found)
    apart = [x for _, _, rows in found for x in rows]
    assert all(torch.equal(x, y) for x, y in zip(apart, weights, strict=True))


@pytest.mark.parametrize("layers", ["module", "block"])
def test_without_tensors_about_as_many_bytes_are_counted(layers):
    p, n = 0.2, 3
    chain = ul.cut(even_network(), 2, like=torch.zeros(2, WIDTH))
    costs = costs_of(profile(chain), Device(1e6))
    for optimizer, times in ((False, 1), (True, 2)):
        rule = WASH(p=p, layers=layers, optimizer=optimizer, only="weight", batchnorm_statistics="shuffle")
        timeline = simulate(ul.credit.Backprop(), rule, costs=costs, replicas=n, chain=chain)
        sent = sum(act.bytes for act in timeline if act.channel == "wash")
        assert sent == pytest.approx(times * n * p / 2 * LAYERS * WIDTH**2 * (n - 1) / n * 4, rel=0.01)
