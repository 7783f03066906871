"""Slices of our own models' blocks, for `narrow`.

    ResidualBlock      convolutions and norms as anywhere; the identity shortcut of a module's first block takes slice g of the
                       dense input, a 1×1 shortcut is dense there and grouped later
    Block (gpt, vit)   heads/G attention heads, D/G channels of the residual stream and of its LayerNorms, 4·D/G of the MLP.
                       In a module's first block norm1 is over all D channels and q, k, v read them all; its residual is
                       slice g. From there on the group has D/G channels: norm2 and all later norms are over D/G.

The MLP of a first block cannot be dense: its input is the group's own sum, and groups meet at boundaries only.
"""

from __future__ import annotations

from torch import Tensor, cat, nn

from ..models.blocks import ConvBlock, DenseBlock
from ..models.resnet import ResidualBlock
from ..models.transformer import Attention, Block
from .slicing import CannotDivide, Share, SliceOf, hollow, narrow, sliced, thread


@narrow.register
def _conv_block(module: ConvBlock, share: Share, name: str) -> nn.Module:
    return thread(module, ("conv", "norm", "activation", "dropout", "pool"), share, name)


@narrow.register
def _dense_block(module: DenseBlock, share: Share, name: str) -> nn.Module:
    return thread(module, ("linear", "norm", "activation", "dropout"), share, name)


@narrow.register
def _residual_block(module: ResidualBlock, share: Share, name: str) -> nn.Module:
    row = [f"{kind}{index}" for index in range(1, module.depth + 1) for kind in ("conv", "norm")]
    twin = thread(module, row, share, name)
    if isinstance(module.shortcut, nn.Identity):
        twin.shortcut = _residual(module.conv1.in_channels, share, name)  # type: ignore[union-attr, arg-type]
    else:
        twin.shortcut = narrow(module.shortcut, share, f"{name}.shortcut")
    return twin


@narrow.register
def _attention(module: Attention, share: Share, name: str) -> nn.Module:
    if module.heads % share.groups:
        raise CannotDivide(name, module.heads, "attention heads", share.groups)
    width = module.projection.in_features
    rows, columns = share.rows(width, name), share.columns(width, name)

    def of_each(qkv: Tensor) -> Tensor:
        return cat([part[rows] for part in qkv.chunk(3)])

    twin = hollow(module)
    twin.heads = module.heads // share.groups
    twin.qkv = hollow(module.qkv)
    sliced(twin.qkv, "weight", of_each(module.qkv.weight)[:, columns], share.scale)
    sliced(twin.qkv, "bias", of_each(module.qkv.bias))
    twin.qkv.out_features, twin.qkv.in_features = twin.qkv.weight.shape
    twin.projection = narrow(module.projection, share.inside, f"{name}.projection")  # type: ignore[assignment]
    return twin


@narrow.register
def _block(module: Block, share: Share, name: str) -> nn.Module:
    twin = thread(module, ("norm1", "attention", "norm2", "widen", "narrow", "dropout"), share, name)
    twin.residual = _residual(module.widen.in_features, share, name)
    return twin


def _residual(channels: int, share: Share, name: str) -> nn.Module:
    """What a block adds its branch to: all that a group has, or the group's slice where the input is whole."""
    if not share.dense or share.groups == 1:
        return nn.Identity()
    rows = share.rows(channels, name)
    return SliceOf(rows.start, rows.stop)
