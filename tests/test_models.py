"""The model zoo: pieces compose to the model bit for bit, sizes follow formulas, recipes rebuild, errors are clear."""

from __future__ import annotations

import copy
import itertools
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from unlocked import costs, models
from unlocked.errors import CannotCut, InvalidChoice
from unlocked.models import Piece, pieces_of

SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"input_shape": (2, 3), "options": {"width": 7, "depth": 2, "norm": True}},
    "cnn": {"input_shape": (1, 8, 8), "options": {"width": 4, "depth": 3}},
    "vgg6a": {"input_shape": (3, 8, 8), "options": {"width": 1 / 32, "activation": "leaky_relu"}},
    "vgg8b": {"input_shape": (1, 28, 28), "options": {"width": 1 / 32}},
    "vgg16a": {"input_shape": (1, 32, 32), "options": {"width": 1 / 32}},
    "vgg19a": {"input_shape": (2, 32, 32), "options": {"width": 1 / 64}},
    "resnet18": {"input_shape": (3, 8, 8), "options": {"width": 1 / 16}},
    "resnet110": {"input_shape": (1, 9, 9), "options": {"width": 1 / 8, "stem": "stl"}},
    "resnet32": {"input_shape": (2, 8, 8), "options": {"width": 0.25, "skip": False}},
    "resnet50": {"input_shape": (3, 32, 32), "options": {"width": 1 / 16, "stem": "large"}},
    "resnet34": {"input_shape": (1, 5, 8), "options": {"width": 1 / 32}},
    "gpt": {"input_shape": (10,), "options": {"width": 8, "heads": 2, "layers": 2}},
    "vit": {"input_shape": (3, 8, 4), "options": {"width": 8, "heads": 2, "layers": 2}},
    "revresnet18": {"input_shape": (3, 8, 8), "options": {"width": 1 / 16}},
    "revresnet34": {"input_shape": (1, 5, 8), "options": {"width": 1 / 32}},
    "revresnet50": {"input_shape": (3, 32, 32), "options": {"width": 1 / 16, "stem": "large"}},
    "revgpt": {"input_shape": (10,), "options": {"width": 8, "heads": 2, "layers": 2}},
    "revvit": {"input_shape": (3, 8, 4), "options": {"width": 8, "heads": 2, "layers": 2}},
}
TEXT = ("gpt", "revgpt")


def small(name: str) -> models.Layered:
    torch.manual_seed(0)
    return models.build(name, input_shape=SMALL[name]["input_shape"], classes=5, **SMALL[name]["options"])


def sample(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (3, *SMALL[name]["input_shape"])
    if name in TEXT:
        return torch.randint(0, 5, shape, generator=generator)
    return torch.randn(shape, generator=generator, dtype=dtype)


def parts_of(model: nn.Module) -> list[Piece]:
    pieces = pieces_of(model)
    assert pieces is not None and all(isinstance(piece, Piece) for piece in pieces)
    return pieces


def compose(model: nn.Module, x: Tensor) -> Tensor:
    for piece in parts_of(model):
        x = piece.module(x)
    return x


def same_run(model: nn.Module, x: Tensor, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """In train and in eval mode: same output, same gradients, same buffers afterwards, all bit for bit."""
    for training in (True, False):
        whole, cut = copy.deepcopy(model).train(training), copy.deepcopy(model).train(training)
        wanted, found = call(whole, x), compose(cut, x)
        assert torch.equal(wanted, found)
        wanted.square().sum().backward()
        found.square().sum().backward()
        for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            assert a.grad is None or b.grad is None or torch.equal(a.grad, b.grad)
        for before, after in zip(whole.buffers(), cut.buffers(), strict=True):
            assert torch.equal(before, after)


def test_every_model_is_listed_here() -> None:
    assert models.names() == sorted(SMALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(SMALL))
def test_pieces_compose_to_the_model(name: str, dtype: torch.dtype) -> None:
    model = small(name).to(dtype)
    x = sample(name, dtype)
    same_run(model, x, lambda whole, inputs: whole(inputs))
    output = model(x)
    assert output.dtype == dtype
    assert output.shape == ((3, 10, 5) if name in TEXT else (3, 5))
    assert output.isfinite().all()


@pytest.mark.parametrize("name", sorted(SMALL))
def test_state_dict_is_the_pieces_state_dicts_with_their_names(name: str) -> None:
    model = small(name)
    pieces = parts_of(model)
    keys = [f"{piece.name}.{key}" for piece in pieces for key in piece.module.state_dict()]
    assert keys == list(model.state_dict())
    every = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    assert len(every) == len(set(every))
    for piece in pieces:
        assert model.get_submodule(piece.name) is piece.module


def test_names_are_natural() -> None:
    assert "blocks.3.conv1.weight" in small("resnet18").state_dict()
    assert {"stem.0.weight", "classifier.weight"} <= set(small("resnet18").state_dict())
    assert "blocks.0.conv.weight" in small("vgg8b").state_dict()


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_deep_copy_has_its_own_pieces(name: str) -> None:
    model = small(name).eval()
    x = sample(name)
    before = model(x)
    twin = copy.deepcopy(model)
    assert twin.recipe == model.recipe and twin.recipe is not model.recipe
    assert torch.equal(twin(x), before)
    theirs = {id(module) for module in twin.modules()}
    assert all(id(piece.module) in theirs for piece in parts_of(twin))
    with torch.no_grad():
        for piece in parts_of(twin):
            for parameter in piece.module.parameters():
                parameter.zero_()
    assert twin(x).abs().max() == 0
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_recipe_survives_json_and_rebuilds_the_same_model(name: str) -> None:
    model = small(name)
    torch.manual_seed(0)
    again = models.from_recipe(json.loads(json.dumps(model.recipe)))
    assert again.recipe == model.recipe
    assert set(model.recipe["options"]) == set(models.options(name))
    assert torch.equal(again.eval()(sample(name)), model.eval()(sample(name)))
    torch.manual_seed(0)
    direct = getattr(models, name)(SMALL[name]["input_shape"], 5, **SMALL[name]["options"])
    assert direct.recipe == model.recipe
    assert all(torch.equal(a, b) for a, b in zip(direct.parameters(), model.parameters(), strict=True))


# ---- nn.Sequential


class Doubled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def leaves(width: int) -> st.SearchStrategy[nn.Module]:
    def linear(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Linear(width, width)

    return st.integers(0, 99).map(linear) | st.builds(nn.Tanh) | st.builds(nn.BatchNorm1d, st.just(width))


trees = st.recursive(
    leaves(3),
    lambda inner: st.lists(inner, max_size=3).flatmap(
        lambda parts: st.sampled_from([nn.Sequential(*parts), Doubled(*parts)])
    ),
).map(lambda module: nn.Sequential(module))


@settings(deadline=None, max_examples=30, derandomize=True)
@given(trees)
def test_nested_sequentials_are_flattened_to_the_same_function(model: nn.Sequential) -> None:
    x = torch.linspace(-1, 1, 12).reshape(4, 3).requires_grad_()
    same_run(model, x, lambda whole, inputs: whole(inputs) + 0 * inputs)
    for piece in parts_of(model):
        assert type(piece.module) is not nn.Sequential
        assert model.get_submodule(piece.name) is piece.module
    assert [f"{name}.{key}" for name, part in parts_of(model) for key in part.state_dict()] == list(model.state_dict())


def test_sequential_corner_cases() -> None:
    shared, inner = nn.Linear(2, 2), Doubled(nn.Linear(2, 2))
    assert parts_of(nn.Sequential()) == []
    model = nn.Sequential(shared, nn.Sequential(nn.ReLU(), nn.Sequential(), shared), inner, shared)
    assert [piece.name for piece in parts_of(model)] == ["0", "1.0", "1.2", "2", "3"]
    assert [piece.module for piece in parts_of(model)] == [shared, model.get_submodule("1.0"), shared, inner, shared]
    assert pieces_of(inner) is None
    own = nn.Sequential(nn.Flatten(), nn.Sequential(small("mlp")))
    assert [piece.name for piece in parts_of(own)] == ["0", "1.0.layers.0", "1.0.layers.1", "1.0.classifier"]
    same_run(own, sample("mlp"), lambda whole, inputs: whole(inputs))


def test_other_modules_have_no_pieces_and_transformers_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # an import would now fail
    assert pieces_of(nn.Linear(2, 2)) is None
    with_child_of_that_name = nn.Module()
    with_child_of_that_name.pieces = nn.ModuleList([nn.Linear(2, 2)])
    assert pieces_of(with_child_of_that_name) is None
    assert len(parts_of(small("gpt"))) == 4


# ---- sizes


def conv_norm(inputs: int, outputs: int, kernel: int = 3) -> int:
    return inputs * outputs * kernel**2 + 2 * outputs


def basic_blocks(groups: list[int], blocks: int, first: int, skip: bool = True) -> int:
    total, inputs = 0, first
    for outputs in groups:
        total += conv_norm(inputs, outputs) + (2 * blocks - 1) * conv_norm(outputs, outputs)
        total += conv_norm(inputs, outputs, 1) if skip and inputs != outputs else 0
        inputs = outputs
    return total


def test_parameter_counts() -> None:
    def count(name: str, classes: int = 10, **options: Any) -> int:
        with torch.device("meta"):
            return costs.parameters(models.build(name, input_shape=(3, 32, 32), classes=classes, **options))

    wide, narrow = [64, 128, 256, 512], [16, 32, 64]
    assert count("resnet18") == 11_173_962 == conv_norm(3, 64) + basic_blocks(wide, 2, 64) + 5_130
    assert count("resnet18", skip=False) == conv_norm(3, 64) + basic_blocks(wide, 2, 64, skip=False) + 5_130
    assert count("resnet32") == conv_norm(3, 16) + basic_blocks(narrow, 5, 16) + 650
    # He et al.'s option A has no projections: 464,154, the commonly quoted size
    assert count("resnet32") - conv_norm(16, 32, 1) - conv_norm(32, 64, 1) == 464_154
    assert count("resnet32") == 466_906
    assert (
        count("resnet34")
        == conv_norm(3, 64)
        + sum(
            basic_blocks([outputs], blocks, inputs)
            for inputs, outputs, blocks in [(64, 64, 3), (64, 128, 4), (128, 256, 6), (256, 512, 3)]
        )
        + 5_130
    )
    assert count("resnet50") == 23_520_842
    # the well-known ImageNet sizes
    assert count("resnet18", 1000, stem="large") == 11_689_512
    assert count("resnet34", 1000, stem="large") == 21_797_672
    assert count("resnet50", 1000, stem="large") == 25_557_032

    def vgg(channels: list[int], flat: int) -> int:
        convolutions = sum(conv_norm(a, b) for a, b in itertools.pairwise([3, *channels]))
        return convolutions + flat * 1024 + 2 * 1024 + 1024 * 10 + 10

    assert count("vgg6a") == vgg([128, 256, 512, 512], 512 * 4 * 4)  # 8192 features, as in Patel's thesis
    assert count("vgg8b") == vgg([128, 256, 256, 512, 512, 512], 512 * 2 * 2)
    assert count("mlp", width=50, depth=3) == 3072 * 50 + 50 + 2 * (50 * 50 + 50) + 50 * 10 + 10
    assert (
        count("cnn", width=8, depth=3) == sum(conv_norm(*pair) for pair in [(3, 8), (8, 8), (8, 16), (16, 16)]) + 170
    )  # stem, three blocks, 16 → 10


@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 40), st.integers(1, 60))
def test_gpt_parameter_count(layers: int, heads: int, context: int, vocabulary: int) -> None:
    width = 4 * heads
    model = models.gpt((context,), vocabulary, layers=layers, width=width, heads=heads)
    wanted = (2 * vocabulary + context) * width + layers * (12 * width**2 + 13 * width) + 2 * width
    assert costs.parameters(model) == wanted


def test_number_of_pieces() -> None:
    def pieces(name: str, **options: Any) -> list[Piece]:
        with torch.device("meta"):
            return parts_of(models.build(name, input_shape=(3, 32, 32), classes=10, **options))

    assert len(pieces("resnet18")) == 1 + 8 + 1
    assert len(pieces("resnet18", skip=False)) == 1 + 16 + 1
    assert len(pieces("resnet32")) == 1 + 15 + 1
    assert len(pieces("resnet34")) == len(pieces("resnet50")) == 1 + 16 + 1
    assert len(pieces("resnet50", skip=False)) == 1 + 48 + 1
    assert len(pieces("vgg6a")) == 6
    assert len(pieces("vgg8b")) == 8
    assert len(pieces("mlp", depth=3)) == 4
    assert len(pieces("cnn", depth=5)) == 1 + 5 + 1


@pytest.mark.parametrize("depth", [1, 2, 4, 5])
def test_cnn_blocks_cost_the_same_but_the_halving_one(depth: int) -> None:
    model = models.cnn((3, 32, 32), 10, width=8, depth=depth)
    x, found = torch.zeros(2, 3, 32, 32), []
    for piece in parts_of(model):
        found.append(costs.flops(piece.module, x))
        x = costs.run_once(piece.module, x)
    unit = 2 * 2 * 9 * 8 * 8 * 32 * 32  # samples · multiply-add · kernel · channels² · pixels
    assert found[1:-1] == [unit // 2 if i == depth // 2 else unit for i in range(depth)]
    assert found[0] < unit / 2


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    st.sampled_from(["cnn", "vgg6a", "vgg8b", "resnet18", "resnet32", "resnet50"]),
    st.integers(1, 4),
    st.integers(1, 33),
    st.integers(1, 33),
)
def test_images_of_any_size_give_scores_or_a_refusal(name: str, channels: int, height: int, breadth: int) -> None:
    smallest = {"cnn": 2, "vgg6a": 8, "vgg8b": 16, "resnet18": 5, "resnet32": 3, "resnet50": 5}[name]
    width = {"cnn": 2}.get(name, 1 / 64)
    shape = (channels, height, breadth)
    if min(height, breadth) < smallest:
        with pytest.raises(InvalidChoice, match=f"at least {smallest}×{smallest} .* given {height}×{breadth}"):
            models.build(name, input_shape=shape, classes=3, width=width)
        return
    output = models.build(name, input_shape=shape, classes=3, width=width)(torch.ones(2, *shape))
    assert output.shape == (2, 3) and output.isfinite().all()


def test_width_rounds_and_never_reaches_zero() -> None:
    model = models.resnet18((3, 8, 8), 10, width=0.001)
    assert {m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)} == {1}
    assert models.resnet18((3, 8, 8), 10, width=0.3).get_parameter("stem.0.weight").shape[0] == round(64 * 0.3) == 19


def test_model_zoo_draws_he_weights() -> None:
    torch.manual_seed(0)
    weight = models.resnet18((3, 8, 8), 10, width=0.5).get_parameter("blocks.6.conv1.weight")  # 128 → 256
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.01)


# ---- references


@pytest.mark.parametrize(
    ("name", "pools"), [("vgg6a", [True, True, True, False]), ("vgg8b", [False, True, False, True, True, True])]
)
def test_vgg_is_its_formula(name: str, pools: list[bool]) -> None:
    model = models.build(name, input_shape=(3, 17, 20), classes=4, width=1 / 64).double().train()
    x = torch.randn(5, 3, 17, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    h, weights = x, model.state_dict()
    for i, pool in enumerate(pools):
        h = rectified(F.conv2d(h, weights[f"blocks.{i}.conv.weight"], padding=1))
        h = F.max_pool2d(h, 2) if pool else h
    h = rectified(h.reshape(5, -1) @ weights["hidden.linear.weight"].T)
    wanted = h @ weights["classifier.weight"].T + weights["classifier.bias"]
    torch.testing.assert_close(model(x), wanted)


def rectified(h: Tensor) -> Tensor:
    """ReLU of BatchNorm at its start (scale 1, shift 0), by its formula."""
    axes = [0, 2, 3] if h.dim() == 4 else [0]
    centred = h - h.mean(axes, keepdim=True)
    return (centred / (centred.square().mean(axes, keepdim=True) + 1e-5).sqrt()).clamp(min=0)


def test_resnet_without_shortcuts_is_its_formula() -> None:
    model = models.resnet32((2, 9, 9), 4, width=0.25, skip=False).double().train()
    x = torch.randn(4, 2, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weights = model.state_dict()
    names = ["stem.0.weight"] + [f"blocks.{i}.conv.weight" for i in range(30)]
    h = x
    for i, name in enumerate(names):
        h = rectified(F.conv2d(h, weights[name], padding=1, stride=2 if i in (11, 21) else 1))
    wanted = h.mean((2, 3)) @ weights["classifier.weight"].T + weights["classifier.bias"]
    torch.testing.assert_close(model(x), wanted)


def test_dropout_draws_only_in_training() -> None:
    for model, x in [
        (models.vgg6a((3, 8, 8), 5, width=1 / 16, dropout=0.5), torch.ones(2, 3, 8, 8)),
        (models.gpt((6,), 5, width=8, heads=2, dropout=0.5), torch.tensor([[0, 1, 2], [2, 3, 4]])),
    ]:
        with torch.no_grad():
            assert not torch.equal(model.train()(x), model(x))
            assert torch.equal(model.eval()(x), model(x))


def test_gpt_does_not_see_the_future() -> None:
    model, ids = small("gpt").double(), sample("gpt")
    before = model(ids)
    for position in range(1, 10):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % 5
        after = model(changed)
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-12)
        assert (after[:, position] - before[:, position]).abs().amax(-1).min() > 1e-6
    torch.testing.assert_close(model(ids[:, :4]), before[:, :4])  # shorter texts are fine


def test_gpt_starts_as_gpt2_does() -> None:
    torch.manual_seed(0)
    model = models.gpt((64,), layers=8, width=64)
    for name, parameter in model.named_parameters():
        if name.endswith(("attention.projection.weight", "narrow.weight")):
            assert parameter.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.1), name
        elif parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, float("norm" in name and "weight" in name))), name


# ---- refusals


@pytest.mark.parametrize(
    ("name", "shape", "options", "words"),
    [
        ("resnet81", (3, 8, 8), {}, "did you mean 'resnet18'"),
        ("resnet18", (3, 8, 8), {"widht": 1.0}, "option of resnet18 'widht'; did you mean 'width'"),
        ("resnet18", (3, 8, 8), {"width": "wide"}, "'width' must be a finite number; given 'wide'"),
        ("resnet18", (3, 8, 8), {"width": float("nan")}, "'width' must be a finite number; given nan"),
        ("resnet18", (3, 8, 8), {"width": True}, "'width' must be a finite number; given True"),
        ("resnet18", (3, 8, 8), {"width": 0}, "'width' must be greater than 0; given 0"),
        ("resnet18", (3, 8, 8), {"skip": 1}, "'skip' must be True or False; given 1"),
        ("resnet18", (3, 8, 8), {"stem": "larg"}, "did you mean 'large'"),
        ("resnet18", (3, 16, 16), {"stem": "large"}, "at least 17×17"),
        ("resnet18", (64,), {}, r"takes images, input_shape \(channels, height, width\); given \(64,\)"),
        ("cnn", (128,), {}, "Use gpt for text"),
        ("cnn", (1, 8, 8), {"depth": 0}, "'depth' must be greater than 0"),
        ("mlp", (4,), {"depth": 2.0}, "'depth' must be a whole number; given 2.0"),
        ("mlp", (4,), {"activation": "rellu"}, "did you mean 'relu'"),
        ("mlp", (4,), {"activation": 3}, "'activation' must be a word; given 3"),
        ("mlp", (), {}, "'input_shape' must be a sequence"),
        ("mlp", (4, 0), {}, "'input_shape' must be a sequence"),
        ("mlp", 4, {}, "'input_shape' must be a sequence"),
        ("vgg6a", (3, 8, 8), {"dropout": 1.0}, "'dropout' is a probability"),
        ("gpt", (3, 8, 8), {}, "takes text"),
        ("gpt", (8,), {"width": 10, "heads": 4}, "multiple of its heads; given width 10 and 4 heads"),
        ("gpt", (8,), {"dropout": -0.1}, "'dropout' is a probability"),
    ],
)
def test_refusals_are_sentences(name: str, shape: Any, options: dict, words: str) -> None:
    with pytest.raises(InvalidChoice, match=words):
        models.build(name, input_shape=shape, classes=5, **options)


def test_more_refusals() -> None:
    for classes in (0, 2.5, True):
        with pytest.raises(InvalidChoice, match="class"):
            models.build("mlp", input_shape=(4,), classes=classes)  # type: ignore[arg-type]
    with pytest.raises(InvalidChoice, match="did you mean 'gpt'"):
        models.options("gtp")
    with pytest.raises(InvalidChoice, match="has exactly the entries classes, input_shape, name, options; given name"):
        models.from_recipe({"name": "mlp"})
    for ids in (torch.zeros(2, 11, dtype=torch.long), torch.zeros(2, 4), torch.zeros(4, dtype=torch.long)):
        with pytest.raises(InvalidChoice, match="length of at most 10"):
            small("gpt")(ids)


def test_whole_numbers_are_fine_widths() -> None:
    width = models.resnet18((3, 8, 8), 10, width=1).recipe["options"]["width"]
    assert width == 1.0 and type(width) is float
    assert models.options("resnet18") == {"width": 1.0, "skip": True, "stem": "small"}


# ---- Hugging Face


def hf_gpt2(**more: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 30, "n_positions": 12, "n_embd": 8, "n_layer": 2, "n_head": 2}
    tokens = {"bos_token_id": None, "eos_token_id": None}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **tokens, **off, **more}))


def hf_llama(**more: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 12}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **more}))


def hf_vit(**more: Any) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    image = {"image_size": 8, "patch_size": 4, "num_labels": 5}
    return ViTForImageClassification(ViTConfig(**{**sizes, **image, **more}))


def hf_resnet(**more: Any) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 2], "num_labels": 5}
    return ResNetForImageClassification(ResNetConfig(**{**sizes, "layer_type": "basic", **more}))


def hf_input(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return torch.randn(3, 3, 8, 8, generator=generator)
    return torch.randint(0, 30, (3, 9), generator=generator)


HF_MODELS = [
    pytest.param(hf_gpt2, {}, 4, id="gpt2"),
    pytest.param(hf_gpt2, {"attn_implementation": "eager", "use_cache": False}, 4, id="gpt2-eager"),
    pytest.param(hf_gpt2, {"is_causal": False}, 4, id="gpt2-bidirectional"),
    pytest.param(hf_gpt2, {"tie_word_embeddings": False}, 4, id="gpt2-untied"),
    pytest.param(hf_llama, {}, 4, id="llama"),
    pytest.param(hf_llama, {"attn_implementation": "eager", "use_cache": False}, 4, id="llama-eager"),
    pytest.param(hf_vit, {}, 4, id="vit"),
    pytest.param(hf_vit, {"attn_implementation": "eager"}, 4, id="vit-eager"),
    pytest.param(hf_resnet, {}, 5, id="resnet"),
    pytest.param(hf_resnet, {"layer_type": "bottleneck", "hidden_sizes": [8, 16]}, 5, id="resnet-bottleneck"),
]


@pytest.mark.parametrize(("make", "more", "count"), HF_MODELS)
def test_hugging_face_pieces_compose_to_the_logits(make: Callable, more: dict, count: int) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = make(**more)
    x = hf_input(model)
    same_run(model, x, lambda whole, inputs: whole(inputs).logits)
    pieces = parts_of(model)
    assert len(pieces) == count == len({piece.name for piece in pieces})
    held = {id(p) for piece in pieces for p in piece.module.parameters()}
    assert held == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("make", [hf_gpt2, hf_llama, hf_vit, hf_resnet])
def test_a_hugging_face_piece_can_be_copied_alone(make: Callable) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = make().eval()
    x = hf_input(model)
    twins = []
    for piece in parts_of(model):
        assert all(part.training == model.training for part in piece.module.modules())
        twins.append(copy.deepcopy(piece.module))
    wanted = model(x).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for twin in twins:
        x = twin(x)
    assert torch.equal(x, wanted) and wanted.abs().max() > 0


def test_other_hugging_face_models_have_no_pieces_and_other_versions_are_refused() -> None:
    transformers = pytest.importorskip("transformers")
    assert pieces_of(transformers.GPT2Model(hf_gpt2().config)) is None
    strange = hf_llama()
    del strange.model.norm
    with pytest.raises(CannotCut, match=r"LlamaForCausalLM of transformers .* not built as expected"):
        parts_of(strange)


def test_gpt_is_hugging_faces_gpt2() -> None:
    pytest.importorskip("transformers")
    theirs = hf_gpt2(tie_word_embeddings=False, n_embd=12, n_head=3).double().eval()
    ours = models.gpt((12,), 30, layers=2, width=12, heads=3).double().eval()
    renames = {"transformer.": "", "wte": "embedding.tokens", "wpe": "embedding.positions", "h.": "blocks."}
    renames |= {"ln_f": "output.norm", "lm_head": "output.projection", "ln_1": "norm1", "ln_2": "norm2"}
    renames |= {"attn.c_attn": "attention.qkv", "attn.c_proj": "attention.projection"}
    renames |= {"mlp.c_fc": "widen", "mlp.c_proj": "narrow"}
    weights = {}
    for name, weight in theirs.state_dict().items():
        transposed = weight.T if ".c_" in name and weight.dim() == 2 else weight  # their Conv1D keeps (in, out)
        for old, new in renames.items():
            name = name.replace(old, new)
        weights[name] = transposed + 0.1 * torch.randn_like(transposed)
        weight.copy_(weights[name].T if transposed is not weight else weights[name])
    ours.load_state_dict(weights)
    ids = torch.randint(0, 30, (3, 12), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(ids), theirs(ids).logits)


@pytest.mark.parametrize(
    ("name", "kind", "depths"), [("resnet18", "basic", [2] * 4), ("resnet50", "bottleneck", [3, 4, 6, 3])]
)
def test_resnet_is_hugging_faces_resnet(name: str, kind: str, depths: list[int]) -> None:
    pytest.importorskip("transformers")
    sizes = [4, 8, 16, 32] if kind == "basic" else [16, 32, 64, 128]
    torch.manual_seed(0)
    theirs = hf_resnet(embedding_size=4, hidden_sizes=sizes, depths=depths, layer_type=kind).double()
    ours = models.build(name, input_shape=(3, 33, 33), classes=5, width=1 / 16, stem="large").double()
    with torch.no_grad():
        for mine, other in zip(parts_of(ours), parts_of(theirs), strict=True):
            copy_residual_weights(mine.module, other.module)
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(x), theirs(x).logits)


def copy_residual_weights(mine: nn.Module, other: nn.Module) -> None:
    """Their blocks list the shortcut first, ours last; apart from that the parameters come in the same order."""
    named = list(other.named_parameters())
    named.sort(key=lambda pair: pair[0].startswith("shortcut"))
    for target, (_, source) in zip(mine.parameters(), named, strict=True):
        source.add_(0.1 * torch.randn_like(source))
        target.copy_(source)
