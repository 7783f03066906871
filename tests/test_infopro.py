"""InfoPro: its losses against double loops, its weights by depth, its limits, and what it refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import unlocked as ul
from unlocked.costs import flops
from unlocked.heads import HEADS, ConvolutionsAndDenseHead, InfoProHead
from unlocked.heads.decoders import PatchDecoder, decoder
from unlocked.infopro_loss import InfoProLoss, preset, supervised_contrast, to_unit_interval
from unlocked.losses import WrongTarget
from unlocked.split_tables import split_table

from methods import assert_same, batch, momentum, state, trainer


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(size=6, seed=0):
    source = torch.Generator().manual_seed(seed)
    return drawn(size, 2, 20, 12, seed=seed), torch.randint(3, (size,), generator=source)


def conv_net():
    """Maps 20×12 (large for '1c2f'), then 10×6 (small), then vectors; BatchNorm; float64."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    layers += [nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU()]
    layers += [nn.Conv2d(6, 5, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(5, 3)).double()


def session_of(credit, stages=4, like=None):
    chain = ul.cut(conv_net(), stages, like=images()[0] if like is None else like)
    return ul.Trainer(chain, credit=credit, optimizer=momentum)


# ------------------------------------------------------------------------------------------------------------ losses


def contrast_by_loops(z, y, temperature):
    z = [row / row.norm() for row in z]
    total, anchors = 0.0, 0
    for i in range(len(z)):
        partners = [p for p in range(len(z)) if p != i and y[p] == y[i]]
        if not partners:
            continue
        anchors += 1
        below = sum(math.exp(float(z[i] @ z[a]) / temperature) for a in range(len(z)) if a != i)
        chances = [math.log(math.exp(float(z[i] @ z[p]) / temperature) / below) for p in partners]
        total -= sum(chances) / len(partners)
    return total / anchors if anchors else 0.0


@pytest.mark.parametrize("classes", [1, 2, 4, 30])  # 30: some samples have no partner
@pytest.mark.parametrize("temperature", [0.07, 1.3])
def test_supervised_contrast_is_its_formula(classes, temperature):
    for seed in range(3):
        z = drawn(9, 5, seed=seed) * 3
        y = torch.randint(classes, (9,), generator=torch.Generator().manual_seed(seed))
        expected = contrast_by_loops(z, y, temperature)
        assert supervised_contrast(z, y, temperature).item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: supervised_contrast(z, y, temperature), z)


def test_in_bf16_the_losses_have_the_digits_of_float32():
    """Only what the head gives is rounded: not the products, which 1/τ makes fourteen times as large, nor the pixels."""
    z, x, y = drawn(9, 5).bfloat16(), drawn(9, 3, 4, 4).float(), torch.arange(9) % 3
    pixels = drawn(9, 3, 4, 4, seed=1).bfloat16()
    bce = torch.nn.functional.binary_cross_entropy(pixels.double().sigmoid(), to_unit_interval(x.double()))
    with torch.autocast("cpu", torch.bfloat16):
        found = supervised_contrast(z, y, 0.07)
        decoded = InfoProLoss(1.0, 0.0)((torch.zeros(9, 3), pixels), y, x)
    assert found.item() == pytest.approx(supervised_contrast(z.double(), y, 0.07).item(), rel=1e-5)
    assert decoded.item() == pytest.approx(bce.item(), rel=1e-6)


@pytest.mark.parametrize("y", [[0], [0, 1, 2]])
def test_a_batch_without_a_pair_of_one_class_has_no_contrast(y):
    z = drawn(len(y), 4).requires_grad_()
    loss = supervised_contrast(z, torch.tensor(y), 0.07)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(z.grad, torch.zeros_like(z))  # a gradient, and no NaN


def test_reconstruction_is_its_formula():
    x, y = images()
    scores, guess = drawn(6, 3, seed=4), drawn(6, 2, 20, 12, seed=5)
    total = 0.0
    for channel in range(2):
        values = x[:, channel]
        target = (values - values.min()) / (values.max() - values.min())
        p = 1 / (1 + torch.exp(-guess[:, channel]))
        total -= float((target * p.log() + (1 - target) * (1 - p).log()).sum())
    expected = 0.7 * total / x.numel() + 0.3 * float(nn.functional.cross_entropy(scores, y))
    assert InfoProLoss(0.7, 0.3)((scores, guess), y, x).item() == pytest.approx(expected, rel=1e-12)


def test_normalised_images_are_their_pixels_again_and_a_flat_channel_is_zero():
    pixels = torch.randint(256, (3, 3, 4, 4), generator=torch.Generator().manual_seed(0)).double() / 255
    pixels[0, :, 0, 0], pixels[1, :, 2, 3] = 0.0, 1.0
    pixels[:, 2] = 0.4
    normalised = (pixels - torch.tensor([0.49, 0.48, 0.4])[:, None, None]) / torch.tensor([0.2, 0.3, 0.1])[
        :, None, None
    ]
    found = to_unit_interval(normalised)
    torch.testing.assert_close(found[:, :2], pixels[:, :2], rtol=0, atol=1e-14)
    assert torch.equal(found[:, 2], torch.zeros_like(found[:, 2]))


# ------------------------------------------------------------------------------------------------------------ the rule


@pytest.mark.parametrize("task", ["softmax", "contrast"])
def test_every_local_stage_learns_from_reconstruction_and_task(task):
    rule = ul.credit.InfoPro(task, lambda1=2.0, lambda2=0.25, lambda1_last=0.5, lambda2_last=1.5)
    session = session_of(rule)
    chain = copy.deepcopy(session.chains[0])
    x, y = images()
    found = session.step(x, y)
    target = torch.stack([(x[:, c] - x[:, c].min()) / (x[:, c].max() - x[:, c].min()) for c in range(2)], 1)
    before = x
    for j, (lambda1, lambda2) in enumerate([(2.0, 0.25), (1.25, 0.875), (0.5, 1.5)]):
        h = chain[j].body(before.detach())
        p = torch.sigmoid(chain[j].head.decoder(h))
        read = chain[j].head.task(h)
        own = nn.functional.cross_entropy(read, y) if task == "softmax" else supervised_contrast(read, y, 0.07)
        loss = -lambda1 * (target * p.log() + (1 - target) * (1 - p).log()).mean() + lambda2 * own
        assert found[j] == pytest.approx(loss.item(), rel=1e-10)
        loss.backward()
        optimizer = momentum([*chain[j].parameters()])
        optimizer.step()
        for mine, expected in zip(session.chains[0][j].parameters(), chain[j].parameters()):
            torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)
        before = h
    assert found[3] == pytest.approx(nn.functional.cross_entropy(chain[3].body(before), y).item(), rel=1e-10)
    heads = session.evaluate(ul.data.from_tensors(x, y)).stages[:3]
    assert all((accuracy is None) == (task == "contrast") for _, accuracy in heads)  # an embedding has none


def weights(stages, *given):
    session = trainer(ul.credit.InfoPro("softmax", *given), stages=stages, model=None if stages < 5 else deep(stages))
    return [(stage.loss.lambda1, stage.loss.lambda2) for stage in list(session.chains[0])[:-1]]


def deep(stages):
    torch.manual_seed(0)
    layers = [nn.Linear(5, 7), *(nn.Linear(7, 7) for _ in range(stages - 2)), nn.Linear(7, 3)]
    return nn.Sequential(*layers).double()


def test_the_weights_are_linear_in_the_depth():
    assert weights(2, 3.0, 2.0, 1.0, 0.0) == [(3.0, 2.0)]
    assert weights(3, 3.0, 2.0, 1.0, 0.0) == [(3.0, 2.0), (1.0, 0.0)]
    assert weights(6, 4.0, 0.0, 0.0, 8.0) == [(4.0, 0.0), (3.0, 2.0), (2.0, 4.0), (1.0, 6.0), (0.0, 8.0)]
    assert weights(4, 3.0, 2.0) == [(3.0, 2.0)] * 3  # one pair alone is constant
    assert weights(4) == [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]  # the paper's
    assert weights(2) == [(5.0, 0.5)]
    assert (preset(8), preset(16)) == ((5.0, 0.0, 0.0, 1.0), (5.0, 0.0, 0.5, 1.0))
    assert (preset(1), preset(3), preset(9), preset(33)) == (preset(2), preset(4), preset(16), preset(16))


def test_without_reconstruction_it_is_dgl_with_the_paper_head_bit_for_bit():
    results = []
    for credit in (ul.credit.InfoPro(lambda1=0.0, lambda2=1.0), ul.credit.DGL(head="1c2f", budget=None)):
        session = session_of(credit)
        for k in range(3):
            session.step(*images(seed=k))
        results.append({name.replace("head.task.", "head."): x for name, x in state(session).items()})
    assert_same(*results)


def test_soft_targets_have_a_softmax_but_no_contrast():
    x, y = batch()
    soft = torch.nn.functional.one_hot(y, 3).double() * 0.9 + 0.1 / 3
    assert all(loss is not None for loss in trainer(ul.credit.InfoPro()).step(x, soft))
    with pytest.raises(WrongTarget, match=r"task=.softmax"):
        trainer(ul.credit.InfoPro("contrast")).step(x, soft)


def test_replicas_read_at_a_contrast_have_no_accuracy():
    session = trainer(ul.credit.Greedy(head=InfoProHead("contrast"), budget=None), replicas=2)
    found = session.evaluate(batch())  # in the first phase stage 0 stands for the network
    assert (found.accuracy, found.members, found.ensemble) == (None, [None, None], None)


# ------------------------------------------------------------------------------------------------------- heads, decoders


@pytest.mark.parametrize(("side", "stride", "channels"), [(17, 2, 12), (9, 2, 12), (8, 1, 6), (1, 1, 6)])
def test_1c2f_halves_and_doubles_unless_the_map_is_small(side, stride, channels):
    x = drawn(4, 6, side, side)
    head = HEADS["1c2f"].make(x, 3, per_token=False)
    conv, norm, _, _, _, first, _, last = head
    assert conv.stride == (stride, stride) and conv.weight.shape == (channels, 6, 3, 3) and conv.bias is None
    assert (first.in_features, first.out_features, last.in_features, last.out_features) == (channels, 128, 128, 3)
    maps = torch.relu(norm(conv(x)))
    expected = last(torch.relu(first(maps.mean((2, 3)))))
    torch.testing.assert_close(head(x), expected, rtol=1e-12, atol=1e-12)


def test_0c1f_is_a_linear_map_of_the_mean_and_other_features_have_no_convolution():
    x = drawn(4, 6, 5, 5)
    head = HEADS["0c1f"].make(x, 3, per_token=False)
    torch.testing.assert_close(head(x), head[-1](x.mean((2, 3))))
    assert [type(part) for part in HEADS["1c2f"].make(drawn(4, 6), 3, False)] == [nn.Linear, nn.ReLU, nn.Linear]
    assert ConvolutionsAndDenseHead(0, 2).name == "0c2f"


def test_under_a_budget_convolution_and_decoder_shrink_too():
    like, widths = images()[0], []
    for budget in (None, 2.0):
        session = session_of(ul.credit.InfoPro("softmax", 1.0, 1.0, budget=budget))
        stage = session.chains[0][0]
        widths.append((stage.head.task[0].out_channels, stage.head.decoder.layers[0].out_channels))
    assert widths[0] == (8, 12) and all(0 < narrow < wide for narrow, wide in zip(widths[1], widths[0]))
    assert flops(stage.head, stage.body(like[:2])) <= 2.0 * flops(stage.body, like[:2])


def test_each_token_is_decoded_to_its_own_patch():
    made = decoder(drawn(2, 6, 7), (3, 4, 6), hidden=12).double()  # 2×3 patches of 2×2 pixels
    assert isinstance(made, PatchDecoder) and made.grid == (2, 3)
    h = drawn(2, 6, 7)
    before = made(h)
    assert before.shape == (2, 3, 4, 6)
    for token in range(6):
        moved = h.clone()
        moved[:, token] += 1
        row, column = divmod(token, 3)
        rest = made(moved) != before
        assert rest[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].all()
        assert rest.sum() == 2 * 3 * 4
    pixels = made.pixels(h)[1, 4].reshape(3, 2, 2)  # token 4: row 1, column 1
    torch.testing.assert_close(before[1, :, 2:4, 2:4], pixels)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: session_of_gpt(ul.credit.InfoPro()), "must be numbers such as pixels"),
        (lambda: ul.credit.InfoPro(lambda1=-1.0), "-1.0 is not a number of at least 0"),
        (lambda: ul.credit.InfoPro("contrst"), "did you mean 'contrast'"),
        (lambda: ul.credit.InfoPro(temperature=0.0), "greater than 0"),
        (lambda: decoder(drawn(2, 7, 5), (3, 4, 6), 12), "they are its patches and nothing else"),
        (lambda: decoder(drawn(2, 7, 5, 5), (4,), 12), "if the input is an image"),
        (lambda: InfoProHead().make(drawn(2, 4), 3, False), "for a stage of a chain only"),
        (lambda: split_table("resnet32", 3), "2, 4, 8, 16"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(make, says):
    with pytest.raises(ul.UnlockedError) as error:
        make()
    assert says in str(error.value) and str(error.value).endswith(".")


def session_of_gpt(credit):
    tokens = torch.randint(9, (2, 4))
    model = ul.models.gpt((4,), 9, layers=2, width=8, heads=2)
    return ul.Trainer(ul.cut(model, 2, like=tokens), credit=credit, optimizer=momentum)


def test_tokens_without_reconstruction_learn_the_task():
    session = session_of_gpt(ul.credit.InfoPro(lambda1=0.0, lambda2=1.0))
    assert session.chains[0][0].head.decoder is None


# ------------------------------------------------------------------------------------------------------------ splits


def test_the_published_splits_are_those_of_the_tables():
    """Ends (group, block), counted by hand from the networks' order: the stem, then the blocks of the three groups."""
    ends = {("resnet110", 2): [27], ("resnet110", 4): [12, 26, 40], ("resnet32", 4): [3, 7, 11]}
    for (network, stages), after in ends.items():
        found = split_table(network, stages)
        assert [sum(found.blocks[: k + 1]) for k in range(stages - 1)] == after and found.published
    assert split_table("resnet32", 16) == ([1] * 15 + [2], [0] + [1] * 15, True)
    guesses = [("resnet32", 2), ("resnet32", 8)]
    for network, stages in guesses:
        found = split_table(network, stages)
        assert not found.published and max(found.blocks) - min(found.blocks) <= 1
        assert sum(found.blocks) == 15 and len(found.sizes) == stages


def test_a_table_cuts_the_network():
    x = torch.randn(2, 3, 8, 8)
    model = ul.models.resnet32((3, 8, 8), 4, width=0.25)
    chain = ul.cut(model, sizes=split_table("resnet32", 4).sizes, like=x)
    ends = [list(stage.body._modules)[-1] for stage in chain]
    assert [name.split("_", 1)[1] for name in ends[:3]] == ["blocks_2", "blocks_6", "blocks_10"]
