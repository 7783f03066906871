"""Pieces of four Hugging Face models, without copying them: each piece holds the model's own submodules.

Known are GPT2LMHeadModel, LlamaForCausalLM, ViTForImageClassification and ResNetForImageClassification as built by
transformers 5. The composition of the pieces is `model(x).logits` without padding mask, key-value cache or labels.
Nothing is imported from transformers unless the model comes from there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CannotCut
from .pieces import Piece


def huggingface_pieces(model: nn.Module) -> list[Piece] | None:
    """The pieces of a supported Hugging Face model, None for any other model.

    Raises CannotCut if the installed version of transformers builds the model from other parts than those known here.
    """
    kind = type(model)
    if not kind.__module__.startswith("transformers.") or kind.__name__ not in _PIECES:
        return None
    try:
        return _PIECES[kind.__name__](model)
    except AttributeError as missing:
        import transformers

        raise CannotCut(
            f"{kind.__name__} of transformers {transformers.__version__} is not built as expected ({missing}). "
            "Use a 5.x version near 5.23, or give your model a method pieces() that lists its parts."
        ) from missing


class TokenEmbedding(nn.Module):
    """GPT-2's start: token plus position embedding, dropout. int (B, T) → (B, T, D)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.wte, self.wpe, self.drop = model.wte, model.wpe, model.drop

    def forward(self, ids: Tensor) -> Tensor:
        """int (B, T) → (B, T, D)."""
        return self.drop(self.wte(ids) + self.wpe(_positions(ids)))


class CausalBlock(nn.Module):
    """One GPT-2 block with its causal mask. (B, T, D) → (B, T, D)."""

    def __init__(self, block: nn.Module, config: Any) -> None:
        super().__init__()
        self.block, self.config = block, config

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        return self.block(x, attention_mask=_causal_mask(self.config, x), **_causality(self.config))


class RotaryBlock(CausalBlock):
    """One Llama layer with its causal mask and rotary positions. (B, T, D) → (B, T, D)."""

    def __init__(self, block: nn.Module, config: Any, rotary: nn.Module) -> None:
        super().__init__(block, config)
        self.rotary = rotary

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        positions = _positions(x)
        return self.block(
            x,
            attention_mask=_causal_mask(self.config, x),
            position_ids=positions,
            position_embeddings=self.rotary(x, position_ids=positions),
            **_causality(self.config),
        )


class ImageEmbedding(nn.Module):
    """ViT's start: patches, class token, positions, in the weights' dtype. (B, C, H, W) → (B, 1 + patches, D)."""

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) → (B, 1 + patches, D)."""
        return self.embeddings(pixels.to(self.embeddings.patch_embeddings.projection.weight.dtype))


class NormAndHead(nn.Module):
    """Final norm and output layer. (B, T, D) → (B, T, V), or (B, classes) if only the first token is read."""

    def __init__(self, norm: nn.Module, head: nn.Module, first_token: bool = False) -> None:
        super().__init__()
        self.norm, self.head, self.first_token = norm, head, first_token

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, V) or (B, classes)."""
        h = self.norm(x)
        return self.head(h[:, 0, :] if self.first_token else h)


def _gpt2(model: Any) -> list[Piece]:
    body = model.transformer
    blocks = [(f"transformer.h.{i}", CausalBlock(block, body.config)) for i, block in enumerate(body.h)]
    return _in_mode_of(
        model,
        ("transformer.wte", TokenEmbedding(body)),
        *blocks,
        ("lm_head", NormAndHead(body.ln_f, model.lm_head)),
    )


def _llama(model: Any) -> list[Piece]:
    body = model.model
    layers = body.layers[: body.config.num_hidden_layers]
    blocks = [(f"model.layers.{i}", RotaryBlock(layer, body.config, body.rotary_emb)) for i, layer in enumerate(layers)]
    return _in_mode_of(
        model,
        ("model.embed_tokens", body.embed_tokens),
        *blocks,
        ("lm_head", NormAndHead(body.norm, model.lm_head)),
    )


def _vit(model: Any) -> list[Piece]:
    body = model.vit
    return _in_mode_of(
        model,
        ("vit.embeddings", ImageEmbedding(body.embeddings)),
        *((f"vit.layers.{i}", layer) for i, layer in enumerate(body.layers)),
        ("classifier", NormAndHead(body.layernorm, model.classifier, first_token=True)),
    )


def _resnet(model: Any) -> list[Piece]:
    body = model.resnet
    blocks = [
        (f"resnet.encoder.stages.{i}.layers.{k}", layer)
        for i, stage in enumerate(body.encoder.stages)
        for k, layer in enumerate(stage.layers)
    ]
    return _in_mode_of(
        model,
        ("resnet.embedder", body.embedder),
        *blocks,
        ("classifier", nn.Sequential(body.pooler, model.classifier)),
    )


_PIECES: dict[str, Callable[[Any], list[Piece]]] = {
    "GPT2LMHeadModel": _gpt2,
    "LlamaForCausalLM": _llama,
    "ViTForImageClassification": _vit,
    "ResNetForImageClassification": _resnet,
}


def _in_mode_of(model: nn.Module, *named: tuple[str, nn.Module]) -> list[Piece]:
    """The pieces, each wrapper (not what it holds) in the model's train or eval mode."""
    held = {id(part) for part in model.modules()}
    for _, module in named:
        if id(module) not in held:
            module.training = model.training
    return [Piece(name, module) for name, module in named]


def _positions(x: Tensor) -> Tensor:
    """0, 1, ..., T-1 as (1, T)."""
    return torch.arange(x.shape[1], device=x.device).unsqueeze(0)


def _causal_mask(config: Any, x: Tensor) -> Any:
    """The mask that this version of transformers makes for the model's attention implementation (often None)."""
    from transformers.masking_utils import create_causal_mask

    return create_causal_mask(config=config, inputs_embeds=x, attention_mask=None, past_key_values=None)


def _causality(config: Any) -> dict[str, bool]:
    """What the model hands to each block if its user has set `config.is_causal` (the mask alone may be None)."""
    causal = getattr(config, "is_causal", None)
    return {} if causal is None else {"is_causal": causal}
