"""Cutting into neuron groups: the grouped chain is the dense network with weights masked to the groups."""

from __future__ import annotations

import copy
import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import unlocked as ul
from unlocked.cutting import from_recipe_of_chain
from unlocked.errors import CannotCut, UnlockedError
from unlocked.grouping import Share, narrow
from unlocked.grouping.cost import inference_speedup, macs, module_costs, training_speedup
from unlocked.models import pieces_of

FIRST = {"", "conv", "linear", "conv1", "shortcut.0", "attention.qkv"}  # the layers of a piece that read its input


class NormOfSlices(nn.Module):
    """LayerNorm of each of `groups` slices by itself."""

    def __init__(self, norm, groups):
        super().__init__()
        self.norm, self.groups = norm, groups

    def forward(self, x):
        rows = x.unflatten(-1, (self.groups, -1))
        rows = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, keepdim=True, correction=0) + self.norm.eps).sqrt()
        return rows.flatten(-2) * self.norm.weight + self.norm.bias


def mask_of(layer, name, groups):
    """1 where input and output belong to the same group; q, k and v are three maps in one."""
    rows, columns = layer.weight.shape[:2]
    maps = 3 if name.endswith("qkv") else 1
    block = torch.kron(torch.eye(groups), torch.ones(rows // maps // groups, columns // groups)).double()
    return torch.cat([block] * maps).reshape(rows, columns, *[1] * (layer.weight.dim() - 2))


def masked(model, chain):
    """The dense network, with the weights inside modules masked and scaled, piece by piece as `chain.recipe` or names say."""
    model = copy.deepcopy(model)
    pieces = dict(pieces_of(model))
    for row, groups in zip(chain.layout.rows, chain.layout.groups):
        names = dict.fromkeys(
            name for name in pieces for user, j, _ in chain.names if j == row[0] and name in piece_in(user)
        )
        dense = True
        for piece in (pieces[name] for name in names if groups > 1):
            for name, layer in list(piece.named_modules()):
                first = dense and name in FIRST
                if isinstance(layer, (nn.Conv2d, nn.Linear)) and not first:
                    with torch.no_grad():
                        layer.weight *= mask_of(layer, name, groups) * math.sqrt(groups)
                if isinstance(layer, nn.LayerNorm) and not (dense and name == "norm1"):
                    setattr(piece, name, NormOfSlices(layer, groups))
            dense = dense and not any(parameter.dim() >= 2 for parameter in piece.parameters())
    return model


def piece_in(user):
    """All prefixes of a tensor's name without its group's: the piece is one of them."""
    parts = (user.split(".", 1)[1] if user.startswith("group") else user).split(".")
    return {".".join(parts[:k]) for k in range(1, len(parts))}


def lively(model):
    """In float64, with biases and BatchNorm statistics that are not their starting values."""
    torch.manual_seed(1)
    model.double()
    for name, x in itertools.chain(model.named_parameters(), model.named_buffers()):
        if x.dim() == 1 and x.is_floating_point():
            x.data = torch.rand_like(x) + 0.5 if "var" in name or "weight" in name else torch.randn_like(x) / 4
    return model


def build(name):
    torch.manual_seed(0)
    if name == "sequential":
        model = nn.Sequential(
            nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU(8), nn.Conv2d(8, 8, 3), nn.ReLU(),
            nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.LeakyReLU(), nn.Flatten(), nn.Linear(16 * 25, 12), nn.BatchNorm1d(12),
            nn.Tanh(), nn.Linear(12, 5),
        )  # fmt: skip
        return lively(model), torch.randn(3, 3, 16, 16, dtype=torch.float64)
    shape, options = {
        "resnet18": ((3, 16, 16), {"width": 0.125}),
        "resnet32": ((3, 16, 16), {"width": 0.5, "skip": False}),
        "resnet50": ((3, 16, 16), {"width": 0.0625}),
        "vgg6a": ((3, 16, 16), {"width": 0.0625}),
        "cnn": ((3, 8, 8), {"width": 8}),
        "mlp": ((12,), {"width": 16, "depth": 5, "norm": True}),
        "gpt": ((9,), {"layers": 3, "width": 16, "heads": 4}),
        "vit": ((3, 16, 16), {"layers": 3, "width": 16, "heads": 4}),
    }[name]
    model = ul.models.build(name, input_shape=shape, classes=10, **options)
    x = torch.randint(10, (3, 9)) if name == "gpt" else torch.randn(3, *shape, dtype=torch.float64)
    return lively(model), x


NAMES = ["resnet18", "resnet32", "resnet50", "vgg6a", "cnn", "mlp", "gpt", "vit", "sequential"]


@pytest.mark.covering
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stages, groups", [(1, 2), (2, 4), (3, 2)])
def test_a_grouped_chain_is_the_dense_network_with_masked_and_scaled_weights(name, stages, groups):
    model, x = build(name)
    chain = ul.cut(model, stages, like=x, groups=groups)
    dense = masked(model, chain)
    for mode in (False, True):
        chain.train(mode), dense.train(mode)
        torch.testing.assert_close(chain(x), dense(x), rtol=1e-9, atol=1e-9)
    assert chain.layout.groups[-1] == 1 and list(chain.layout.groups).count(groups) == stages


@given(
    width=st.sampled_from([4, 12, 24]),
    depth=st.integers(2, 5),
    groups=st.sampled_from([1, 2, 4]),
    norm=st.booleans(),
    data=st.data(),
)
@settings(deadline=None, max_examples=25)
def test_any_small_perceptron_is_split_exactly(width, depth, groups, norm, data):
    model = lively(ul.models.mlp((6,), 4, width=width, depth=depth, norm=norm))
    x = torch.randn(3, 6, dtype=torch.float64)
    chain = ul.cut(model, data.draw(st.integers(1, depth)), like=x, groups=groups)
    torch.testing.assert_close(chain.eval()(x), masked(model, chain).eval()(x), rtol=1e-9, atol=1e-9)
    assert sum(p.numel() for p in chain.parameters()) <= sum(p.numel() for p in model.parameters())


@given(blocks=st.integers(1, 3), groups=st.sampled_from([2, 4]), stem=st.sampled_from(["shared", "split"]))
@settings(deadline=None, max_examples=10)
def test_any_small_cnn_is_split_exactly_with_a_shared_or_a_split_stem(blocks, groups, stem):
    model = lively(ul.models.cnn((3, 8, 8), 4, width=4, depth=3))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    chain = ul.cut(model, blocks, like=x, groups=groups, stem=stem)
    torch.testing.assert_close(chain.eval()(x), masked(model, chain).eval()(x), rtol=1e-9, atol=1e-9)
    assert chain.layout.groups == ((1,) if stem == "shared" else ()) + (groups,) * blocks + (1,)


@pytest.mark.parametrize("name", NAMES)
def test_one_group_is_the_ordinary_cut_bit_for_bit(name):
    model, x = build(name)
    chain = ul.cut(model, 2, like=x, groups=1)
    assert torch.equal(chain(x), copy.deepcopy(model)(x)) and set(chain.layout.groups) == {1}
    assert list(chain.state_dict()) == list(model.state_dict())
    sizes = [len(list(stage.body.children())) for stage in chain]
    stem = len(chain) - 3
    middle = nn.Sequential(*[module for _, module in pieces_of(model)][sum(sizes[:stem]) : sum(sizes[:-1])])
    h = nn.Sequential(*[module for _, module in pieces_of(model)][: sum(sizes[:stem])])(x)
    ordinary = ul.cut(middle, 2, like=h)
    assert [len(list(stage.body.children())) for stage in ordinary] == sizes[stem:-1]


def test_weights_are_scaled_slices_and_nothing_is_shared():
    model, x = build("resnet18")
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    chain, drawn = ul.cut(model, 2, like=x, groups=2), torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))  # no random number
    state = chain.state_dict()
    whole = model.blocks[0].conv1.weight, model.blocks[0].conv2.weight, model.blocks[0].norm1.running_var
    half = whole[0].shape[0] // 2
    for g, rows in enumerate((slice(0, half), slice(half, None))):
        own = f"group{g}.blocks.0."
        assert torch.equal(state[own + "conv1.weight"], whole[0][rows])
        assert torch.equal(state[own + "conv2.weight"], whole[1][rows, rows] * math.sqrt(2))
        assert torch.equal(state[own + "norm1.running_var"], whole[2][rows])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    owners: dict[int, int] = {}
    for j, stage in enumerate(chain):
        for tensor in [*stage.parameters(), *stage.buffers()]:
            assert owners.setdefault(tensor.untyped_storage().data_ptr(), j) == j
    assert owners.keys().isdisjoint(t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()])
    with torch.no_grad():
        [parameter.add_(1) for parameter in chain.parameters()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_frozen_weights_stay_frozen():
    model, x = build("mlp")
    model.layers[2].linear.weight.requires_grad_(False)
    chain = ul.cut(model, 2, like=x, groups=2)
    frozen = [
        name
        for name, tensor in chain.state_dict(keep_vars=True).items()
        if tensor.dim() == 2 and not tensor.requires_grad
    ]
    assert frozen == ["group0.layers.2.linear.weight", "group1.layers.2.linear.weight"]


def head(features, outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(features.flatten(1).shape[1], outputs))


@pytest.mark.parametrize(
    "options", [{"stages": 2, "groups": 2}, {"groups": (2, 4, 2)}, {"stages": 1, "groups": 4, "final": "mlp"}]
)
def test_the_recipe_makes_the_same_chain_without_the_users_code(options):
    model = ul.models.vgg6a((3, 16, 16), 10, width=0.0625)
    x = torch.randn(2, 3, 16, 16)
    chain = ul.cut(model, like=x, **options)
    again = from_recipe_of_chain(json.loads(json.dumps(chain.recipe)), x)
    again.load_state_dict(chain.state_dict())
    assert again.layout.groups == chain.layout.groups
    assert torch.equal(again.eval()(x), chain.eval()(x))
    assert ul.cut(model, 1, like=x, groups=2, final=head).recipe is None  # a checkpoint cannot hold a function


def test_a_run_on_groups_is_resumed_without_the_users_code(tmp_path):
    torch.manual_seed(0)
    x, y = torch.randn(8, 12), torch.randint(4, (8,))
    chain = ul.cut(ul.models.mlp((12,), 4, width=16), 2, like=x, groups=2)
    trainer = ul.Trainer(
        chain,
        credit=ul.credit.DGL(budget=None),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    )
    trainer.step(x, y)
    trainer.save(tmp_path / "run")
    other = ul.Trainer.resume(tmp_path / "run")
    trainer.step(x, y), other.step(x, y)
    mine, theirs = trainer.chains[0].state_dict(), other.chains[0].state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_vgg6a_is_split_by_patels_pattern():
    x = torch.randn(2, 3, 16, 16)
    chain = ul.cut(ul.models.vgg6a((3, 16, 16), 10, width=0.25), like=x, groups=(2, 4, 2))
    assert chain.layout.groups == (2, 4, 2, 1, 1, 1) and chain(x).shape == (2, 10)
    widths = [stage.body[0].conv.weight.shape[:2] for stage in chain if hasattr(stage.body[0], "conv")]
    assert [tuple(pair) for pair in widths] == [(16, 3)] * 2 + [(16, 32)] * 4 + [(64, 64)] * 2 + [(128, 128)]


def test_modules_end_where_they_are_said_to():
    model, x = build("resnet18")
    by_size = ul.cut(model, like=x, groups=2, sizes=[3, 4, 1])
    by_name = ul.cut(model, like=x, groups=2, at=["blocks.2", "blocks.6"])
    assert by_size.recipe["sizes"] == by_name.recipe["sizes"] == [1, 3, 4, 1, 1]
    assert [len(stage.body) for stage in ul.cut(model, like=x, sizes=[2, 5, 3])] == [2, 5, 3]
    with pytest.raises(CannotCut, match="add up to the 10 parts"):
        ul.cut(model, like=x, sizes=[2, 5])


def test_a_new_final_head_reads_all_groups_and_is_drawn_from_its_own_seed():
    model, x = build("resnet18")
    torch.manual_seed(3)
    one, drawn = ul.cut(model, 2, like=x, groups=2, final=head), torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    torch.manual_seed(4)
    two = ul.cut(model, 2, like=x, groups=4, final=head)
    assert one[-1].body[1].in_features == 4 * model.classifier.in_features  # 2×2 maps of all channels
    assert torch.equal(one[-1].body[1].weight, two[-1].body[1].weight) and one(x).shape == (3, 10)
    with pytest.raises(CannotCut, match="more than class scores"):
        ul.cut(model, 2, like=x, groups=2, final="predsim")


def tied():
    layer = nn.Linear(8, 8)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(8, 3))


REFUSED = {
    "no divisor": ("resnet18", {"stages": 2, "groups": 3}, "'blocks.0.conv1' has 8 channels.* 2, 4, 8 would do"),
    "heads": ("gpt", {"stages": 2, "groups": 8}, "4 attention heads.* 2, 4 would do"),
    "too many modules": ("resnet18", {"stages": 9, "groups": 2}, "8 part.s. with weights.* from 1 to 8"),
    "no modules": ("mlp", {"groups": 2}, "stages=None is not possible with groups"),
    "zero": ("mlp", {"stages": 2, "groups": 0}, "whole number of at least 1"),
    "true": ("mlp", {"stages": 2, "groups": True}, "groups=True is not possible"),
    "list too long": ("mlp", {"stages": 2, "groups": [2, 2, 2]}, "with 2 module"),
    "sizes": ("mlp", {"sizes": [1, 1], "groups": 2}, "add up to the 5 part"),
    "sizes and at": ("mlp", {"sizes": [1, 4], "at": ["layers.0"], "groups": 2}, "give one of them"),
    "unknown end": ("mlp", {"at": ["layers.9"], "groups": 2}, "Unknown end of a module 'layers.9'"),
    "last end": ("mlp", {"at": ["layers.4"], "groups": 2}, "not the last part"),
    "stem": ("mlp", {"stages": 2, "groups": 2, "stem": "own"}, "Unknown stem 'own'"),
    "final alone": ("mlp", {"stages": 2, "final": "mlp"}, "give groups="),
    "split embedding": ("gpt", {"stages": 2, "groups": 2, "stem": "split"}, "An embedding belongs to all groups"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_split_is_refused_with_a_sentence(case):
    name, options, sentence = REFUSED[case]
    model, x = build(name)
    with pytest.raises(UnlockedError, match=sentence):
        ul.cut(model, like=x, **options)


@pytest.mark.parametrize(
    "model, x, sentence",
    [
        (
            nn.Sequential(nn.Linear(4, 4), nn.Softmax(1), nn.Linear(4, 4)),
            torch.randn(2, 4),
            "'1' is a Softmax.*layout=",
        ),
        (
            nn.Sequential(nn.Conv2d(4, 4, 1, groups=4), nn.Flatten(), nn.Linear(16, 4)),
            torch.randn(2, 4, 2, 2),
            "groups of its own",
        ),
        (nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.Linear(12, 4)), torch.randn(2, 3, 4), "flattens a sequence"),
        (tied(), torch.randn(2, 8), "0 and 2 share a parameter"),
        (nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4), "nothing between"),
    ],
)
def test_layers_without_known_slices_are_refused(model, x, sentence):
    with pytest.raises(CannotCut, match=sentence):
        ul.cut(model, 1, like=x, groups=2)


def test_a_users_layer_is_made_known_by_registering_its_slices():
    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    model, x = nn.Sequential(nn.Linear(4, 4), Twice(), nn.Linear(4, 4)), torch.randn(2, 4)
    narrow.register(Twice, lambda module, share, name: Twice())
    chain = ul.cut(model, 1, like=x, groups=2)
    torch.testing.assert_close(chain(x), model(x))  # one layer, dense: its halves side by side are the whole
    assert Share(1, 2).inside.scale == math.sqrt(2)


def resnet32_body_macs(groups):
    """Patel's count for one group and K = 1, convolutions only: stem/G, the blocks' convolutions/G², 1×1 shortcuts too."""
    stage = 9 * 16 * 16 * 32 * 32
    blocks = 10 * stage + 2 * (9 * stage + stage / 2) + 2 * (16 * 32 * 256)
    return 9 * 3 * 16 * 32 * 32 / groups + blocks / groups**2


@pytest.mark.parametrize("groups, training, inference", [(2, 3.674, 1.961), (4, 11.982, 3.777), (8, 28.531, 7.03)])
def test_the_operations_of_resnet32_are_those_of_the_formula_and_of_patels_table(groups, training, inference):
    model, x = ul.models.resnet32((3, 32, 32), 10), torch.randn(2, 3, 32, 32)
    assert macs(model, x) == resnet32_body_macs(1) + 640
    chain = ul.cut(model, 1, like=x, groups=groups, stem="split")
    costs = module_costs(chain)
    assert [cost.body for cost in costs] == [resnet32_body_macs(groups)] * groups + [640]
    assert [(cost.depth, cost.group) for cost in costs] == [(0, g) for g in range(groups)] + [(1, 0)]
    heads = [*[one_convolution_two_linear() for _ in range(groups)], None]
    assert module_costs(chain, heads, joined=True)[0].head == 9 * 64 * 128 * 16 + 128 * 128 + 128 * 10
    costs, whole = module_costs(chain, heads, joined=True, elementwise=True), macs(model, x, elementwise=True)
    assert training_speedup(whole, costs) == pytest.approx(training, rel=0.005)
    assert inference_speedup(whole, costs) == pytest.approx(inference, rel=0.001)


def one_convolution_two_linear():
    return nn.Sequential(
        nn.Conv2d(64, 128, 3, 2, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
