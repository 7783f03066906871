"""Heads made from the network above: AugLocal's copies of its architecture, MAN's moving average of its first block."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import unlocked as ul
from unlocked.cutting import from_recipe_of_chain
from unlocked.errors import HeadTooLarge
from unlocked.heads import AugLocalHead, MANHead
from unlocked.heads.auglocal import depth_of, sampled
from unlocked.heads.copying import Block, adapted, blocks_of
from unlocked.models.resnet import ResidualBlock, Step

from methods import assert_same, batch, data, mlp, momentum, state, trainer

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def session_of(model, stages, credit, like=IMAGES, seed=0):
    return ul.Trainer(ul.cut(model, stages, like=like), credit=credit, optimizer=momentum, seed=seed)


def resnet():
    torch.manual_seed(0)
    return ul.models.resnet18((3, 16, 16), 4, width=0.125)


def one_block_each(model, blocks):
    """A chain with a stage for the stem, each block, and the classifier; not compared with the model, as `cut` does."""
    return from_recipe_of_chain({"model": model.recipe, "sizes": [1] * (blocks + 1)}, IMAGES)


# ---------------------------------------------------------------------------------------------------------- AugLocal


def test_depths_and_sampled_blocks_of_the_papers_networks():
    """ResNet-110: a stem and 54 blocks; d = 6, τ = 0.5, L' = 49; the numbers are worked out by hand."""
    for block, depth in [(0, 6), (10, 5), (24, 5), (40, 4), (47, 4), (50, 4), (52, 2), (53, 1), (54, 0)]:
        assert depth_of(block, 55, 6, 0.5) == depth, block  # 6 − 2.5 ℓ/47; at last no more than blocks are left
    assert [depth_of(block, 55, 2, 0.5) for block in (0, 20, 40, 51)] == [2, 2, 2, 2]  # 1.5 rounds to even
    assert [depth_of(block, 55, 6, 1.0) for block in (0, 47)] == [6, 1]
    assert {depth_of(block, 55, 6, 0.0) for block in range(49)} == {6}
    assert sampled(0, 55, 6) == [9, 18, 27, 36, 45, 54]
    assert sampled(24, 55, 5) == [30, 36, 42, 48, 54]
    assert sampled(53, 55, 1) == [54]


def parts(block):
    """What makes a block's architecture, but for its first layer's inputs and all strides."""
    found = []
    for part in block.modules():
        if isinstance(part, nn.Conv2d) and part.kernel_size != (1, 1):
            found.append((part.out_channels, part.kernel_size))
        elif isinstance(part, (nn.Linear, nn.BatchNorm2d, nn.LayerNorm, nn.ReLU)):
            found.append(type(part))
    return [one for one in found if not isinstance(one, type) or one is not nn.BatchNorm2d]


@pytest.mark.covering
@pytest.mark.parametrize("name", ["resnet18", "cnn", "vgg6a"])
def test_the_blocks_are_like_those_above_with_maps_as_small(name):
    torch.manual_seed(0)
    options = {"width": 6} if name == "cnn" else {"width": 0.05}
    model = ul.models.build(name, input_shape=(3, 16, 16), classes=4, **options)
    chain = one_block_each(model, 9 if name == "resnet18" else 5).eval()
    blocks = blocks_of(chain)[:-1]
    for j, _, h in list(chain.walk(IMAGES))[:-1:3]:
        depth = depth_of(j, len(blocks), 3, 0.5)
        head = AugLocalHead(3, 0.5).at(chain, j).make(h, 4, per_token=False).eval()
        found = [part for part in head if isinstance(part, nn.Sequential)]
        assert len(found) == depth
        for made, number in zip(found, sampled(j, len(blocks), depth)):
            assert parts(made) == parts(blocks[number].module)
            side, h = h.shape[-1], made(h)
            wanted = blocks[number].after
            assert h.shape[1] == wanted[0]
            if len(wanted) == 3:  # halved once a block, until the maps are as small as the network's own
                assert h.shape[-1] == (side if side == wanted[-1] else side // 2)
        assert any(isinstance(part, nn.BatchNorm1d) for part in head) == (depth == 1)


def test_a_jump_over_two_halvings_is_made_up_for_in_the_next_block():
    head = AugLocalHead(2, 0.0).at(one_block_each(resnet(), 9), 0).make(torch.zeros(2, 8, 16, 16), 4, per_token=False)
    first, second = (part[0] for part in list(head)[:2])  # like blocks whose maps are 8×8 and 2×2
    assert (first.conv1.in_channels, first.conv2.out_channels, second.conv2.out_channels) == (8, 16, 64)
    assert first(torch.randn(2, 8, 16, 16)).shape == (2, 16, 8, 8)
    assert second(torch.randn(2, 16, 8, 8)).shape == (2, 64, 4, 4)


def test_a_bottleneck_is_strided_where_the_networks_own_is():
    block = ResidualBlock(8, [Step(2, 1, 1), Step(2, 3, 1), Step(8, 1, 1)])
    made = adapted(Block(nn.Sequential(block), 0, (8, 4, 4), (8, 4, 4)), 5, halve=True)
    assert [getattr(made[0], f"conv{k}").stride for k in (1, 2, 3)] == [(1, 1), (2, 2), (1, 1)]
    assert made(torch.randn(2, 5, 8, 8)).shape == (2, 8, 4, 4)


@pytest.mark.parametrize("head", ["auglocal", "man"])
@pytest.mark.parametrize("name", ["cnn", "gpt"])
def test_weights_are_the_heads_own_and_nothing_reaches_the_stages_above(head, name):
    torch.manual_seed(0)
    like = IMAGES if name == "cnn" else torch.randint(11, (2, 6))
    model = (
        ul.models.cnn((3, 16, 16), 4, width=4) if name == "cnn" else ul.models.gpt((6,), 11, layers=3, width=8, heads=2)
    )
    session = session_of(model, 4, ul.credit.DGL(head=head, budget=None), like)
    chain = session.chains[0]
    owners = [
        {x.data_ptr() for x in [*part.parameters(), *part.buffers()]}
        for s in chain
        for part in (s.body, s.head)
        if part
    ]
    assert all(not a & b for k, a in enumerate(owners) for b in owners[:k])
    values = [x for stage in chain for x in stage.body.parameters() if x.dim() > 1]
    assert not any(torch.equal(x, y) for x in chain[0].head.parameters() if x.dim() > 1 for y in values)
    y = torch.randint(4, (2,) if name == "cnn" else (2, 6))
    (chain[0].loss(chain[0].head(chain[0].body(like)), y)).backward()
    for j, stage in enumerate(chain):
        assert all((x.grad is not None) == (j == 0) for x in stage.parameters())


@pytest.mark.covering
@pytest.mark.parametrize("head", ["auglocal", "man"])
def test_heads_from_one_seed_are_equal_and_from_another_are_not(head):
    def heads(seed):
        session = trainer(ul.credit.DGL(head=head, budget=None), seed=seed)
        return {name: x for name, x in state(session).items() if ".head." in name and x.dim() > 1}

    torch.manual_seed(1)
    first = heads(3)
    torch.manual_seed(2)  # the user's own stream must not matter
    assert_same(first, heads(3))
    assert all(not torch.equal(x, y) for x, y in zip(first.values(), heads(4).values()))


def test_copied_causal_blocks_stay_causal():
    torch.manual_seed(0)
    tokens = torch.randint(11, (2, 6))
    model = ul.models.gpt((6,), 11, layers=3, width=8, heads=2)
    session = session_of(model, 4, ul.credit.DGL(head=AugLocalHead(2), budget=None), tokens)
    head, h = session.chains[0][0].head.eval(), torch.randn(2, 6, 8)
    before, moved = head(h), h.clone()
    moved[:, 4, 0] += 1
    after = head(moved)
    assert before.shape == (2, 6, 11)
    assert torch.equal(before[:, :4], after[:, :4]) and (before[:, 4:] != after[:, 4:]).all()


# --------------------------------------------------------------------------------------------------------------- MAN


def block_above(session, j):
    """Weight and bias of the first linear layer of stage j + 1, as they are now."""
    return [x.detach().clone() for x in list(session.chains[0][j + 1].body.parameters())[:2]]


@pytest.mark.parametrize("credit", [ul.credit.DGL, lambda **o: ul.credit.Interlocking(1, **o)])
@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_is_its_recursion(credit, period, accumulate):
    rule = credit(head=MANHead(momentum=0.8, period=period), budget=None)
    session = trainer(rule, stages=3, accumulate=accumulate)
    heads = [session.chains[0][j].head for j in range(2)]
    expected = [[x.clone() for x in head.average.buffers()] for head in heads]
    assert all(not torch.equal(a, b) for a, b in zip(expected[0], block_above(session, 0)))  # drawn anew
    for t in range(7):
        if t % period == 0:
            for j in range(2):
                expected[j] = [0.8 * e + (1 - 0.8) * b for e, b in zip(expected[j], block_above(session, j))]
        session.step(*batch(seed=t))
        for j in range(2):
            found = list(heads[j].average.buffers())
            assert len(found) == 2
            for mine, one in zip(found, expected[j]):
                torch.testing.assert_close(mine, one, rtol=1e-14, atol=1e-15)


def test_the_loss_is_read_from_the_sum_of_both_blocks_and_no_gradient_changes_the_average():
    session = trainer(ul.credit.DGL(head=MANHead(momentum=1.0), budget=None), stages=2)
    stage = session.chains[0][0]
    head, body = stage.head, copy.deepcopy(stage.body)
    kept = [x.clone() for x in head.average.buffers()]
    weights = [x.detach().clone().requires_grad_() for x in head.parameters()]
    (w, b), (v, c) = weights[:2], weights[2:]
    x, y = batch()
    h = body(x)
    loss = nn.functional.cross_entropy((torch.tanh(h @ w.T + b) + torch.tanh(h @ kept[0].T + kept[1])) @ v.T + c, y)
    assert session.step(x, y)[0] == pytest.approx(loss.item(), rel=1e-12)
    assert len(list(head.parameters())) == 4  # P and the last layer: E is in no optimizer
    loss.backward()
    reference = [*body.parameters(), *weights]
    momentum(reference).step()
    for mine, expected in zip([*stage.body.parameters(), *head.parameters()], reference):
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-13)
    assert all(torch.equal(a, b) for a, b in zip(head.average.buffers(), kept))


def test_momentum_0_is_the_block_above_as_it_is_at_the_start_of_the_step():
    session = trainer(ul.credit.DGL(head=MANHead(momentum=0.0), budget=None), stages=3)
    for t in range(3):
        before = block_above(session, 0)
        session.step(*batch(seed=t))
        assert all(torch.equal(a, b) for a, b in zip(session.chains[0][0].head.average.buffers(), before))
        assert not torch.equal(before[0], block_above(session, 0)[0])


def test_it_may_start_at_the_block_above():
    session = trainer(ul.credit.DGL(head=MANHead(fresh=False), budget=None), stages=3)
    head = session.chains[0][0].head
    for kind in (head.average.buffers(), head.trained.parameters()):
        assert all(torch.equal(a, b) for a, b in zip(kind, block_above(session, 0)))


def test_only_weights_are_averaged_and_batchnorm_keeps_statistics_of_its_own():
    model = mlp(3, norm=True)
    session = trainer(ul.credit.DGL(head=MANHead(momentum=0.5), budget=None), stages=2, model=model)
    head = session.chains[0][0].head
    assert set(head.followed) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    x, y = batch()
    with torch.no_grad():
        above = block_above(session, 0)
        e = [0.5 * mine + 0.5 * b for mine, b in zip(head.average.buffers(), above)]
        hidden = session.chains[0][0].body(x) @ e[0].T + e[1]
    session.step(x, y)
    torch.testing.assert_close(head.average[1].running_mean, 0.1 * hidden.mean(0))


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).relu())


def test_a_tied_weight_is_averaged_once():
    torch.manual_seed(0)
    x, y = torch.randn(8, 6), torch.arange(8) % 3
    model = nn.Sequential(nn.Linear(6, 6), Tied(), nn.Linear(6, 3))
    session = session_of(model, 3, ul.credit.DGL(head=MANHead(0.75), budget=None), like=x)
    average = session.weights[0].stage.head.average.get_submodule("0")
    wanted = 0.75 * average.a.weight + 0.25 * session.weights[1].stage.body[0].a.weight.detach()
    session.step(x, y)
    assert torch.equal(average.a.weight, average.b.weight)
    torch.testing.assert_close(average.a.weight, wanted)


def test_in_greedy_learning_nothing_is_lent_and_the_average_stays():
    session = trainer(ul.credit.Greedy(head="man", budget=None), stages=3)
    before = [x.clone() for x in session.chains[0][0].head.average.buffers()]
    session.fit(data(24), 1, batch_size=12)
    assert all(torch.equal(a, b) for a, b in zip(session.chains[0][0].head.average.buffers(), before))
    assert "lent" not in session.bytes_sent


def test_what_is_lent_is_the_first_block():
    session = trainer(ul.credit.DGL(head="man", budget=None), stages=3, model=mlp(6))
    session.step(*batch())
    assert session.bytes_sent["lent"] == 2 * (7 * 7 + 7) * 8


# ----------------------------------------------------------------------------------------------------------- refusals


class Raw(nn.Module):
    """A layer that does not know how to start."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(7))

    def forward(self, x):
        return x @ self.weight


LAST_BLOCK = ul.credit.DGL(head=AugLocalHead(1, 0.0), budget=None)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: AugLocalHead().make(torch.zeros(2, 4), 3, False), ul.UnlockedError, "for a stage of a chain only"),
        (lambda: MANHead().make(torch.zeros(2, 4), 3, False), ul.UnlockedError, "DGL(head='man', budget=None)"),
        (lambda: AugLocalHead(d=0), ul.UnlockedError, "at least 1"),
        (lambda: AugLocalHead(tau=1.5), ul.UnlockedError, "not in [0, 1]"),
        (lambda: MANHead(momentum=1.5), ul.UnlockedError, "a momentum in [0, 1]"),
        (lambda: MANHead(period=0), ul.UnlockedError, "at least 1"),
        (lambda: with_raw("man"), ul.UnlockedError, "no reset_parameters()"),
        (lambda: with_raw("auglocal"), ul.UnlockedError, "no reset_parameters()"),
        (lambda: trainer(ul.credit.DGL(head="man")), HeadTooLarge, "raise budget="),
        (lambda: session_of(user_resnet(), 3, LAST_BLOCK), ul.UnlockedError, "and it does not run"),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_sentence(make, error, says):
    with pytest.raises(error) as found:
        make()
    assert says in str(found.value) and str(found.value).endswith(".")


def with_raw(head):
    model = nn.Sequential(nn.Linear(5, 7), Raw(), nn.Linear(7, 3)).double()
    return trainer(ul.credit.DGL(head=head, budget=None), model=model)


class UserBlock(nn.Module):
    """A residual block of the user's own, of which no other width can be made."""

    def __init__(self, channels):
        super().__init__()
        self.one, self.two = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.two(torch.relu(self.one(x)))


def user_resnet():
    last = [
        nn.Conv2d(4, 8, 3, stride=2, padding=1),
        UserBlock(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    ]
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), UserBlock(4), *last)


def test_a_users_own_blocks_of_one_width_are_copied_as_they_are():
    last = [UserBlock(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), UserBlock(4), *last)
    session = session_of(model, 3, LAST_BLOCK)
    assert isinstance(session.chains[0][0].head[0][0], UserBlock)
