"""Cutting: the exact partition, any model, the user's own names."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import unlocked as ul
from unlocked import costs
from unlocked.errors import CannotCut, UnlockedError
from unlocked.partition import partition

from methods import batch, mlp


def all_splits(n, parts):
    for cuts in itertools.combinations(range(1, n), parts - 1):
        bounds = [0, *cuts, n]
        yield [b - a for a, b in itertools.pairwise(bounds)]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.data())
@settings(deadline=None, max_examples=60)
def test_the_partition_is_the_exact_min_max_and_then_the_evenest(sizes, draw):
    parts = draw.draw(st.integers(1, len(sizes)))

    def score(split):
        ends = list(itertools.accumulate(split))
        sums = [sum(sizes[end - k : end]) for end, k in zip(ends, split)]
        return max(sums), sum(x * x for x in sums)

    found = partition([float(x) for x in sizes], parts)
    assert len(found) == parts and min(found) >= 1 and sum(found) == len(sizes)
    assert score(found) == min(score(split) for split in all_splits(len(sizes), parts))


@pytest.mark.parametrize("parts", [0, 4, -1])
def test_an_impossible_partition_is_refused(parts):
    with pytest.raises(ValueError, match="3 item"):
        partition([1, 2, 3], parts)


@given(stages=st.integers(1, 5), balance=st.sampled_from(["flops", "parameters", "memory"]), norm=st.booleans())
@settings(deadline=None, max_examples=20)
def test_a_sequential_is_cut_at_any_count_and_stays_the_same_function(stages, balance, norm):
    model, (x, _) = mlp(norm=norm), batch()
    chain = ul.cut(model, stages, like=x, balance=balance)
    assert len(chain) == stages
    assert all(costs.parameters(stage) > 0 for stage in chain)
    model.eval(), chain.eval()
    assert torch.equal(chain(x), model(x))
    assert list(chain.state_dict()) == list(model.state_dict())
    assert all(a is b or torch.equal(a, b) for a, b in zip(chain.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize("balance", ["flops", "time", "parameters", "memory"])
def test_every_balance_counts_stem_and_classifier(balance):
    """The last layer is by far the largest under each measure: it must be alone."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)), nn.Linear(8, 4000), nn.Tanh())
    chain = ul.cut(model, 2, like=torch.randn(64, 8), balance=balance)
    assert [len(list(stage.body.children())) for stage in chain] == [5, 2]


MODELS = [
    ("mlp", (12,), {"depth": 3}),
    ("cnn", (1, 8, 8), {"width": 4}),
    ("vgg6a", (3, 16, 16), {"width": 0.05}),
    ("resnet18", (3, 16, 16), {"width": 0.1}),
    ("resnet32", (3, 16, 16), {"width": 0.25}),
    ("resnet50", (3, 16, 16), {"width": 0.05}),
    ("gpt", (9,), {"layers": 3, "width": 16, "heads": 2}),
]


@pytest.mark.parametrize("name, shape, options", MODELS, ids=[row[0] for row in MODELS])
def test_own_models_are_cut_balanced_and_unchanged(name, shape, options):
    torch.manual_seed(0)
    classes = 256 if name == "gpt" else 10
    model = ul.models.build(name, input_shape=shape, classes=classes, **options)
    x = torch.randint(256, (2, *shape)) if name == "gpt" else torch.randn(2, *shape)
    chain = ul.cut(model, 3, like=x)
    reference = copy.deepcopy(model)
    for mode in (False, True):
        reference.train(mode), chain.train(mode)
        assert torch.equal(chain(x), reference(x))
    assert list(chain.state_dict()) == list(model.state_dict())
    flops, h = [], x
    for stage in chain:
        flops.append(costs.flops(stage.body, h))
        h = costs.run_once(stage.body, h)
    assert sum(flops) == costs.flops(model, x)
    assert max(flops) < 0.9 * sum(flops)


HUGGING_FACE = ["gpt2", "llama", "vit", "resnet"]


def hugging_face(kind, tie=False):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=40, n_positions=16, n_embd=16, n_layer=3, n_head=2, tie_word_embeddings=tie
        )
        return transformers.GPT2LMHeadModel(config), torch.randint(40, (2, 9))
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=32,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config), torch.randint(40, (2, 9))
    if kind == "vit":
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=16,
            patch_size=4, num_labels=5,
        )  # fmt: skip
        return transformers.ViTForImageClassification(config), torch.randn(2, 3, 16, 16)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], num_labels=5)
    return transformers.ResNetForImageClassification(config), torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_hugging_face_models_are_cut_and_learn_locally(kind):
    model, x = hugging_face(kind)
    model.eval()
    expected = model(x).logits
    chain = ul.cut(model, 3, like=x)
    chain.eval()
    assert torch.equal(chain(x), expected)
    assert list(chain.state_dict()) == list(model.state_dict())
    session = ul.Trainer(
        chain,
        credit=ul.credit.DGL(head="linear", budget=None),
        replicas=2,
        optimizer=lambda ps: torch.optim.AdamW(ps, lr=1e-3),
    )
    y = x if expected.dim() == 3 else torch.tensor([1, 2])
    losses = session.step([x, x], [y, y])
    assert all(loss is not None for loss in losses)


def test_tied_embeddings_are_refused_in_a_sentence_but_allowed_in_one_stage():
    model, x = hugging_face("gpt2", tie=True)
    with pytest.raises(
        CannotCut, match=r"wte.weight and lm_head.weight: one shared parameter.*tie_word_embeddings=False"
    ):
        ul.cut(model, 3, like=x)
    chain = ul.cut(model, 1, like=x)
    assert list(chain.state_dict()) == list(model.state_dict())


class Branching(nn.Module):
    """A model without a block list: control flow inside a block, a residual around one."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return self.layer(x).relu() if x.mean() > -1e9 else x  # not traceable

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.enter = nn.Linear(5, 6)
        self.middle = nn.ModuleList([self.Block(), self.Block()])
        self.leave = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.tanh(self.enter(x)) * self.scale
        x = x + self.middle[0](x)
        x = self.middle[1](x)
        return self.leave(x.flatten(1))


def test_any_module_is_cut_at_named_split_points():
    torch.manual_seed(0)
    model, x = Branching(), torch.randn(4, 5)
    expected = model(x)
    chain = ul.cut(model, at=["enter", "middle.1"], like=x)
    assert len(chain) == 3
    assert torch.equal(chain(x), expected)
    assert set(chain.state_dict()) == set(model.state_dict())
    names = [{name for name, j, _ in chain.names if j == k} for k in range(3)]
    assert names[0] == {"enter.weight", "enter.bias"} and "scale" in names[1]
    twin = copy.deepcopy(chain)
    with torch.no_grad():
        twin.state_dict()["scale"].fill_(0)
    assert torch.equal(chain(x), expected)


@pytest.mark.parametrize(
    "at, words",
    [
        (["nowhere"], "no submodule 'nowhere'"),
        (["middle.1", "enter"], "not in the order"),
        (["middle.0"], "2 values cross"),
        (["middle.0.layer"], "cannot be traced"),
    ],
)
def test_impossible_split_points_are_refused(at, words):
    with pytest.raises(CannotCut, match=words):
        ul.cut(Branching(), at=at, like=torch.randn(4, 5))


EMPTY: dict[str, int] = {}


class Optional(nn.Module):
    """Takes more than x, which may be left out."""

    def __init__(self):
        super().__init__()
        self.enter, self.middle, self.leave = nn.Linear(5, 6), Branching.Block(), nn.Linear(6, 3)

    def forward(
        self,
        x,
        mask=None,
        hooks=(),
        size=(1, 6),
        scale=2.0,
        *rest,
        flip=False,
        options=EMPTY,
        shift=0,
        **more,
    ):
        x = self.enter(x) * scale + shift
        if mask is not None:
            x = x * mask
        return self.leave(self.middle(-x if flip else x.view(-1, size[1])))


def test_inputs_that_may_be_left_out_are():
    torch.manual_seed(0)
    model, x = Optional(), torch.randn(4, 5)
    chain = ul.cut(model, at=["enter", "middle"], like=x)
    assert torch.equal(chain(x), model(x))


class Recurrent(nn.Module):
    """An LSTM, which returns more than a tensor; a second input."""

    def __init__(self):
        super().__init__()
        self.read, self.remember, self.leave = nn.Linear(5, 6), nn.LSTM(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.leave(self.remember(self.read(x))[0])


class Two(Recurrent):
    def forward(self, x, y):
        return self.leave(self.read(x) + y)


def test_what_is_no_tensor_cannot_be_passed_on():
    x = torch.randn(4, 5)
    with pytest.raises(CannotCut, match="What 'remember' returns is a tuple, as of an LSTM"):
        ul.cut(Recurrent(), at=["read", "remember"], like=x)
    assert len(ul.cut(Recurrent(), at=["read"], like=x)) == 2
    with pytest.raises(CannotCut, match=r"takes 2 inputs; stages pass one tensor\. Give y a default"):
        ul.cut(Two(), at=["read"], like=x)


@pytest.mark.parametrize("stages", [0, -1, 6, 2.5, None, True])
def test_bad_split_counts_are_refused_with_what_is_allowed(stages):
    with pytest.raises(CannotCut, match="whole number from 1 to 5"):
        ul.cut(mlp(), stages, like=batch()[0])


def test_other_refusals():
    x = batch()[0]
    with pytest.raises(CannotCut, match="needs an example batch"):
        ul.cut(mlp(), 2)
    with pytest.raises(CannotCut, match=r"neither an nn.Sequential.*at=\[…\]"):
        ul.cut(Branching(), 2, like=x)
    with pytest.raises(UnlockedError, match="did you mean 'flops'"):
        ul.cut(mlp(), 2, like=x, balance="flop")
    shared = nn.Linear(5, 5)
    with pytest.raises(CannotCut, match=r"0.weight and 3.weight: one shared parameter, in stages 0 and 2"):
        ul.cut(nn.Sequential(shared, nn.Tanh(), nn.Linear(5, 5), shared).double(), 3, like=x)
    with pytest.raises(CannotCut, match="at least one stage"):
        ul.Chain([])
    with pytest.raises(CannotCut, match="wrap it: Stage"):
        ul.Chain([nn.Linear(2, 2)])
    with pytest.raises(CannotCut, match="3 stages, but stages=5"):
        ul.cut(Branching(), 5, at=["enter", "middle.1"], like=x)


def test_a_piece_that_computes_something_else_is_found_out():
    class Wrong(nn.Sequential):
        def pieces(self):
            return [ul.models.Piece(name, module) for name, module in self.named_children() if name != "1"]

    with pytest.raises(CannotCut, match="do not compute what the model computes"):
        ul.cut(Wrong(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)), 2, like=torch.randn(4, 5))


def test_an_activation_in_place_at_a_boundary_does_not_write_into_the_stage_below():
    model = nn.Sequential(nn.Linear(5, 6), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6)), nn.ReLU(inplace=True))
    model.append(nn.Linear(6, 3))
    chain = ul.cut(model, at=None, stages=3, like=torch.randn(4, 5))
    seen = torch.randn(4, 6)
    for stage in chain:
        if stage is not chain[0]:
            before = seen.clone()
            stage(seen)
            assert torch.equal(seen, before)
    session = ul.Trainer(
        chain, credit=ul.credit.DGL(head="linear", budget=None), optimizer=lambda p: torch.optim.SGD(p, 0.1)
    )
    session.step(torch.randn(4, 5), torch.tensor([0, 1, 2, 0]))


def test_a_hand_made_chain_trains_with_any_modules_heads_and_losses():
    torch.manual_seed(0)
    seen = []

    def my_loss(output, y):
        seen.append(output.shape)
        return ((output.squeeze(1) - y) ** 2).mean()

    chain = ul.Chain(
        [
            ul.Stage(nn.Linear(5, 6), head=nn.Linear(6, 1), loss=my_loss),
            ul.Stage(nn.Sequential(nn.Tanh(), nn.Linear(6, 1)), loss=my_loss),
        ]
    )
    assert list(chain.state_dict()) == ["0.weight", "0.bias", "1.1.weight", "1.1.bias"]
    session = ul.Trainer(chain, credit=ul.credit.DGL(), optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1))
    x = torch.randn(32, 5)
    y = x.sum(1)
    first = session.step(x, y)
    for _ in range(100):
        last = session.step(x, y)
    assert last[0] < 0.2 * first[0] and last[1] < 0.5 * first[1]
    assert set(seen) == {torch.Size([32, 1])}


def test_a_hand_made_chain_without_heads_needs_an_example():
    chain = ul.Chain([ul.Stage(nn.Linear(5, 6)), ul.Stage(nn.Linear(6, 3))])
    with pytest.raises(UnlockedError, match="no example batch"):
        ul.Trainer(chain, credit=ul.credit.DGL(), optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1))


def test_load_state_dict_takes_the_users_names_and_refuses_others():
    model, x = mlp(), batch()[0]
    chain = ul.cut(mlp(), 3, like=x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    chain.load_state_dict(model.state_dict())
    assert torch.equal(chain(x), model(x))
    with pytest.raises(UnlockedError, match="missing"):
        chain.load_state_dict({})
    bad = dict(model.state_dict()) | {"0.weight": torch.zeros(1)}
    with pytest.raises(UnlockedError, match=r"0.weight has shape \(1,\)"):
        chain.load_state_dict(bad)


def test_measuring_changes_nothing():
    model = mlp(norm=True, dropout=0.5)
    x = batch()[0]
    before = copy.deepcopy(model.state_dict())
    random = torch.random.get_rng_state()
    for measure in costs.MEASURES.values():
        measure(model, x)
    assert torch.equal(random, torch.random.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
