"""What populations must hold at their edges: data in another order, no numbers, tied weights, states that come late, stacks
that are moved."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import unlocked as ul
from unlocked import soups
from unlocked.batchnorm import refresh_batchnorm
from unlocked.consensus.shuffling.layers import layers_of
from unlocked.consensus.shuffling.moving import Shuffle
from unlocked.errors import InvalidChoice, UnlockedError
from unlocked.soups.heat_map import lattice, polygon_weights

from methods import momentum


def classifier(seed: int, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Tanh(), nn.Linear(8, 3))


def samples(count: int = 40) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    return torch.randn(count, 6, generator=source), torch.randint(3, (count,), generator=source)


# ---- soups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["test", "validation"])
def test_data_in_another_order_at_each_reading_are_refused(which):
    """The ensemble of equal members would be wrong about nearly all samples."""
    x, y = samples()
    shuffled = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    given_data = {"test": (x, y), "validation": (x, y), which: shuffled}
    with pytest.raises(InvalidChoice, match="order"):
        soups.evaluate_population([classifier(0)] * 2, **given_data)


def test_a_loader_in_one_order_gives_the_numbers_of_its_tensors():
    x, y = samples()
    members = [classifier(n) for n in range(3)]
    loaded = soups.evaluate_population(members, DataLoader(TensorDataset(x, y), batch_size=8))
    assert loaded.disagreement == soups.evaluate_population(members, (x, y)).disagreement


def test_a_member_without_numbers_is_never_the_best():
    x, _ = samples()
    members = [nn.Linear(6, 2) for _ in range(3)]
    with torch.no_grad():
        members[0].weight.fill_(math.nan)
    scores = soups.evaluate_population(members, (x, x[:, :2]))
    assert scores.best != 0 and scores.worst == 0


def test_the_temperature_does_not_feel_a_class_that_is_masked_out():
    x, y = samples()
    logits = classifier(0)(x).detach()
    masked = torch.cat([logits, torch.full((len(x), 1), -math.inf)], 1)
    assert soups.optimal_temperature(masked, y) == pytest.approx(soups.optimal_temperature(logits, y))


def test_weights_too_large_to_be_summed_are_refused():
    with pytest.raises(InvalidChoice, match="weights"):
        soups.averaged([classifier(n) for n in range(3)], [1e308] * 3)


def test_batchnorm_statistics_of_one_sample_are_refused_in_a_sentence():
    x, y = samples()
    with pytest.raises(UnlockedError, match="batch of 1"):
        refresh_batchnorm(classifier(0, norm=True), [(x[:8], y[:8]), (x[8:9], y[8:9])])


def test_no_part_of_a_held_out_text_is_empty(tmp_path):
    (tmp_path / "text.txt").write_text("a small text " * 100)
    train, _ = ul.data.load(f"text:{tmp_path / 'text.txt'}", context=16, subset=8)
    for share in (0.1, 0.95):
        with pytest.raises(InvalidChoice, match="validation share"):
            soups.hold_out(train, share)


def test_operations_of_fused_layers_are_counted():
    """In evaluation mode PyTorch has a kernel of its own for this layer."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    products = 2 * 5 * (3 * 8 * 8 + 8 * 8 + 2 * 8 * 16)  # five positions; attention itself comes on top
    assert soups.inference_cost(layer, torch.randn(2, 5, 8)).flops >= products


@given(members=st.integers(3, 5), steps=st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_every_point_of_a_heat_map_is_a_mean_and_every_member_a_corner(members, steps):
    weights = torch.stack([polygon_weights(members, point) for point in lattice(members, steps)])
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(len(weights), dtype=torch.float64))
    assert all((weights[:, n] == 1).any() for n in range(members))


# ---- WASH ------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(40, 10), nn.Linear(10, 10)
        self.output = nn.Linear(10, 40, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.hidden(self.embedding(x)))


@pytest.mark.parametrize("layers", ["module", "tensor", "block"])
def test_a_tied_weight_is_in_one_layer_and_travels_once(layers):
    chain = ul.Chain([ul.Stage(Tied())])
    rule = ul.consensus.WASH(p=1.0, schedule="constant", layers=layers)
    found = [id(part.tensor) for layer in layers_of(chain, rule.selection, 0) for part in layer.parts]
    assert sorted(found) == sorted({id(x) for x in chain.parameters()})


class Gate(nn.Module):
    """One of two layers, as the first entry says."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if x[0, 0] > 0 else self.other(x)


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_states_that_only_some_replicas_have_are_refused_in_a_sentence(p):
    """With p = 1 the messages would be equally long: one layer's momentum would become the other's."""
    trainer = ul.Trainer(
        ul.Chain([ul.Stage(Gate())]),
        consensus=ul.consensus.WASH(p=p, schedule="constant", optimizer=True),
        replicas=2,
        optimizer=momentum,
    )
    x, y = torch.ones(3, 4), torch.zeros(3, dtype=torch.long)
    with pytest.raises(UnlockedError, match="wash"):
        trainer.step([x, -x], [y, y])


def test_every_scalar_is_hit_as_often_as_its_layer_says():
    chain = ul.Chain([ul.Stage(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 3)))])
    layers = layers_of(chain, ul.consensus.WASH(p=0.2).selection, 0)
    shuffle, updates = Shuffle(layers, seed=0, replicas=3), 1500
    counts = torch.zeros(sum(layer.size for layer in layers), dtype=torch.float64)
    for update in range(updates):
        counts[shuffle._drawn(update)[0]] += 1
    p = torch.cat([torch.full((layer.size,), layer.p, dtype=torch.float64) for layer in layers])
    assert ((counts - updates * p).abs() < 5 * (updates * p * (1 - p)).sqrt()).all()


# ---- stacked members -------------------------------------------------------------------------------------------------


def stacked(model: nn.Module, like: Tensor | None = None) -> ul.Trainer:
    return ul.Trainer(
        ul.Chain([ul.Stage(model)], like=like),
        credit=ul.credit.Backprop(stacked=True),
        replicas=2,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )


def test_a_backward_that_fails_leaves_nothing_in_the_stack():
    (x, y), after, plain = samples(), stacked(classifier(0)), stacked(classifier(0))
    first = after.stack._weights["0.weight"].whole  # the last to get its gradient

    def fail(gradient: Tensor) -> None:
        raise KeyboardInterrupt

    hook = first.register_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        after.step([x, x], [y, y])
    hook.remove()
    for trainer in (after, plain):
        trainer.step([x, x], [y, y])
    for mine, theirs in zip(after.chains[0].parameters(), plain.chains[0].parameters()):
        assert torch.equal(mine, theirs)


def test_a_member_that_was_moved_out_of_the_stack_is_noticed():
    (x, y), trainer = samples(), stacked(classifier(0))
    trainer.chains[0].double().float()  # other tensors, the same numbers
    with pytest.raises(UnlockedError, match="stack"):
        trainer.step([x, x], [y, y])


class Remembering(nn.Module):
    """Replaces its buffer in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return self.layer(x - self.mean)


def test_a_buffer_that_is_replaced_is_noticed_without_an_example():
    x, y = samples()
    with pytest.raises(InvalidChoice, match="buffer"):
        stacked(Remembering()).step([x, x], [y, y])
