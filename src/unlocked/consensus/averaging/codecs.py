"""How a row of values travels: as it is, or in fewer bytes (`compression=` of the rules that average).

    none         as it is                                                    Plain
    bf16         rounded to bfloat16: 2 bytes per value                      BF16
    int8         1 byte per value and 4 per block of 256; int8:512           Int8
    topk         1 % of the values, with their places; topk:0.05             TopK
    error feedback (Seide et al., 2014; Karimireddy et al., 2019): what a codec dropped is added to the next row

A payload is what a codec makes of a row: a few tensors, which `pack` lays into one message of bytes. The formulas are in
rules/compression.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from ...errors import InvalidChoice, UnlockedError, choose
from ...rules.compression import kept, largest_entries, quantised, restored, wide, with_feedback

_INT32_ENDS = 2**31  # places from here on need int64


class Codec(ABC):
    """How a row of values travels. Subclasses are frozen dataclasses.

    lossless: what arrives is what was sent. biased: it converges only with error feedback.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool] = False
    biased: ClassVar[bool] = False

    @abstractmethod
    def encode(self, row: Tensor, source: Generator | None = None) -> list[Tensor]:
        """The payload of a row (k,) of floats. It may be the row itself, so do not write to that afterwards.

        source: where a codec that rounds at random draws from; a CPU generator, on every device.
        """

    @abstractmethod
    def decode(self, payload: Sequence[Tensor], like: Tensor) -> Tensor:
        """The row (k,). It may be a tensor of the payload.

        like: any row of that length and type, on the device where the result is to be; if it is on device "meta", the result
        is where the payload is.
        """

    @abstractmethod
    def empty(self, row: Tensor) -> list[Tensor]:
        """The payload's shapes and types on device "meta", of a row of which only the shape and the type are looked at."""


@dataclass(frozen=True)
class Plain(Codec):
    """As it is: any type, also whole numbers."""

    name: ClassVar[str] = "none"
    lossless: ClassVar[bool] = True

    def encode(self, row: Tensor, source: Generator | None = None) -> list[Tensor]:
        return [row.detach()]

    def decode(self, payload: Sequence[Tensor], like: Tensor) -> Tensor:
        (row,) = _there(payload, like)
        return row

    def empty(self, row: Tensor) -> list[Tensor]:
        return [_meta(row.numel(), row.dtype)]


@dataclass(frozen=True)
class BF16(Codec):
    """Rounded to bfloat16 (8 bits of precision, float32's range), to nearest even.

    As in torch, float64 goes through float32: a value within 2⁻²⁴ of a tie may go to the tie's other side.
    """

    name: ClassVar[str] = "bf16"

    def encode(self, row: Tensor, source: Generator | None = None) -> list[Tensor]:
        return [_floats(row, self).to(torch.bfloat16)]

    def decode(self, payload: Sequence[Tensor], like: Tensor) -> Tensor:
        (row,) = _there(payload, like)
        return row.to(like.dtype)

    def empty(self, row: Tensor) -> list[Tensor]:
        return [_meta(row.numel(), torch.bfloat16)]


@dataclass(frozen=True)
class Int8(Codec):
    """Rounded to 255 levels between the largest magnitude of a block and its negative.

    A block with a value that is no finite float32 arrives as NaN.

    Args:
        block: values per block, at least 1; each costs 4 bytes more.
        stochastic: round up or down at random so that the mean is exact; `encode` then needs a source.
    """

    block: int = 256
    stochastic: bool = False

    name: ClassVar[str] = "int8"

    def __post_init__(self) -> None:
        if self.block < 1:
            raise InvalidChoice(f"block={self.block} holds no value; give a whole number of at least 1 (usual: 256).")

    def encode(self, row: Tensor, source: Generator | None = None) -> list[Tensor]:
        return list(quantised(_floats(row, self), self.block, self._uniform(row, source)))

    def decode(self, payload: Sequence[Tensor], like: Tensor) -> Tensor:
        largest, codes = _there(payload, like)
        return restored(largest, codes, self.block, like.dtype)

    def empty(self, row: Tensor) -> list[Tensor]:
        count = row.numel()
        return [_meta(-(-count // self.block), torch.float32), _meta(count, torch.int8)]

    def _uniform(self, row: Tensor, source: Generator | None) -> Tensor | None:
        if not self.stochastic:
            return None
        if source is None:
            raise InvalidChoice(
                "Int8(stochastic=True) rounds at random; give encode a generator (rng.generator(seed, what, where, when))."
            )
        return torch.rand(row.numel(), dtype=wide(row.dtype), generator=source).to(row.device)


@dataclass(frozen=True)
class TopK(Codec):
    """The entries of largest magnitude, and where they are. The others arrive as zero, so use it with error feedback.

    Args:
        share: which part of the entries travels, above 0 and at most 1; one at least.
    """

    share: float = 0.01

    name: ClassVar[str] = "topk"
    biased: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise InvalidChoice(f"share={self.share} is no share; give a number above 0 and at most 1 (usual: 0.01).")

    def encode(self, row: Tensor, source: Generator | None = None) -> list[Tensor]:
        row = _floats(row, self)
        where = largest_entries(row, kept(row.numel(), self.share))
        return [row[where], where.to(_places(row.numel()))]

    def decode(self, payload: Sequence[Tensor], like: Tensor) -> Tensor:
        values, where = _there(payload, like)
        row = torch.zeros(like.numel(), dtype=like.dtype, device=values.device)
        return row.index_copy_(0, where.long(), values.to(like.dtype))

    def empty(self, row: Tensor) -> list[Tensor]:
        k = kept(row.numel(), self.share)
        return [_meta(k, row.dtype), _meta(k, _places(row.numel()))]


def codec(given: str | Codec) -> Codec:
    """The codec of a text: none, bf16, int8, int8:512 (values per block), topk, topk:0.01 (share). Raises InvalidChoice."""
    if isinstance(given, Codec):
        return given
    if not isinstance(given, str):
        raise InvalidChoice(f"{given!r} is no compression; give one of none, bf16, int8, int8:512, topk:0.01.")
    name, colon, number = given.partition(":")
    choose("compression", name, ("none", "bf16", "int8", "topk"))
    if name in ("none", "bf16"):
        if colon:
            raise InvalidChoice(f"compression {given!r} has a number, but {name} takes none; write {name}.")
        return Plain() if name == "none" else BF16()
    if not colon:
        return Int8() if name == "int8" else TopK()
    try:
        return Int8(int(number)) if name == "int8" else TopK(float(number))
    except ValueError as error:  # the codecs' own refusals are among them
        wanted = (
            "values per block, as in int8:512" if name == "int8" else "a share above 0 and at most 1, as in topk:0.01"
        )
        raise InvalidChoice(f"compression {given!r} cannot be used; after the colon give {wanted}.") from error


# ---- messages --------------------------------------------------------------------------------------------------------


def payload_bytes(payload: Sequence[Tensor]) -> int:
    """Bytes of a payload, and of the message that `pack` makes of it."""
    return sum(x.numel() * x.element_size() for x in payload)


def pack(payload: Sequence[Tensor]) -> Tensor:
    """One message of bytes (b,) uint8, b = `payload_bytes`. A payload of one tensor is not copied.

    Tensors of wider types come first, so that each begins where its type may begin, without gaps.
    """
    parts = [payload[k].reshape(-1).contiguous().view(torch.uint8) for k in _widest_first(payload)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def unpack(message: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The payload: views of the message (b,) uint8, if that begins where its widest type may begin; else of a copy.

    like: tensors of the payload's shapes and types (`Codec.empty`). Raises UnlockedError if the message has another length.
    """
    if message.numel() != payload_bytes(like):
        raise UnlockedError(
            f"A message of {message.numel()} bytes came where one of {payload_bytes(like)} was expected; "
            "all replicas must use the same compression on rows of the same length and type."
        )
    order = _widest_first(like)
    found: list[Tensor] = list(like)
    for k, part in zip(order, _aligned(message, like).split([payload_bytes([like[k]]) for k in order])):
        found[k] = part.view(like[k].dtype).view(like[k].shape)
    return found


def _widest_first(payload: Sequence[Tensor]) -> list[int]:
    return sorted(range(len(payload)), key=lambda k: -payload[k].element_size())


def _aligned(message: Tensor, like: Sequence[Tensor]) -> Tensor:
    width = max((x.element_size() for x in like), default=1)
    begins = message.storage_offset() % width or (0 if message.is_meta else message.data_ptr() % width)
    return message.clone() if begins or not message.is_contiguous() else message


# ---- error feedback --------------------------------------------------------------------------------------------------


class ErrorFeedback:
    """Sends rows by a codec; what it drops of a row is added to the next one of the same name."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self._owed: dict[str, Tensor] = {}

    def send(self, name: str, row: Tensor, source: Generator | None = None) -> list[Tensor]:
        """The payload of a row (k,) and of what is still owed under this name.

        Raises UnlockedError if the row is not as long as the one before. source: see `Codec.encode`.
        """
        if self.codec.lossless:
            return self.codec.encode(row, source)
        payload, self._owed[name] = with_feedback(
            row,
            self._before(name, row),
            lambda wanted: self.codec.encode(wanted, source),
            lambda sent: self.codec.decode(sent, row),
        )
        return payload

    def _before(self, name: str, row: Tensor) -> Tensor | None:
        owed = self._owed.get(name)
        if owed is None:
            return None
        if owed.shape != row.shape:
            raise UnlockedError(
                f"Under the name {name!r} a row of {row.numel()} values follows one of {owed.numel()}; "
                "give rows of different length different names."
            )
        return owed.to(row.device, wide(row.dtype))

    def carried(self) -> dict[str, Any]:
        """What is owed, by name, for a checkpoint; see `Weights.carried`."""
        return dict(self._owed)

    def load_carried(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        self._owed = dict(state)


# ---- pieces ----------------------------------------------------------------------------------------------------------


def _there(payload: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """The payload on the device of `like`, if that is one that holds values."""
    return [x if like.is_meta else x.to(like.device) for x in payload]


def _floats(row: Tensor, codec: Codec) -> Tensor:
    if not row.dtype.is_floating_point:
        raise InvalidChoice(f"{codec.name} compresses floating-point values; given {row.dtype}. Use compression none.")
    return row.detach()


def _places(count: int) -> torch.dtype:
    """The type of places in a row of `count` values."""
    return torch.int32 if count < _INT32_ENDS else torch.int64


def _meta(count: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(count, dtype=dtype, device="meta")
