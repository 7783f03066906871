"""Data sets by a short text: `digits`, `parquet:DIR`, `folder:DIR`, `text:FILE`."""

from __future__ import annotations

from importlib import import_module
from urllib.parse import parse_qsl

from ..errors import BadData, InvalidChoice, choose
from . import augment as augmentation
from . import text
from .dataset import Data
from .images import check_size
from .split import Raw, stratified_order
from .tensors import from_tensors

_READERS = ("digits", "parquet", "folder")  # the modules that read images


def load(
    spec: str,
    *,
    augment: str | None = None,
    subset: int | None = None,
    context: int = 128,
    seed: int = 0,
    size: int | None = None,
) -> tuple[Data, Data]:
    """The training and the test set that `spec` names; images are decoded into memory once.

    - `digits`: scikit-learn's 1797 images of 8×8 pixels, split 80/20 in a fixed way.
    - `parquet:DIR`: train*.parquet and test*.parquet (or validation*, valid*) in DIR or DIR/data, an image column `img`
      or `image` and an integer column `label`; `parquet:DIR?label=fine_label&image=picture` names others. Without labels:
      `parquet:DIR?label=none` (unlabel*.parquet, else train*.parquet), split 80/20 if there are no test files.
    - `folder:DIR`: DIR/train/CLASS/*.png (jpg, …) and DIR/test/CLASS/*; or DIR/CLASS/*, split 80/20 in a fixed way. Without
      labels: `folder:DIR?labels=none`, all images below DIR/train and DIR/test at any depth; or below DIR, split 80/20.
    - `text:FILE`: byte-level language modelling; samples are windows of `context` bytes.

    `augment`: see `augment.parse`; only the training set gets it. `subset=n`: the first n samples of a stratified
    shuffle of the training set, drawn from `seed` (its only use), so subset 100 is part of subset 200; of a text, the
    first n windows. `size`: images are resized to size×size pixels. The normalisation comes from the training samples
    in use and serves both sets. Raises BadData, in a sentence, for whatever cannot be read as described, and
    InvalidChoice for an unknown augmentation.
    """
    scheme, place, options = _parsed(spec)
    augmentation.parse(augment)  # refused before minutes of decoding, not after
    check_size(size)
    if scheme == "text":
        if augmentation.parse(augment) or size is not None or options:
            raise BadData("A text has neither size nor augmentation nor options; leave them out.")
        return text.read(place, context, subset)
    raw: Raw = import_module(f".{scheme}", __package__).read(place, options, size)  # now: pyarrow takes long to import
    _check_labels(raw)
    return _images(raw, augment, subset, seed)


def _images(raw: Raw, augment: str | None, subset: int | None, seed: int) -> tuple[Data, Data]:
    x, y, classes = raw.train_x, raw.train_y, max(1, int(raw.train_y.max()) + 1)
    if subset is not None:
        if not 1 <= subset <= len(y):
            raise BadData(f"subset is {subset}, but the training set has {len(y)} samples; give 1 to {len(y)}.")
        chosen = stratified_order(y, "subset", seed)[:subset]
        x, y = x[chosen], y[chosen]
    train = from_tensors(x, y, classes=classes, name=raw.name, augment=augment)
    return train, from_tensors(raw.test_x, raw.test_y, name=raw.name, like=train)


def _check_labels(raw: Raw) -> None:
    unseen = sorted(set(raw.test_y.tolist()) - set(raw.train_y.tolist()))
    if unseen:
        raise BadData(
            f"The test set of {raw.name!r} has the labels {', '.join(map(str, unseen[:10]))}, which its training "
            "set lacks; is it the test set of other data?"
        )


def _parsed(spec: str) -> tuple[str, str, dict[str, str]]:
    """Scheme, place and options of SCHEME:PLACE?NAME=VALUE&…"""
    scheme, _, rest = spec.partition(":")
    place, _, query = rest.partition("?")
    try:
        choose("data set", scheme, (*_READERS, "text"))
    except InvalidChoice as error:
        raise BadData(f"{error} A data set is given as digits, parquet:DIR, folder:DIR or text:FILE.") from error
    if scheme != "digits" and not place:
        raise BadData(f"The data set {spec!r} lacks its place; write {scheme}:{'FILE' if scheme == 'text' else 'DIR'}.")
    try:
        return scheme, place, dict(parse_qsl(query, strict_parsing=bool(query), keep_blank_values=True))
    except ValueError as error:
        raise BadData(f"The options {query!r} in {spec!r} cannot be read; write them as ?label=fine_label.") from error
