"""Local losses of transformers: each stage learns from its own, heads are causal, a shared unembedding is the network's own."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unlocked as ul
from unlocked.cli import main
from unlocked.credit.lending import borrower_of
from unlocked.errors import HeadTooLarge, InvalidChoice
from unlocked.heads import HEADS, LinearHead, MLPHead, SharedUnembeddingHead, UnembeddingHead

from methods import assert_same, momentum, state

VOCABULARY, WIDTH, CONTEXT = 11, 8, 6
RATE = 0.5


def texts(seed: int = 0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    window = torch.randint(VOCABULARY, (4, CONTEXT + 1), generator=source)
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def images(seed: int = 0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 8, 8, generator=source, dtype=torch.float64), torch.arange(4)


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "gpt":
        return ul.models.gpt((CONTEXT,), VOCABULARY, layers=3, width=WIDTH, heads=2).double()
    if kind == "vit":
        return ul.models.vit((3, 8, 8), VOCABULARY, layers=3, width=WIDTH, heads=2).double()
    transformers = pytest.importorskip("transformers")
    size: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=CONTEXT,
            n_embd=WIDTH,
            n_layer=3,
            n_head=2,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
        )
        return transformers.GPT2LMHeadModel(config).double()
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY, intermediate_size=16, tie_word_embeddings=False, **size
        )
        return transformers.LlamaForCausalLM(config).double()
    config = transformers.ViTConfig(image_size=8, patch_size=4, intermediate_size=16, num_labels=VOCABULARY, **size)
    return transformers.ViTForImageClassification(config).double()


def batch(kind: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    return images(seed) if "vit" in kind else texts(seed)


def projection(chain: Any) -> nn.Linear:
    return [part for part in chain[-1].body.modules() if isinstance(part, nn.Linear)][-1]


def session(kind: str, credit: Any, stages: int = 3, **options: Any) -> ul.Trainer:
    chain = ul.cut(network(kind), stages, like=batch(kind)[0])
    if projection(chain).bias is not None:
        nn.init.normal_(projection(chain).bias)  # as built it is 0, and leaving it out would not be seen
    options.setdefault("optimizer", lambda parameters: torch.optim.SGD(parameters, lr=RATE))
    trainer = ul.Trainer(chain, credit=credit, **options)
    for part in trainer.chains[0].modules():  # no chance: what is compared is computed twice
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return trainer


def unembedded(head: nn.Module, h: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The formula: LayerNorm, mean over the tokens where there is one label per sample, projection, cross-entropy."""
    norm = next(part for part in head.modules() if isinstance(part, nn.LayerNorm))
    rows = F.layer_norm(h, (WIDTH,), norm.weight, norm.bias)
    scores = (rows.mean(1) if y.dim() == 1 else rows) @ weight.T + (0.0 if bias is None else bias)
    return F.cross_entropy(scores.flatten(0, -2), y.flatten())


def own_loss(stage: Any, h: Tensor, y: Tensor, last: Any, spec: Any) -> Tensor:
    """A stage's local loss at its output."""
    if stage.head is None:
        return F.cross_entropy(h.flatten(0, -2), y.flatten())
    if borrower_of(stage) is not None:
        linear = projection([last])
        return unembedded(
            stage.head, h, y, linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        )
    if spec == "unembedding":
        return unembedded(stage.head, h, y, stage.head[-1].weight, None)
    return F.cross_entropy(stage.head(h).flatten(0, -2), y.flatten())


KINDS = ["gpt", "vit", "gpt2", "llama", "hugging-vit"]
SPECS = ["linear", MLPHead(5, 1), "unembedding", "shared-unembedding"]


@pytest.mark.covering
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_learns_from_its_own_loss_alone(kind: str, spec: Any) -> None:
    trainer = session(kind, ul.credit.DGL(spec, None))
    before = copy.deepcopy(trainer.chains[0])
    h, y = batch(kind, 1)
    losses = trainer.step(h, y)
    for j, (stage, after) in enumerate(zip(before, trainer.chains[0])):
        h = stage(h.detach())
        loss = own_loss(stage, h, y, before[-1], spec)
        assert losses[j] == pytest.approx(float(loss.detach()), rel=1e-10)
        gradients = torch.autograd.grad(loss, list(stage.parameters()), allow_unused=True)
        for (name, old), new, gradient in zip(stage.named_parameters(), after.parameters(), gradients):
            if gradient is not None:
                torch.testing.assert_close((old - new) / RATE, gradient, rtol=1e-7, atol=1e-12, msg=f"{j} {name}")


@pytest.mark.covering
@pytest.mark.parametrize("spec", ["unembedding", "shared-unembedding"])
@pytest.mark.parametrize(("kind", "d"), [("gpt", 1), ("gpt", 2), ("vit", 1)])
def test_interlocking_transformers_learn_from_the_head_d_stages_above(kind: str, d: int, spec: str) -> None:
    trainer = session(kind, ul.credit.Interlocking(d, spec, None), stages=4)
    before = copy.deepcopy(trainer.chains[0])
    h, y = batch(kind, 1)
    trainer.step(h, y)
    losses = []
    for stage in before:
        h = stage(h)
        losses.append(own_loss(stage, h, y, before[-1], spec))
    for j, (stage, after) in enumerate(zip(before, trainer.chains[0])):
        target = losses[min(j + d, 3)]
        gradients = torch.autograd.grad(target, list(stage.body.parameters()), retain_graph=True)
        for old, new, gradient in zip(stage.body.parameters(), after.body.parameters(), gradients, strict=True):
            torch.testing.assert_close((old - new) / RATE, gradient, rtol=1e-7, atol=1e-12)


@pytest.mark.covering
@pytest.mark.parametrize("name", ["linear", "mlp", "predsim", "unembedding", "shared-unembedding"])
@pytest.mark.parametrize("kind", ["gpt", "gpt2", "llama"])
def test_no_head_sees_what_comes_later(kind: str, name: str) -> None:
    spec = MLPHead(5, 1) if name == "mlp" else HEADS[name]
    credit = ul.credit.PredSim(budget=None) if name == "predsim" else ul.credit.DGL(spec, None)
    chain = session(kind, credit).chains[0].eval()
    x, _ = texts()
    for t in range(CONTEXT - 1):
        other = x.clone()
        other[:, t + 1 :] = (other[:, t + 1 :] + 1) % VOCABULARY
        for depth in range(3):
            a, b = ul.losses.logits(chain.read(x, depth)), ul.losses.logits(chain.read(other, depth))
            torch.testing.assert_close(a[:, : t + 1], b[:, : t + 1], rtol=1e-12, atol=1e-14)
            if name != "predsim":  # its projection starts at zero
                assert (a[:, t + 1 :] != b[:, t + 1 :]).any()


# ---- shared ----------------------------------------------------------------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize("kind", ["gpt", "vit", "gpt2"])
@pytest.mark.parametrize(("period", "accumulate"), [(1, 1), (1, 2), (3, 1)])
def test_a_shared_unembedding_is_the_last_stages_bit_for_bit(kind: str, period: int, accumulate: int) -> None:
    credit = ul.credit.DGL(SharedUnembeddingHead(period), None)
    trainer = session(kind, credit, optimizer=momentum, accumulate=accumulate)
    chain = trainer.chains[0]
    kept: list[dict[str, Tensor]] = []
    for step in range(2 * period + 2):
        kept.append({name: x.detach().clone() for name, x in projection(chain).named_parameters()})
        trainer.step(*batch(kind, step))
        for stage in list(chain)[:-1]:
            borrower = borrower_of(stage)
            assert borrower is not None
            shared = kept[step - step % period]
            assert {name for name, _ in borrower.named_buffers()} == set(shared)
            assert all(torch.equal(borrower.get_buffer(name), x) for name, x in shared.items())
            assert not any(torch.equal(x, projection(chain).get_parameter(name)) for name, x in shared.items())


def test_a_shared_unembedding_gets_no_gradient_and_no_optimizer_has_it() -> None:
    trainer = session("gpt", ul.credit.DGL("shared-unembedding", None))
    trainer.step(*batch("gpt"))
    for weights in trainer.weights[:-1]:
        borrower = borrower_of(weights.stage)
        assert borrower is not None
        assert [name for name, _ in borrower.named_parameters()] == ["norm.weight", "norm.bias"]
        updated = {id(x) for group in weights.store.optimizer.param_groups for x in group["params"]}
        assert all(id(x) not in updated and not x.requires_grad and x.grad is None for x in borrower.buffers())
        own = {x.untyped_storage().data_ptr() for x in borrower.buffers()}
        assert projection(trainer.chains[0]).weight.untyped_storage().data_ptr() not in own  # a copy, not a view


@pytest.mark.parametrize("credit", [ul.credit.DGL, lambda *head: ul.credit.Interlocking(1, *head)])
def test_a_simulated_cluster_gives_the_same_numbers(credit: Any) -> None:
    results = []
    for world in (None, ul.worlds.Simulated()):
        trainer = session("gpt", credit(SharedUnembeddingHead(2), None), world=world)
        for step in range(4):
            trainer.step(*batch("gpt", step))
        results.append(state(trainer))
    assert_same(*results)


def test_a_stale_copy_outlives_a_resume(tmp_path: Any) -> None:
    def make() -> ul.Trainer:
        return session("gpt", ul.credit.DGL(SharedUnembeddingHead(3), None), optimizer=momentum)

    straight, first = make(), make()
    for step in range(7):
        straight.step(*batch("gpt", step))
        if step < 5:
            first.step(*batch("gpt", step))
    first.save(tmp_path)
    resumed = ul.Trainer.resume(tmp_path, chain=ul.cut(network("gpt"), 3, like=texts()[0]))
    assert resumed.credit == first.credit
    for step in range(5, 7):
        resumed.step(*batch("gpt", step))
    assert_same(state(straight), state(resumed))


def test_of_the_private_head_only_the_projection_is_more() -> None:
    count = {}
    for name in ("unembedding", "shared-unembedding"):
        head = session("gpt", ul.credit.DGL(name, None)).chains[0][0].head
        count[name] = sum(x.numel() for x in head.parameters())
    assert count == {"unembedding": 2 * WIDTH + VOCABULARY * WIDTH, "shared-unembedding": 2 * WIDTH}


def test_both_cost_the_projection_and_say_so() -> None:
    for name in ("unembedding", "shared-unembedding"):
        (report, *_) = session("gpt", ul.credit.DGL(name, None)).heads
        assert report.flops == 2 * 2 * CONTEXT * WIDTH * VOCABULARY  # the example has two sequences
        with pytest.raises(HeadTooLarge, match=rf"output projection alone \({WIDTH} → {VOCABULARY}\), .* exceeds it"):
            session("gpt", ul.credit.DGL(name, 0.01))


# ---- refusals --------------------------------------------------------------------------------------------------------


def rows(*widths: int, last: nn.Module | None = None) -> nn.Sequential:
    parts: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        parts += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*parts[:-1], *([] if last is None else [last]))


@pytest.mark.parametrize(
    ("model", "x", "says"),
    [
        (rows(5, 6, 7, 3), torch.randn(4, 5), "width of the last stage's projection, 7; this stage gives 6"),
        (rows(5, 7, 7, 3, last=nn.Tanh()), torch.randn(4, 5), "does not end in an nn.Linear"),
        (ul.models.cnn((1, 8, 8), 3, width=4), torch.randn(4, 1, 8, 8), "needs tokens .* but this stage gives maps"),
    ],
)
def test_what_cannot_be_shared_is_refused(model: nn.Module, x: Tensor, says: str) -> None:
    with pytest.raises(InvalidChoice, match=says):
        ul.Trainer(ul.cut(model, 3, like=x), credit=ul.credit.DGL("shared-unembedding", None), optimizer=momentum)


def test_a_shared_unembedding_belongs_to_a_chain_and_waits_for_whole_steps() -> None:
    with pytest.raises(InvalidChoice, match="built for a stage of a chain only"):
        HEADS["shared-unembedding"].make(torch.randn(2, 3, WIDTH), VOCABULARY, True)
    with pytest.raises(InvalidChoice, match="period=0; it must be at least 1"):
        SharedUnembeddingHead(0)


def test_the_private_one_is_the_linear_head_without_a_bias() -> None:
    x = torch.randn(2, 3, WIDTH)
    own, linear = (spec.make(x, VOCABULARY, True) for spec in (UnembeddingHead(), LinearHead()))
    shapes = [[tuple(p.shape) for p in head.parameters()] for head in (own, linear)]
    assert [*shapes[0], (VOCABULARY,)] == shapes[1]
    assert own[-1].weight.std() < 0.03 < linear[-1].weight.std()  # a GPT's start, normal(0, 0.02)


@pytest.mark.parametrize("credit", ["dgl(head=shared-unembedding,budget=None)", "predsim(budget=None)"])
def test_the_command_line_trains_a_gpt_locally(credit: str, tmp_path: Any, capsys: Any) -> None:
    (tmp_path / "text").write_bytes(bytes(range(32, 120)) * 20)
    words = f"train --data text:{tmp_path}/text --model gpt --stages 2 --epochs 1 --batch-size 16 --json --run {tmp_path}/run"
    options = ["--model-options", "layers=1", "width=8", "heads=2", "--context", "16", "--credit", credit]
    assert main([*words.split(), *options]) == 0, capsys.readouterr()
