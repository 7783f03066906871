"""Networks without their classifiers, projectors, and the cuts of the theses."""

from __future__ import annotations

import json
from itertools import accumulate, product

import pytest
import torch
from torch import nn

import unlocked as ul
from unlocked import models
from unlocked.errors import InvalidChoice
from unlocked.heads import PROJECTORS, ProjectorHead, build
from unlocked.split_tables import split_table

SMALL = {
    "cnn": {"width": 4, "depth": 3},
    "mlp": {"width": 7, "norm": True},
    "resnet18": {"width": 1 / 16},
    "resnet32": {"width": 1 / 4, "skip": False},
    "revresnet18": {"width": 1 / 16},
    "vgg6a": {"width": 1 / 32},
    "vit": {"width": 8, "heads": 2, "layers": 2},
    "revvit": {"width": 8, "heads": 2, "layers": 2},
}


def made(name, shape=(2, 8, 8), **more):
    torch.manual_seed(0)
    return models.build(name, input_shape=shape, classes=5, **{**SMALL.get(name, {}), **more})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.covering
def test_the_classifier_of_the_features_is_the_network(name, training):
    model = made(name).train(training)
    features, x = models.encoder(model), torch.randn(4, 2, 8, 8)
    last = model.classifier
    linear = last.linear if hasattr(last, "linear") else last
    expected = model(x)
    found = torch.nn.functional.linear(features(x), linear.weight, linear.bias)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert features(x).dim() == 2
    left_out = set(model.state_dict()) - set(features.state_dict())
    assert left_out == {
        name for name, x in model.state_dict(keep_vars=True).items() if x is linear.weight or x is linear.bias
    }
    mine, theirs = features.state_dict(keep_vars=True), model.state_dict(keep_vars=True)
    assert all(mine[name] is theirs[name] for name in mine)
    assert tuple(model(x).shape) == (4, 5) and "encoder" not in model.recipe


@pytest.mark.parametrize("name", SMALL)
def test_the_recipe_of_an_encoder_survives_json_and_builds_one_with_the_same_first_weights(name):
    features = models.encoder(made(name))
    torch.manual_seed(0)
    again = models.from_recipe(json.loads(json.dumps(features.recipe)))
    assert again.recipe == features.recipe and features.recipe["encoder"] is True
    for (a, x), (b, y) in zip(features.state_dict().items(), again.state_dict().items(), strict=True):
        assert a == b and torch.equal(x, y)
    chain = ul.cut(features, 3, like=torch.randn(2, 2, 8, 8))
    assert chain.recipe is not None and chain.recipe["model"]["encoder"] is True
    assert list(chain.state_dict()) == list(features.state_dict())


def test_a_sequence_that_ends_in_a_linear_layer_loses_it():
    body = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 2)))
    features, x = models.encoder(body), torch.randn(5, 3)
    assert torch.equal(features(x), torch.tanh(body[0](x))) and body(x).shape == (5, 2)


@pytest.mark.parametrize(
    "model",
    [
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh()),
        lambda: nn.Sequential(),
        lambda: nn.TransformerEncoderLayer(4, 2),
        lambda: made("gpt", (8,), width=8, heads=2),
    ],
)
def test_what_has_no_classifier_is_refused(model):
    with pytest.raises(InvalidChoice, match="does not end in a classifier"):
        models.encoder(model())


def test_an_encoder_is_no_network_with_a_classifier_and_recipes_say_nothing_else():
    features = models.encoder(made("cnn"))
    with pytest.raises(InvalidChoice, match="This cnn is an encoder already"):
        models.encoder(features)
    with pytest.raises(InvalidChoice, match="'encoder': true as well"):
        models.from_recipe({**features.recipe, "encoder": "yes"})


# ---- networks of the theses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layers", "dense"), [("vgg16a", 13, 512), ("vgg19a", 16, 512)])
def test_deep_vggs_have_the_convolutions_of_the_paper_and_one_hidden_layer(name, layers, dense):
    with torch.device("meta"):
        model = models.build(name, input_shape=(3, 32, 32), classes=10)
    channels = [block.conv.out_channels for block in model.blocks]
    per_group = {"vgg16a": [2, 2, 3, 3, 3], "vgg19a": [2, 2, 4, 4, 4]}[name]
    assert channels == [c for c, n in zip([64, 128, 256, 512, 512], per_group) for _ in range(n)]
    pooled = [k for k, block in enumerate(model.blocks) if isinstance(block.pool, nn.MaxPool2d)]
    assert pooled == [end - 1 for end in accumulate(per_group)] and len(channels) == layers
    assert (model.hidden.linear.in_features, model.hidden.linear.out_features) == (dense, 1024)


def test_resnet110_has_the_weights_of_the_paper_and_projections():
    """1.7 million (He et al., table 6); option B adds two 1×1 convolutions with BatchNorm."""
    with torch.device("meta"):
        model = models.resnet110((3, 32, 32), 10)
    assert len(model.blocks) == 54
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert sum(x.numel() for x in model.parameters()) - projections == 1_727_962


def test_the_stem_for_stl_10_halves_once():
    stem = models.resnet18((3, 96, 96), 10, width=1 / 16, stem="stl").stem
    assert stem(torch.zeros(1, 3, 96, 96)).shape[2:] == (48, 48)
    assert stem[0].kernel_size == (5, 5) and not any(isinstance(part, nn.MaxPool2d) for part in stem)
    with pytest.raises(InvalidChoice, match="at least 9×9"):
        models.resnet18((3, 8, 8), 10, stem="stl")


# ---- where the theses cut --------------------------------------------------------------------------------------------------

FOURNIER = {  # Table A.1: after layer i and bottleneck j, both from 1
    4: [(2, 1), (3, 1), (3, 5)],
    8: [(1, 2), (2, 1), (2, 3), (3, 1), (3, 3), (3, 5), (4, 1)],
    16: [(i, j) for i, n in enumerate((3, 4, 6, 3), 1) for j in range(1, n + 1)][:-1],
}
PATEL = {  # Figure A.1: blocks from 0
    ("resnet50", 2): [(3, 0)],
    ("resnet50", 3): [(2, 1), (3, 3)],
    ("resnet50", 4): [(2, 0), (3, 0), (3, 4)],
    ("resnet50", 8): [(1, 1), (2, 0), (2, 2), (3, 0), (3, 2), (3, 4), (4, 0)],
    ("resnet50", 16): [*product([1], range(3)), *product([2], range(4)), *product([3], range(6)), (4, 0), (4, 1)],
    ("resnet110", 2): [(2, 8)],
    ("resnet110", 3): [(1, 17), (2, 17)],
    ("resnet110", 4): [(1, 11), (2, 7), (3, 3)],
    ("resnet110", 8): [(1, 4), (1, 11), (2, 0), (2, 7), (2, 14), (3, 3), (3, 10)],
    ("resnet110", 16): [
        *product([1], (1, 4, 7, 10, 13, 16)),
        *product([2], (1, 4, 7, 11, 15)),
        *product([3], (1, 5, 9, 13)),
    ],
}


def ends(network, stages):
    """The last block of every stage but the last, (group from 1, block from 0)."""
    groups = {"resnet50": (3, 4, 6, 3), "resnet110": (18, 18, 18)}[network]
    blocks = [(i, j) for i, n in enumerate(groups, 1) for j in range(n)]
    return [blocks[end - 1] for end in accumulate(split_table(network, stages).blocks[:-1])]


@pytest.mark.parametrize(("network", "stages"), PATEL)
def test_the_cuts_are_those_of_the_theses(network, stages):
    assert ends(network, stages) == PATEL[network, stages] and split_table(network, stages).published
    if network == "resnet50" and stages in FOURNIER:
        assert [(i, j + 1) for i, j in ends(network, stages)] == FOURNIER[stages]


@pytest.mark.parametrize("encoder", [True, False])
@pytest.mark.parametrize(
    ("name", "stages", "shape"),
    [("resnet50", 8, (3, 8, 8)), ("resnet18", 8, (3, 8, 8)), ("vgg6a", 5, (3, 8, 8)), ("vgg16a", 14, (1, 32, 32))],
)
@pytest.mark.covering
def test_published_cuts_cut_the_network_with_and_without_its_classifier(name, stages, shape, encoder):
    model = made(name, shape, width=1 / 32)
    model = models.encoder(model) if encoder else model
    chain = ul.cut(model, stages, like=torch.zeros(2, *shape), balance="published")
    table = split_table(name, stages, encoder)
    assert chain.recipe is not None and chain.recipe["sizes"] == table.sizes and len(chain) == stages
    found = [sum("block" in part or "hidden" in part for part in stage.body._modules) for stage in chain]
    assert found == table.blocks
    if stages in (5, 14) or name == "resnet18":
        assert found == [1] * stages


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda x: ul.cut(made("cnn"), 3, like=x, balance="published"), "Unknown network with published cuts 'cnn'"),
        (
            lambda x: ul.cut(made("resnet18"), 5, like=x, balance="published"),
            "tables for resnet18 in 8 stages; given 5",
        ),
        (lambda x: ul.cut(made("resnet32"), 4, like=x, balance="published"), "residual ones with their shortcuts"),
        (lambda x: ul.cut(made("resnet18"), like=x, balance="published"), "needs the number of stages"),
        (
            lambda x: ul.cut(nn.Sequential(nn.Flatten(), nn.Linear(128, 2)), 1, like=x, balance="published"),
            "of ul.models",
        ),
        (lambda x: ul.cut(made("cnn"), 3, like=x, balance="published", groups=2), "for cuts in depth only"),
        (lambda x: ul.cut(made("cnn"), 3, like=x, balance="publised"), "did you mean 'published'"),
    ],
)
def test_a_cut_without_a_table_is_refused(attempt, says):
    with pytest.raises(ul.UnlockedError) as error:
        attempt(torch.zeros(2, 2, 8, 8))
    assert says in str(error.value)


# ---- projectors ------------------------------------------------------------------------------------------------------------


def kinds(head):
    return [
        (type(part).__name__, tuple(part.weight.shape)) for part in head if getattr(part, "weight", None) is not None
    ]


@pytest.mark.parametrize("shape", [(4, 6, 8, 8), (4, 6, 5, 3), (4, 6, 1, 1), (4, 6), (4, 7, 6)])
@pytest.mark.parametrize("name", PROJECTORS)
def test_projectors_are_those_of_the_theses(name, shape):
    x = torch.randn(shape)
    head, _, report = build(PROJECTORS[name], x, 128, per_token=False, stage_flops=1, budget=None)
    pooled = x if x.dim() == 2 else x.mean(1) if x.dim() == 3 else None
    linear = [("Linear", (6, 6)), ("Linear", (128, 6))]
    if name == "1c2f" and x.dim() == 4:
        assert kinds(head) == [("Conv2d", (6, 6, 3, 3)), ("BatchNorm2d", (6,)), *linear]
        assert head[0].stride == (2, 2)
        pooled = torch.relu(head[1](head[0](x))).mean((2, 3))
    else:
        assert kinds(head) == linear
        pooled = x.mean((2, 3)) if pooled is None else pooled
    first, last = (part for part in head if isinstance(part, nn.Linear))
    torch.testing.assert_close(head(x), last(torch.relu(first(pooled))))
    assert report.width == 6


def test_projectors_may_be_wider_and_shrink_under_a_budget():
    x = torch.randn(4, 6, 8, 8)
    wide, _, _ = build(ProjectorHead(hidden=16), x, 8, per_token=False, stage_flops=1, budget=None)
    assert kinds(wide)[0] == ("Conv2d", (16, 6, 3, 3)) and kinds(wide)[-1] == ("Linear", (8, 16))
    cost = 10 * build(ProjectorHead(hidden=5), x, 8, per_token=False, stage_flops=1, budget=None)[2].flops
    assert build(ProjectorHead(), x, 8, per_token=False, stage_flops=cost, budget=0.1)[2].width == 5
    with pytest.raises(InvalidChoice, match="hidden=0; there may be 0 convolutions or more"):
        ProjectorHead(hidden=0)


def test_the_last_stage_has_the_perceptron_and_heads_by_hand_stay():
    x = torch.randn(4, 2, 8, 8)
    chain = ul.cut(models.encoder(made("cnn")), 3, like=x)
    chain[1].head = mine = nn.Sequential(nn.Flatten(), nn.LazyLinear(9))
    mine(chain[1](chain[0](x)))
    trainer = ul.Trainer(chain, credit=ul.credit.DGSSL(dimension=9), optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1))
    assert [report.name for report in trainer.heads] == ["projector", "projector-mlp"] and chain[1].head is mine
    assert kinds(chain[2].head) == [("Linear", (8, 8)), ("Linear", (9, 8))]
    trainer.step(torch.randn(8, 2, 8, 8), torch.zeros(8, dtype=torch.long))
    end_to_end = ul.cut(models.encoder(made("cnn")), 3, like=x)
    ul.Trainer(end_to_end, credit=ul.credit.SimCLR(), optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1))
    assert [stage.head is None for stage in end_to_end] == [True, True, False]
